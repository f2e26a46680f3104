"""Parameters by path: `blocks/3/qkv` names a leaf, a rule is a pattern on such names, and the first match wins."""

import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

from engine.errors import UserError, nearest


def leaf_paths(params: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{path: leaf} of a nested dict, in sorted order; a leaf is whatever is not a dict."""
    found: dict[str, Any] = {}
    for name in sorted(params, key=_by_number):
        value = params[name]
        if isinstance(value, dict):
            found.update(leaf_paths(value, f"{prefix}{name}/"))
        else:
            found[prefix + name] = value
    return found


def _by_number(name: str) -> tuple[int, int, str]:
    """Sorts block 10 after block 9."""
    return (0, int(name), "") if name.isdigit() else (1, 0, name)


def unflatten(leaves: dict[str, Any]) -> dict[str, Any]:
    """The nested dict that `leaf_paths` took apart."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = leaf
    return tree


def map_paths(f: Callable[[str, Any], Any], params: dict[str, Any]) -> dict[str, Any]:
    """The same tree with each leaf replaced by f(path, leaf)."""
    return unflatten({path: f(path, leaf) for path, leaf in leaf_paths(params).items()})


def first_match(rules: Sequence[tuple[str, Any]], params: dict[str, Any], default: Any) -> dict[str, Any]:
    """A tree like params whose leaves are the value of the first rule that matches the whole path, else `default`.

    A rule is (regular expression, value). Raises UserError for one that matches no path, naming the nearest.
    """
    paths = list(leaf_paths(params))
    for pattern, _ in rules:
        if not any(re.fullmatch(pattern, path) for path in paths):
            raise UserError(f"The rule {pattern!r} matches no parameter.{nearest(pattern, paths)}")
    value_at = lambda path, _: next((value for rule, value in rules if re.fullmatch(rule, path)), default)
    return map_paths(value_at, params)


def partition(params: dict[str, Any], rules: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(trainable, frozen): the leaves any rule matches, and the others. `merge` puts them together again."""
    chosen = leaf_paths(first_match([(rule, True) for rule in rules], params, False))
    return split(params, {path for path, matched in chosen.items() if matched})


def split(params: dict[str, Any], chosen: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the leaves at the chosen paths, the others)."""
    leaves = leaf_paths(params)
    return (
        unflatten({path: leaf for path, leaf in leaves.items() if path in chosen}),
        unflatten({path: leaf for path, leaf in leaves.items() if path not in chosen}),
    )


def merge(trainable: dict[str, Any], frozen: dict[str, Any]) -> dict[str, Any]:
    """One params tree of two. Where both have a path, the trainable leaf is an adapter, and is put `on` the frozen one.

    Raises ValueError when it is not: two weights cannot have one place.
    """
    leaves = leaf_paths(frozen)
    for path, leaf in leaf_paths(trainable).items():
        if path in leaves and not hasattr(leaf, "on"):
            raise ValueError(f"Both trees hold a weight at {path!r}.")
        leaves[path] = leaf.on(leaves[path]) if path in leaves else leaf
    return unflatten(leaves)


def stack(trees: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One tree whose leaves have a leading axis, of trees of one shape: what a scan over layers reads."""
    import jax
    import jax.numpy as jnp

    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
