"""Parameters by path, such as `blocks/3/q`: nested dicts as flat ones, mapped, split and merged."""

from collections.abc import Callable, Collection
from typing import Any

import jax

from engine.model.weights.weight import TrainingForm, Weight

Params = dict[str, Any]  # nested; a leaf is an Array, or a Weight of another kind


def leaf_paths(params: Params, prefix: str = "") -> dict[str, Any]:
    """Returns {path: leaf} of a nested dict, in order, block 10 after block 9; a leaf is whatever
    is not a dict.
    """
    leaves: dict[str, Any] = {}
    for name in sorted(params, key=_by_number):
        value = params[name]
        if isinstance(value, dict):
            leaves.update(leaf_paths(value, f"{prefix}{name}/"))
        else:
            leaves[prefix + name] = value
    return leaves


def _by_number(name: str) -> tuple[int, int, str]:
    """Returns the key by which names are sorted: numbers first, by value."""
    if name.isdigit():
        return (0, int(name), "")
    return (1, 0, name)


def array_paths(tree: Any) -> dict[str, Any]:
    """Returns {path: array} of any tree, in its own order: keys, fields and positions are names
    alike.

    So trees read from disk have the paths of the dataclasses and tuples they were saved from.
    Raises ValueError when two arrays share a path.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    by_path = {path_of(keys): leaf for keys, leaf in leaves}
    if len(by_path) < len(leaves):
        raise ValueError(
            "Two arrays have one path: of two keys, one is a number and the other its text, or has a slash."
        )
    return by_path


def path_of(keys: Any) -> str:
    """Returns JAX's keys of a leaf as a path."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def unflatten(leaves: dict[str, Any]) -> Params:
    """Returns the nested dict of {path: leaf}: the inverse of `leaf_paths`."""
    tree: Params = {}
    for path, leaf in leaves.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = leaf
    return tree


def map_paths(f: Callable[[str, Any], Any], params: Params) -> Params:
    """Returns the nested dict of f(path, leaf)."""
    return unflatten({path: f(path, leaf) for path, leaf in leaf_paths(params).items()})


def split(params: Params, chosen: Collection[str]) -> tuple[Params, Params]:
    """Returns the leaves at the chosen paths, and all others."""
    inside: dict[str, Any] = {}
    outside: dict[str, Any] = {}
    for path, leaf in leaf_paths(params).items():
        if path in chosen:
            inside[path] = leaf
        else:
            outside[path] = leaf
    return unflatten(inside), unflatten(outside)


def merge(trainable: Params, frozen: Params) -> Params:
    """Merges two trees into one: the inverse of `split`.

    Where both have a leaf, an adapter that trains goes on the frozen weight, and numbers that train
    become the weight that the frozen TrainingForm makes of them. Raises ValueError for two weights
    at one path.
    """
    leaves = leaf_paths(frozen)
    for path, leaf in leaf_paths(trainable).items():
        if path in leaves:
            leaf = _merge_leaves(path, leaf, leaves[path])
        leaves[path] = leaf
    return unflatten(leaves)


def _merge_leaves(path: str, trainable: Any, frozen: Any) -> Any:
    """Returns the weight of two leaves at one path, as `merge`."""
    if isinstance(trainable, Weight):
        return trainable.on(frozen)
    if isinstance(frozen, TrainingForm):
        return frozen.weight_of(trainable)
    raise ValueError(f"Both trees hold a weight at {path!r}.")
