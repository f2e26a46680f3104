"""StackedLoRA: a frozen weight under several adapters, of which each row of a batch has one or none: all share a program.

    stacks = make_stacks(cfg, count=8, rank=16)           # of zeros, which add nothing
    stacks = put_adapter(cfg, stacks, 3, adapter)         # in new arrays: whoever reads the old ones goes on with them
    forward(cfg, with_stacks(cfg, params, stacks, index), tokens, positions)       # index (B,): 3, or 0 for none

Each row gathers its own pair (Punica: Chen et al. 2023, 2310.18547), so that its numbers depend neither on other rows nor on
where its adapter lies.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from engine.errors import UserError
from engine.model.config import JOINED, ModelConfig
from engine.model.layers import einsum32
from engine.model.native.library import target
from engine.model.ops import has_kernel
from engine.model.paths import Params, leaf_paths, map_paths, unflatten

PARTS = JOINED | {"out": ("out",), "down": ("down",)}  # the weights of a block for inference on one device, and their matrices


@functools.partial(jax.tree_util.register_dataclass, data_fields=["base", "a", "b", "index"], meta_fields=["columns"])
@dataclasses.dataclass(frozen=True)
class StackedLoRA:
    """The weight base (in, out), to which row n of a batch adds a b of adapter index[n], unless that is 0; index (B,) int32.

    a (A + 1, P R, in) and b (A + 1, R, out), which has the scale in it: the base is P matrices of so many `columns` side by
    side, each with a pair of rank R.
    """

    base: Any
    a: Array
    b: Array
    index: Array
    columns: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape


def adapted(whole: Array, x: Array, weight: StackedLoRA) -> Array:
    """whole (B, T, out), the base's product with x (B, T, in) -> with what each row's adapter adds, in its dtype."""
    edges, rank = np.cumsum([0, *weight.columns]), weight.b.shape[1]
    if x.shape[1] == 1 and has_kernel():
        shape = jax.ShapeDtypeStruct(whole[:, 0].shape, jnp.float32)
        arguments = x[:, 0].astype(weight.a.dtype), weight.index, weight.a, weight.b, edges.astype(np.int32)
        return _add(whole, jax.ffi.ffi_call(target("adapter_matmul"), shape)(*arguments)[:, None], weight.index)
    a, b = weight.a[weight.index], weight.b[weight.index]
    inner = einsum32("bti,bri->btr", x.astype(a.dtype), a).astype(a.dtype)
    parts = [
        einsum32("btr,bro->bto", inner[..., n * rank : (n + 1) * rank], b[..., start:stop])
        for n, (start, stop) in enumerate(itertools.pairwise(edges.tolist()))
    ]
    return _add(whole, jnp.concatenate(parts, axis=-1), weight.index)


def _add(whole: Array, added: Array, index: Array) -> Array:
    """Returns the sum, in the type of the first, to the bit what it was in rows of index 0."""
    return jnp.where(index[:, None, None] > 0, (whole.astype(jnp.float32) + added).astype(whole.dtype), whole)


def make_stacks(cfg: ModelConfig, count: int, rank: int) -> Params:
    """Returns stacks for `count` adapters of at most that rank: at each weight's path a pair (a, b), in the compute dtype."""
    stacks = {}
    for layer in range(cfg.layers):
        for name, parts in PARTS.items():
            (rows, _), columns = cfg.matrices[parts[0]], _columns(cfg, name)
            shapes = (count + 1, len(parts) * rank, rows), (count + 1, rank, sum(columns))
            stacks[f"blocks/{layer}/{name}"] = tuple(np.zeros(shape, cfg.dtype) for shape in shapes)
    return unflatten(stacks)


def put_adapter(cfg: ModelConfig, stacks: Params, index: int, adapter: Params) -> Params:
    """Returns new stacks, NumPy arrays, that hold an adapter, of LoRA leaves without a base, at an index from 1 on."""
    leaves = leaf_paths(adapter)

    def put(path: str, pair: Any) -> Any:
        block, _, name = path.rpartition("/")
        a, b = map(np.array, pair)
        a[index], b[index], column, rank = 0, 0, 0, b.shape[1]
        for n, (part, columns) in enumerate(zip(PARTS[name], _columns(cfg, name))):
            if leaf := leaves.get(f"{block}/{part}"):
                a[index, n * rank : n * rank + leaf.rank] = np.asarray(leaf.a).T
                b[index, : leaf.rank, column : column + columns] = np.asarray(leaf.b, np.float32) * leaf.scale
            column += columns
        return a, b

    return map_paths(put, stacks)


def with_stacks(cfg: ModelConfig, params: Params, stacks: Params | None, index: Any) -> Params:
    """Returns params, as `prepare_params` joins them, of which row n of a batch has adapter index[n]; as they are without.

    Raises UserError for weights in blocks that cannot be joined.
    """
    pairs = leaf_paths(stacks or {})
    if apart := sorted(pairs.keys() - leaf_paths(params).keys()):
        raise UserError(f"An adapter by name needs {apart[0]} in one piece, and its blocks cannot be joined: take int8.")

    def stack(path: str, leaf: Any) -> Any:
        if path not in pairs:
            return leaf
        a, b = pairs[path]
        return StackedLoRA(leaf, a, b, index, _columns(cfg, path.rpartition("/")[2]))

    return map_paths(stack, params) if pairs else params


def _columns(cfg: ModelConfig, name: str) -> tuple[int, ...]:
    return tuple(cfg.matrices[part][1] for part in PARTS[name])
