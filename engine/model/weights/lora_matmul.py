"""Multiplies many rows by a LoRA weight: the pair is merged into the base first, once for all rows.

Unmerged, the pair would cost every row two thin products and two passes over results as wide as the base's: on a CPU half
as much again as the base's own product. Merging costs R operations a weight. The backward pass still needs no gradient
of the whole matrix: with W = base + scale a b and y = x W,

    dx = g W^T,    da = x^T (g (scale b)^T),    db = (x a)^T (scale g).

W is rounded to x's dtype, as in full training. The backward pass merges again, in a hundredth of the time of the products:
all merged weights together would be a second model.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from engine.model.ops import transpose
from engine.model.weights.int8 import Int8
from engine.model.weights.lora import LoRA, innermost_base, to_dense

Cuts = tuple[tuple[int, int], ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def merged_matmul(x: Array, weight: LoRA, dtype: DTypeLike, cuts: Cuts) -> tuple[Array, ...]:
    """x (M, in) -> x W cut by columns: an array in `dtype` for each (start, stop) of `cuts`. Gradients: of x and the pair.

    The base is frozen and gets none.
    """
    return _forward(x, weight, dtype, cuts)[0]


def _merge_columns(weight: LoRA, start: int, stop: int, dtype: DTypeLike) -> Array:
    """Returns columns start..stop of base + scale a b, (in, stop - start) in `dtype`, added up in float32."""
    base = to_dense(weight.base)
    blocks, done = [], 0
    for part in weight.parts(start, stop):
        blocks.append(jnp.zeros((base.shape[0], part.start - done), dtype))
        blocks.append(_dot(part.a, (part.b * -weight.scale).astype(dtype), dtype))
        done = part.stop
    blocks.append(jnp.zeros((base.shape[0], stop - start - done), dtype))
    # Subtracted, because x - 0 is x to the bit, while -0 + 0 is 0: an adapter whose b is 0 changes nothing.
    merged = base[:, start:stop].astype(jnp.float32) - jnp.concatenate(blocks, axis=1).astype(jnp.float32)
    return merged.astype(base.dtype).astype(dtype)


def _dot(x: Array, w: Array, dtype: DTypeLike) -> Array:
    return jnp.dot(x.astype(w.dtype), w, preferred_element_type=dtype)


def _times_transposed(g: Array, w: Array, dtype: DTypeLike) -> Array:
    return jnp.einsum("mf,df->md", g, w, preferred_element_type=dtype)


def _forward(x: Array, weight: LoRA, dtype: DTypeLike, cuts: Cuts):
    ordered = weight
    if isinstance(innermost_base(weight), Int8):  # merged in its turn, or all of the model might be here in float32
        base, x = jax.lax.optimization_barrier((weight.base, x))
        ordered = dataclasses.replace(weight, base=base)
    matrices = [_merge_columns(ordered, start, stop, x.dtype) for start, stop in cuts]
    return tuple(_dot(x, matrix, dtype) for matrix in matrices), (x, weight)


def _backward(dtype: DTypeLike, cuts: Cuts, residuals: tuple[Array, LoRA], gs: tuple[Array, ...]):
    x, weight = residuals
    gs = tuple(g.astype(x.dtype) for g in gs)
    # Without the barrier XLA would keep what the forward pass merged. The pair, which lies whole on every device, needs none.
    base, gs = jax.lax.optimization_barrier((weight.base, gs))
    weight = dataclasses.replace(weight, base=base)
    matrices = [_merge_columns(weight, start, stop, x.dtype) for start, stop in cuts]
    inner_transposed = transpose(_dot(x, weight.a.astype(x.dtype), x.dtype))  # (R P, M)
    thin: list[Array] = []
    db: list[Array] = []
    for (start, stop), g in zip(cuts, gs):
        for part in weight.parts(start, stop):
            columns = g[:, part.start : part.stop]
            thin.append(_times_transposed(columns, (part.b * weight.scale).astype(x.dtype), x.dtype))
            rows = inner_transposed[len(db) * weight.rank : (len(db) + 1) * weight.rank]
            db.append(weight.scale * _dot(rows, columns, jnp.float32))
    da = transpose(_dot(transpose(jnp.concatenate(thin, axis=1)), x, jnp.float32))
    gradient = dataclasses.replace(
        weight, base=None, a=da.astype(weight.a.dtype), b=jnp.concatenate(db, axis=1).astype(weight.b.dtype)
    )
    if len(gs) == 1:
        return _times_transposed(gs[0], matrices[0], x.dtype), gradient
    dx = jnp.zeros(())
    for g, matrix in zip(gs, matrices):
        dx = dx + _times_transposed(g, matrix, jnp.float32)
    return dx.astype(x.dtype), gradient


merged_matmul.defvjp(_forward, _backward)
