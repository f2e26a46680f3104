"""Cuts weights, activations and caches along the axes of a mesh: by rule, and inside a program. `placement.py` lays them out.

`data` repeats the weights, `fsdp` cuts them and gathers each one where it is used (Rajbhandari et al. 2020, 1910.02054),
`tensor` cuts the products (Shoeybi et al. 2019, 1909.08053). Without a mesh every function here returns what it was given,
so one device runs the program that it would run without this file.

On a `tensor` axis of t devices, the columns of a matrix with several parts (q, k, v; gate, up) lie in t groups: each holds
its t-th of every part, and a device computes whole heads. That is in memory only; files hold the parts one after another.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from engine.mesh.shape import AXES, ROWS
from engine.model.column_groups import LEAF, join_groups, regroup, split_groups
from engine.model.config import ModelConfig

SPREAD_ORDER = ("fsdp", "tensor", "data")  # of axes that whole matrices are dealt out along; `data` has them all already
RULES = (  # a parameter's path -> the axes of the mesh that cut it; the first match wins
    (r"embed", P(None, ("tensor", "fsdp"))),
    (r"head", P(("tensor", "fsdp"), None)),
    (r"blocks/\d+/(qkv|gate_up)", P("fsdp", "tensor")),
    (r"blocks/\d+/(out|down)", P("tensor", "fsdp")),
    (r"(blocks/\d+/)?\w*(norm|bias)", P()),
)


def leaf_spec(path: str, shape: tuple[int, ...], sizes: Any) -> P:
    """Returns the axes that cut a leaf of a tree, by the rule of the parameter that its path ends in.

    `sizes`: axis -> devices. An axis that does not divide the leaf does not cut it (`check_mesh` refuses matrices like
    that). Numbers that belong to no parameter are whole everywhere. Raises ValueError for a matrix without a rule.
    """
    match = LEAF.fullmatch(path)
    spec = next((spec for pattern, spec in RULES if match and re.fullmatch(pattern, match["path"])), None)
    if spec is None:
        if len(shape) > 1:
            raise ValueError(f"No rule says where {path!r} {shape} lies on a mesh.")
        return P()
    part = match["part"] if match else None
    if part == "a":  # thin: its long axis over all devices that cut the matrix
        spec = P(("tensor", "fsdp"), None)
    elif part == "b":
        spec = P(None, ("tensor", "fsdp"))
    elif len(shape) < 2:
        spec = P()
    return _fitting(spec, shape, sizes)


def _fitting(spec: P, shape: tuple[int, ...], sizes: Any) -> P:
    """Returns the spec without the axes that do not divide the array."""
    count = lambda names: math.prod(sizes[name] for name in ((names,) if isinstance(names, str) else names))
    return P(*(names if names and size % count(names) == 0 else None for names, size in zip(spec, shape)))


def map_specs(f: Callable[[P, Any], Any], tree: Any, sizes: Any) -> Any:
    """Returns a tree like `tree` of f(spec, leaf), with the axes that cut each leaf."""

    def at(keys: Any, leaf: Any) -> Any:
        return f(leaf_spec(jax.tree_util.keystr(keys, simple=True, separator="/"), leaf.shape, sizes), leaf)

    return jax.tree_util.tree_map_with_path(at, tree)


# Inside a program: on the mesh it is traced for. To pin is `with_sharding_constraint`.


def pin_cache(tree: Any) -> Any:
    """Pins the arrays of a KV cache (B, K, ...): their key heads over `tensor`; all that has fewer than 3 axes whole."""
    mesh = jax.sharding.get_abstract_mesh()
    constrain = lambda x: jax.lax.with_sharding_constraint(x, cache_spec(x.shape, mesh.shape))
    return tree if mesh.empty else jax.tree.map(constrain, tree)


def cache_spec(shape: tuple[int, ...], sizes: Any) -> P:
    """Returns the axes that cut an array of a KV cache (B, K, ...)."""
    return P(None, "tensor") if len(shape) > 2 and shape[1] % sizes["tensor"] == 0 else P()


def _size(*axes: str) -> int:
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes.get(axis, 1) for axis in axes)


def row_shards() -> int:
    """Returns the number of devices that share the rows of a batch: 1 without a mesh."""
    return _size(*ROWS)


def column_shards() -> int:
    """Returns the size of the `tensor` axis: 1 without a mesh."""
    return _size("tensor")


def _pin(x: Array, *axes: Any) -> Array:
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, _fitting(P(*axes), x.shape, mesh.shape))


def shard_rows(x: Array) -> Array:
    """Pins x (B, ...): its rows over the devices, all else whole.

    Without it XLA would let a weight's own cut spread into the activations, and add those up at every product: 35 times
    the traffic.
    """
    return _pin(x, ROWS)


def look_up(f: Callable[[Any, Array], Array], table: Any, tokens: Array) -> Array:
    """Returns f(table, tokens (B, T)) (B, T, D) pinned by `shard_rows`.

    Each device looks up its columns of the table for the tokens of all devices that hold the other columns, and these exchange
    their results: no table moves, and no gradient of one.
    """
    x = _pin(f(table, _pin(tokens, "data")), "data", None, ("tensor", "fsdp"))
    return shard_rows(_pin(x, ROWS, None, "tensor"))


def spread_rows(x: Array) -> Array:
    """Pins x (B, ...) with its rows over all devices, where they divide them: for a head, which no axis cuts."""
    return _pin(x, AXES) if spread_shards(len(x)) == _size(*AXES) else shard_rows(x)


def spread_shards(count: int) -> int:
    """Returns the number of devices that `spread_rows` cuts `count` rows for."""
    return _size(*AXES) if count % _size(*AXES) == 0 else row_shards()


def shard_columns(x: Array) -> Array:
    """Pins x (B, ..., F): its rows over the devices, its last axis over `tensor`."""
    return _pin(x, ROWS, *(None,) * (x.ndim - 2), "tensor")


def replicate(tree: Any) -> Any:
    """Pins arrays whole on every device: gathered here, once for all that follows."""
    return tree if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(tree, P())


def attend_by_head(kernel: Callable[..., Array | None], q: Array, k: Array, v: Array, mask: Array | None) -> Array | None:
    """Returns kernel(q (B, T, N, H), k, v (B, S, K, H), mask (B, ...) or None) (B, T, N, H), each device its own rows and
    heads: XLA cannot cut a kernel. What does not divide is whole everywhere."""
    if jax.sharding.get_abstract_mesh().empty:
        return kernel(q, k, v, mask)
    rows = ROWS if len(q) % row_shards() == 0 else None
    heads = P(rows, None, "tensor" if k.shape[2] % column_shards() == 0 else None)
    # Unchecked, for a kernel does not say over which axes its results differ.
    return jax.shard_map(kernel, in_specs=(heads, heads, heads, P(rows)), out_specs=heads, check_vma=False)(q, k, v, mask)


def pin(tree: Any) -> Any:
    """Pins parameters, gradients or a whole state where the rules say."""
    mesh = jax.sharding.get_abstract_mesh()
    return tree if mesh.empty else map_specs(lambda spec, x: jax.lax.with_sharding_constraint(x, spec), tree, mesh.shape)


def regather(weights: Any, *others: Any) -> tuple[Any, ...]:
    """Returns the trees unchanged; XLA gathers the weights anew for backward, and need not keep what forward gathered."""
    return (weights, *others) if _size("fsdp") == 1 else jax.lax.optimization_barrier((weights, *others))


def split_columns(x: Array, widths: Sequence[int], axis: int = -1) -> list[Array]:
    """Splits an axis into parts of these widths, which lie in groups on a `tensor` axis."""
    return split_groups(x, widths, axis, column_shards())


def join_columns(parts: Sequence[Array], axis: int = -1) -> Array:
    """Joins parts along an axis, in groups on a `tensor` axis: the inverse of `split_columns`."""
    return join_groups(parts, axis, column_shards())


def in_first_part(count: int, first: int) -> Array:
    """Returns (count,) bool: whether each place of a joined axis lies in its first part, of `first` places."""
    groups = column_shards()
    return jnp.arange(count) < first if groups == 1 else jnp.arange(count) % (count // groups) < first // groups


def stack_rows(x: Array, parts: int) -> Array:
    """x (B, ...) -> (parts, B / parts, ...), each of rows from every device."""
    if row_shards() == 1:
        return x.reshape(parts, -1, *x.shape[1:])
    grouped = x.reshape(row_shards(), parts, -1, *x.shape[1:]).swapaxes(0, 1)
    return grouped.reshape(parts, -1, *x.shape[1:])


def split_rows(x: Array, parts: int) -> list[Array]:
    """Splits x (B, ...) into equal parts, each of rows from every device."""
    part = x.shape[0] // parts
    return split_groups(x, [part] * parts, 0, _row_groups(part))


def join_rows(parts: Sequence[Array]) -> Array:
    """Joins parts (B, ...) to rows of which every device holds its own: the inverse of `split_rows`."""
    return join_groups(parts, 0, _row_groups(len(parts[0])))


def _row_groups(rows: int) -> int:
    """Returns the number of devices that share `rows` rows: 1 for a few rows, which every device holds."""
    return row_shards() if rows % row_shards() == 0 else 1


def cut_rows(x: Array, start: int, size: int) -> Array:
    """Returns rows start..start + size of x (M, ...), or of every device's share of x as `spread_rows` cuts it."""
    groups = spread_shards(len(x))
    if groups == 1:
        return x[start : start + size]
    return x.reshape(groups, -1, *x.shape[1:])[:, start : start + size].reshape(-1, *x.shape[1:])


