"""Multiplies many rows by weights in the rows' own type, their adapters merged, forward and backward.

Unmerged, the pair would cost every row two thin products and two passes over results as wide as the
base's: on a CPU half as much again as the base's own product. Merging costs R operations a weight.
The backward pass still needs no gradient of the whole matrix: with W = base + scale a b and y = x
W,

    dx = g W^T,    da = x^T (g (scale b)^T),    db = (x a)^T (scale g).

W is rounded to x's dtype, as in full training. The backward pass merges again, in a hundredth of
the time of the products: all merged weights together would be a second model.
"""

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from engine.mesh import layout
from engine.model.layers import dot32, einsum32
from engine.model.ops import transpose
from engine.model.weights.lora import LoRA
from engine.model.weights.plain import as_weight


def is_merged(weight: Any, x: Array) -> bool:
    """Returns whether x is multiplied by the whole weight in x's dtype: where the weight is smaller
    than x, or, if it has a pair to merge, than x and the result; not where the base multiplies
    integers.
    """
    rows, columns = weight.shape
    numbers = x.size // layout.row_shards()
    if isinstance(weight, LoRA):
        numbers += numbers // rows * columns
    return numbers > rows * columns and as_weight(weight).can_be_merged


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def multiply_merged(x: Array, weights: tuple[Any, ...], dtype: DTypeLike) -> tuple[Array, ...]:
    """x (M, in) -> x times each weight, adapters merged, in `dtype`. An Int8, and what lies under a
    pair, gets no gradient.
    """
    return _forward(x, weights, dtype)[0]


def _dot(x: Array, w: Array, dtype: DTypeLike) -> Array:
    return jnp.dot(x.astype(w.dtype), w, preferred_element_type=dtype)


def _after(weight: Any, other: Array) -> tuple[Any, Array]:
    """Returns both so that the weight is merged, and its pair multiplied, only once `other` is
    there.

    One weight at a time: a barrier keeps all that goes through it.
    """
    return jax.lax.optimization_barrier((weight, other))


def _forward(x: Array, weights: tuple[Any, ...], dtype: DTypeLike):
    products = []
    for weight in weights:
        rows = x
        if as_weight(weight).merges_late:
            weight, rows = _after(weight, x)
        products.append(_dot(rows, as_weight(weight).merged(x.dtype), dtype))
    return tuple(products), (x, weights)


def _backward(dtype: DTypeLike, residuals: tuple[Array, tuple[Any, ...]], gs: tuple[Array, ...]):
    x, weights = residuals
    # Each weight is merged anew once its g is there. Else XLA would keep what the forward pass merged,
    # or the products of the pairs: a fifth to a third more memory for a step.
    late_weights: list[Any] = []
    late_gs: list[Array] = []
    for weight, g in zip(weights, gs):
        late_g = g.astype(x.dtype)
        if as_weight(weight).merges_late:
            late_weight, late_g = _after(weight, late_g)
        else:
            late_weight, late_g = layout.regather(weight, late_g)
        late_weights.append(as_weight(late_weight))
        late_gs.append(late_g)
    dx = _input_gradient(late_gs, [weight.merged(x.dtype) for weight in late_weights])
    x_transposed = transpose(x)
    pairs: dict[int, tuple[LoRA, Array]] = {}  # by their place among the weights
    for place, (weight, g) in enumerate(zip(weights, late_gs)):
        if isinstance(weight, LoRA):
            pairs[place] = (weight, g)
    pair_gradients = dict(zip(pairs, _pair_gradients(x, [*pairs.values()])))
    gradients: list[Any] = []
    for place, (weight, g) in enumerate(zip(weights, late_gs)):
        if place in pair_gradients:
            gradients.append(pair_gradients[place])
        elif isinstance(weight, Array):
            gradients.append(dot32(x_transposed, g).astype(weight.dtype))
        else:  # of another kind, which is frozen
            gradients.append(None)
    return dx, tuple(gradients)


def _pair_gradients(x: Array, pairs: list[tuple[LoRA, Array]]) -> list[LoRA]:
    """Returns da and db of each pair, given the gradient of its product. All a side by side: x is
    read once for each.
    """
    if not pairs:
        return []
    cuts = np.cumsum([weight.rank for weight, _ in pairs])[:-1].tolist()
    all_a = jnp.concatenate([weight.a for weight, _ in pairs], 1).astype(x.dtype)
    xa_transposed = jnp.split(transpose(_dot(x, all_a, x.dtype)), cuts)  # each (R, M)
    gb = []  # each g (scale b)^T, (M, R)
    for weight, g in pairs:
        scaled_b = (weight.b * weight.scale).astype(x.dtype)
        gb.append(jnp.einsum("mf,rf->mr", g, scaled_b, preferred_element_type=x.dtype))
    all_gb = jnp.concatenate(gb, axis=1)
    da = jnp.split(transpose(dot32(transpose(all_gb), x)), cuts, axis=1)
    db = [weight.scale * dot32(rows, g) for rows, (weight, g) in zip(xa_transposed, pairs)]
    gradients = []
    for (weight, _), a, b in zip(pairs, da, db):
        a = a.astype(weight.a.dtype)
        b = b.astype(weight.b.dtype)
        gradients.append(dataclasses.replace(weight, base=None, a=a, b=b))
    return gradients


def _input_gradient(gs: Sequence[Array], weights: Sequence[Array]) -> Array:
    """Each g (M, F), w (D, F) -> the sum of g w^T (M, D), added up in float32, in g's dtype.

    Where devices share the columns it is one product, or they would add up the results of each.
    """
    shards = layout.column_shards()
    if shards > 1:
        gs = [layout.join(gs, shards, axis=1)]
        weights = [layout.join(weights, shards, axis=1)]
    if len(gs) == 1:
        return jnp.einsum("mf,df->md", gs[0], weights[0], preferred_element_type=gs[0].dtype)
    products = (einsum32("mf,df->md", g, w) for g, w in zip(gs, weights))
    return functools.reduce(operator.add, products).astype(gs[0].dtype)


multiply_merged.defvjp(_forward, _backward)
