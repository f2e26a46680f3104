"""StackedLoRA: a frozen weight under several adapters, of which each row of a batch has one or none: all share a program.

    stacks = make_stacks(params, count=8, rank=16)        # of zeros, which add nothing
    stacks = put_adapter(cfg, stacks, 3, adapter)         # in new arrays: whoever reads the old ones goes on with them
    forward(cfg, with_stacks(cfg, params, stacks, index), tokens, positions)       # index (B,): 3, or 0 for none

Each row gathers its own pair (Punica: Chen et al. 2023, 2310.18547), so that its numbers depend
neither on other rows nor on where its adapter lies.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from engine.model.config import JOINED, MATRICES, ModelConfig
from engine.model.layers import einsum32
from engine.model.native.library import target
from engine.model.ops import computes_in_c
from engine.model.paths import Params, leaf_paths, map_paths, unflatten
from engine.model.weights.int8 import LARGEST
from engine.model.weights.plain import as_weight
from engine.model.weights.weight import Weight

# a block's weights, alone or side by side for inference: their matrices
PARTS = {name: (name,) for name in MATRICES} | JOINED


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["base", "a", "b", "scale", "index"], meta_fields=["widths"]
)
@dataclasses.dataclass(frozen=True)
class StackedLoRA(Weight):
    """The weight base (in, out), to which row n of a batch adds scale a b of adapter index[n]
    unless that is 0; index (B,).

    a (A + 1, P R, in), b (A + 1, R, out) and scale (A + 1, P R): the base is P matrices of these
    `widths` side by side, each with a pair of rank R, and a scale for each of the R. A scale of 0
    is of a rank that an adapter does not have.
    """

    base: Any
    a: Array
    b: Array
    scale: Array
    index: Array
    widths: tuple[int, ...]

    rows_differ = True

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def kind(self) -> str:
        return as_weight(self.base).kind

    def dense(self, dtype: DTypeLike | None = None) -> Array:
        raise TypeError("The rows of a batch have adapters of their own, and no matrix is that of all.")

    def times(self, x: Array, dtype: DTypeLike) -> Array:
        """x (B, T, in) -> (B, T, out)."""
        if self.fuses(x):
            return self.times_fused(x, dtype)
        return (as_weight(self.base).times(x, jnp.float32) + adapter_product(x, self)).astype(dtype)

    def cast(self, dtype: DTypeLike) -> "StackedLoRA":
        return dataclasses.replace(self, base=as_weight(self.base).cast(dtype))

    def fuses(self, x: Array) -> bool:
        """A kernel adds the adapters' products where each row has one token."""
        return x.shape[1] == 1 and as_weight(self.base).fuses(x)

    def times_fused(
        self,
        x: Array,
        dtype: DTypeLike,
        gain: Array | None = None,
        eps: float = 0.0,
        pairs: tuple[Any, ...] = (),
    ) -> Array:
        return self.base.times_fused(x, dtype, gain, eps, self.pairs)

    @property
    def edges(self) -> np.ndarray:
        return np.cumsum([0, *self.widths], dtype=np.int32)

    @property
    def pairs(self) -> tuple[Any, ...]:
        """Arguments of a kernel that adds the adapters' products: native/adapters.h."""
        return self.index, self.a, self.b, self.scale, self.edges


def adapter_product(x: Array, weight: StackedLoRA) -> Array:
    """x (B, T, in) -> what adapters add to the base's product, (B, T, out) float32; -0, which adds
    nothing, where none does.
    """
    edges = weight.edges.tolist()
    rank = weight.b.shape[1]
    if x.shape[1] == 1 and computes_in_c():
        shape = jax.ShapeDtypeStruct((len(x), edges[-1]), jnp.float32)
        kernel = jax.ffi.ffi_call(target("adapter_matmul"), shape)
        sums = kernel(x[:, 0].astype(jnp.float32), *weight.pairs)
        return sums[:, None]
    a = weight.a[weight.index]
    b = weight.b[weight.index]
    scale = weight.scale[weight.index]
    inner = (einsum32("bti,bri->btr", x, a.astype(x.dtype)) * scale[:, None]).astype(x.dtype)
    parts = []
    for n, (start, stop) in enumerate(itertools.pairwise(edges)):
        inner_part = inner[..., n * rank : (n + 1) * rank]
        parts.append(einsum32("btr,bro->bto", inner_part, b[..., start:stop].astype(x.dtype)))
    return jnp.where(weight.index[:, None, None] > 0, jnp.concatenate(parts, axis=-1), -0.0)


