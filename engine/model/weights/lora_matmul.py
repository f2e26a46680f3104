"""The product with an adapted weight, for many rows: the pair is folded into the base first, once for all rows.

Beside the base, the pair would cost two thin products and two passes over results as wide as the base's, for every row:
on a CPU half as much again as the base's own product. Folding costs R operations a weight. The backward pass still needs
no gradient of the whole matrix: with W = base + scale a b and y = (gain x) W,

    d(gain x) = g W^T,    da = (gain x)^T (g (scale b)^T),    db = (gain x a)^T (scale g).

What the product is taken with is rounded to x's dtype after the fold, as the weights of a full training step are. The
backward pass folds again: that takes a hundredth of the time of the products, and kept it would be a second model.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from engine.model import backward
from engine.model.weights.int8 import Int8, dequantize
from engine.model.weights.lora import LoRA, LoraPart, innermost_base, merge_weight

Cuts = tuple[tuple[int, int], ...]


def merged_matmul(x: Array, weight: LoRA, gain: Array | None, dtype: DTypeLike, cuts: Cuts) -> tuple[Array, ...]:
    """x (M, in), gain (in,) -> (gain x) W cut by columns: for each (start, stop) of `cuts` an array (M, stop - start).

    x, gain and the pair get gradients. The base gets none: under an adapter it is frozen.
    """
    return _fold_matmul(x, weight, gain, _How(jnp.dtype(dtype), cuts))


class _How(NamedTuple):
    dtype: Any
    cuts: Cuts


def _pairs_within(weight: LoRA, start: int, stop: int) -> list[LoraPart]:
    """The pairs whose columns lie in start..stop, counted from `start`."""
    return [
        pair._replace(start=pair.start - start, stop=pair.stop - start)
        for pair in weight.parts()
        if start <= pair.start and pair.stop <= stop
    ]


def _cut_of(weight: LoRA, gain: Array | None, start: int, stop: int, dtype: DTypeLike) -> Array:
    """Columns start..stop of gain * (base + scale a b), (in, stop - start) in `dtype`, added up in float32."""
    base = weight.base
    if isinstance(base, LoRA):
        base = merge_weight(base)
    if isinstance(base, Int8):
        base = dequantize(base)
    blocks, done = [], 0
    for pair in _pairs_within(weight, start, stop):
        blocks.append(jnp.zeros((base.shape[0], pair.start - done), dtype))
        blocks.append(_plain(pair.a, (pair.b * -weight.scale).astype(dtype), dtype))
        done = pair.stop
    blocks.append(jnp.zeros((base.shape[0], stop - start - done), dtype))
    # Subtracted, not added: x - 0 is x to the bit, while -0 + 0 is 0. So an adapter whose b is 0 changes nothing.
    cut = base[:, start:stop].astype(jnp.float32) - jnp.concatenate(blocks, axis=1).astype(jnp.float32)
    if gain is not None:
        cut = cut * gain[:, None]
    return cut.astype(base.dtype).astype(dtype)


def _plain(x: Array, w: Array, dtype: DTypeLike) -> Array:
    return jnp.dot(x.astype(w.dtype), w, preferred_element_type=dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _fold_matmul(x: Array, weight: LoRA, gain: Array | None, how: _How) -> tuple[Array, ...]:
    return _forward(x, weight, gain, how)[0]


def _forward(x: Array, weight: LoRA, gain: Array | None, how: _How):
    given = weight
    if isinstance(innermost_base(weight), Int8):  # merged when its turn comes, or all of the model might lie here in float32
        given, x = jax.lax.optimization_barrier((weight, x))
    cuts = [_cut_of(given, gain, start, stop, x.dtype) for start, stop in how.cuts]
    return tuple(_plain(x, cut, how.dtype) for cut in cuts), (x, weight, gain)


def _backward(how: _How, kept: tuple[Array, LoRA, Array | None], gs: tuple[Array, ...]):
    x, weight, gain = kept
    gs = tuple(g.astype(x.dtype) for g in gs)
    # Behind the barrier, or XLA would see that this was folded before, and keep it.
    weight, gs = jax.lax.optimization_barrier((weight, gs))
    cuts = [_cut_of(weight, gain, start, stop, x.dtype) for start, stop in how.cuts]
    a = weight.a if gain is None else weight.a * gain[:, None]
    inner_transposed = backward.transposed(_plain(x, a.astype(x.dtype), x.dtype))  # (R P, M)
    thin: list[Array] = []
    db: list[Array] = []
    for (start, stop), g in zip(how.cuts, gs):
        for pair in _pairs_within(weight, start, stop):
            mine = g[:, pair.start : pair.stop]
            thin.append(_times_transposed(mine, (pair.b * weight.scale).astype(x.dtype), x.dtype))
            rows = inner_transposed[len(db) * weight.rank : (len(db) + 1) * weight.rank]
            db.append(weight.scale * _plain(rows, mine, jnp.float32))
    da = backward.transposed(_plain(backward.transposed(jnp.concatenate(thin, axis=1)), x, jnp.float32))
    da = da if gain is None else da * gain[:, None]
    # In the place of the weight: None, no gradient, for the base.
    gradient = dataclasses.replace(
        weight, base=None, a=da.astype(weight.a.dtype), b=jnp.concatenate(db, axis=1).astype(weight.b.dtype)
    )
    return _sum_of_products(gs, cuts, x.dtype), gradient, _gain_gradient(x, weight, gain, how.cuts, gs)


def _times_transposed(g: Array, w: Array, dtype: DTypeLike) -> Array:
    return jnp.einsum("mf,df->md", g, w, preferred_element_type=dtype)


def _sum_of_products(gs: tuple[Array, ...], cuts: list[Array], dtype: DTypeLike) -> Array:
    """The sum of g cut^T, (M, in), added up in float32."""
    if len(gs) == 1:
        return _times_transposed(gs[0], cuts[0], dtype)
    total = jnp.zeros(())
    for g, cut in zip(gs, cuts):
        total = total + _times_transposed(g, cut, jnp.float32)
    return total.astype(dtype)


def _gain_gradient(x: Array, weight: LoRA, gain: Array | None, ranges: Cuts, gs: tuple[Array, ...]) -> Array | None:
    """Takes the products with the weight before its gain once more; dead code unless the gain learns."""
    if gain is None:
        return None
    plain = [_cut_of(weight, None, start, stop, x.dtype) for start, stop in ranges]
    back = _sum_of_products(gs, plain, x.dtype)
    return jnp.sum(x.astype(jnp.float32) * back.astype(jnp.float32), axis=0).astype(gain.dtype)


_fold_matmul.defvjp(_forward, _backward)
