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
    # Else XLA would keep what the forward pass merged, or the products of the pairs: a fifth to a
    # third more memory for a step.
    again: list[Any] = []
    late_gs: list[Array] = []
    for weight, g in zip(weights, gs):
        late = g.astype(x.dtype)
        if as_weight(weight).merges_late:
            held, late = _after(weight, late)
        else:
            held, late = layout.regather(weight, late)
        again.append(as_weight(held))
        late_gs.append(late)
    dx = _input_gradient(late_gs, [weight.merged(x.dtype) for weight in again])
    x_transposed = transpose(x)
    pairs = [(weight, g) for weight, g in zip(weights, late_gs) if isinstance(weight, LoRA)]
    of_pairs = iter(_pair_gradients(x, pairs))
    gradients: list[Any] = []
    for weight, g in zip(weights, late_gs):
        if isinstance(weight, LoRA):
            gradients.append(next(of_pairs))
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
    ends = np.cumsum([weight.rank for weight, _ in pairs])[:-1].tolist()
    side_by_side = jnp.concatenate([weight.a for weight, _ in pairs], 1).astype(x.dtype)
    inner = jnp.split(transpose(_dot(x, side_by_side, x.dtype)), ends)
    thin = [
        jnp.einsum("mf,rf->mr", g, (weight.b * weight.scale).astype(x.dtype), preferred_element_type=x.dtype)
        for weight, g in pairs
    ]
    da = jnp.split(transpose(dot32(transpose(jnp.concatenate(thin, axis=1)), x)), ends, axis=1)
    db = [weight.scale * dot32(rows, g) for rows, (weight, g) in zip(inner, pairs)]
    return [
        dataclasses.replace(weight, base=None, a=a.astype(weight.a.dtype), b=b.astype(weight.b.dtype))
        for (weight, _), a, b in zip(pairs, da, db)
    ]


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