def make_stacks(params: Params, count: int, rank: int) -> Params:
    """Returns stacks for `count` adapters of at most that rank: at each weight's path its (a, b,
    scale).

    params: as `prepare_params` returns them. a and b have the dtype of a plain weight. Over int8
    and blocks they are int8, because each stream reads its own: wider ones of eight streams would
    add half the weights' bytes.
    """
    stacks = {}
    for path, leaf in leaf_paths(params).items():
        parts = PARTS.get(path.rpartition("/")[2])
        if not parts:
            continue
        dtype = getattr(leaf, "dtype", np.int8)
        rows, columns = leaf.shape
        ranks = len(parts) * rank
        a = np.zeros((count + 1, ranks, rows), dtype)
        b = np.zeros((count + 1, rank, columns), dtype)
        stacks[path] = a, b, np.zeros((count + 1, ranks), np.float32)
    return unflatten(stacks)


def put_adapter(cfg: ModelConfig, stacks: Params, index: int, adapter: Params) -> Params:
    """Returns new stacks, NumPy arrays, that hold an adapter, of LoRA leaves without a base, at an
    index from 1 on.
    """
    leaves = leaf_paths(adapter)

    def with_adapter(path: str, stack: Any) -> Any:
        block, _, name = path.rpartition("/")
        a, b, scale = map(np.array, stack)
        a[index] = 0
        b[index] = 0
        scale[index] = 0
        column = 0
        rank = b.shape[1]
        for n, (part, columns) in enumerate(zip(PARTS[name], _columns(cfg, name))):
            leaf = leaves.get(f"{block}/{part}")
            if leaf:
                ranks = slice(n * rank, n * rank + leaf.rank)
                rows_a, scale_a = _round_rows(np.asarray(leaf.a).T, a.dtype)
                rows_b, scale_b = _round_rows(np.asarray(leaf.b), b.dtype)
                a[index, ranks] = rows_a
                b[index, : leaf.rank, column : column + columns] = rows_b
                scale[index, ranks] = scale_a * scale_b * leaf.scale
            column += columns
        return a, b, scale

    return map_paths(with_adapter, stacks)


def _round_rows(values: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, Any]:
    """values (R, X) -> these, or integers for int8, and the scale of each row, whose largest
    magnitude becomes 127.
    """
    if dtype != np.int8:
        return values, 1
    scale = np.abs(values).max(axis=1) / LARGEST
    return np.rint(values / np.where(scale == 0, 1, scale)[:, None]), scale


def with_stacks(cfg: ModelConfig, params: Params, stacks: Params | None, index: Any) -> Params:
    """Returns params, over which the stacks were made, with adapter index[n], (B,) int32, in row n;
    the same without stacks.
    """
    if stacks is None:
        return params
    stacks_by_path = leaf_paths(stacks)

    def stack(path: str, leaf: Any) -> Any:
        if path not in stacks_by_path:
            return leaf
        a, b, scale = stacks_by_path[path]
        return StackedLoRA(leaf, a, b, scale, index, _columns(cfg, path.rpartition("/")[2]))

    return map_paths(stack, params)


def _columns(cfg: ModelConfig, name: str) -> tuple[int, ...]:
    """Returns the columns of each matrix of a weight of PARTS."""
    return tuple(cfg.matrices[part][1] for part in PARTS[name])