def join_cuts(parts: Sequence[Array]) -> Array:
    """Joins all that `cut_rows` cut from one array, in order."""
    return join_groups(parts, 0, spread_shards(sum(map(len, parts))))


def map_whole_matrices(f: Callable[[Array], Array], tree: Any) -> Any:
    """Returns a tree of f(matrix), each computed whole by one device; f returns a matrix of the same shape.

    Matrices of one shape and place are stacked and exchanged, as many to every device (some may get zeros), first along
    `fsdp`, then along `tensor`; then back.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.tree.map(f, tree)
    each = jax.shard_map(
        lambda share: jax.lax.map(f, share), in_specs=P(SPREAD_ORDER), out_specs=P(SPREAD_ORDER), check_vma=False
    )
    specs = map_specs(lambda spec, _: spec, tree, mesh.shape)
    leaves, treedef = jax.tree.flatten(tree)
    kinds = list(zip((leaf.shape for leaf in leaves), jax.tree.leaves(specs)))
    results: dict[int, Array] = {}
    for kind in dict.fromkeys(kinds):
        places = [place for place, other in enumerate(kinds) if other == kind]
        between = [P(None, *kind[1]), P("fsdp", *(name if name == "tensor" else None for name in kind[1])), P(SPREAD_ORDER[:2])]
        stack = jnp.stack([leaves[place] for place in places])
        stack = jnp.pad(stack, ((0, -len(places) % mesh.size), (0, 0), (0, 0)))
        for spec in between:
            stack = jax.lax.with_sharding_constraint(stack, spec)
        stack = each(stack)
        for spec in reversed(between):
            stack = jax.lax.with_sharding_constraint(stack, spec)
        results |= zip(places, stack)
    return jax.tree.unflatten(treedef, [results[place] for place in range(len(leaves))])


def change_array(x: Array, widths: Sequence[int], before: int, after: int) -> Array:
    """Returns x with its columns, of parts of these widths, in `after` groups for `before`."""
    return join_groups(split_groups(x, widths, -1, before), -1, after)


def group_columns(cfg: ModelConfig, tree: Any, change: Callable[[Array, list[int], int, int], Any] = change_array) -> Any:
    """Returns a tree of parameters, ordered as in files, with the columns of every matrix grouped for the `tensor` axis.

    `change(x, widths, before, after)` gives what stands for an array whose columns are to be grouped.
    """
    return _change_groups(cfg, tree, 1, column_shards(), change)


def ungroup_columns(cfg: ModelConfig, tree: Any, change: Callable[[Array, list[int], int, int], Any] = change_array) -> Any:
    """The inverse of `group_columns`: parameters ordered as in files."""
    return _change_groups(cfg, tree, column_shards(), 1, change)


def _change_groups(cfg: ModelConfig, tree: Any, before: int, after: int, change: Callable[..., Any]) -> Any:
    return tree if before == after else regroup(cfg, tree, lambda x, widths: change(x, widths, before, after), after)
