"""What a weight can be, and the one place that multiplies by any of them.

Today a leaf is a plain Array, float32 in training and the compute dtype once loaded for inference. A new kind of weight
(Int8, LoRA) is a new leaf here and a new case in these three functions; the text of the model stays the same.
"""

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from engine.model import backward
from engine.model.backend import on_cpu


def project(x: Array, weight: Array, dtype: DTypeLike, gain: Array | None = None) -> Array:
    """x (..., in), weight (in, out) -> (..., out) in `dtype`: (gain * x) weight, multiplied in x's dtype, summed in float32.

    `gain` (in,) is the norm's. While training on a CPU it scales the weight's rows instead of the far more numerous
    rows of x, which is the same product.
    """
    if gain is not None:
        x, weight = _gained(x, weight, gain[:, None], gain)
    multiply = backward.matmul if on_cpu() else _plain
    return _over_rows(x, lambda rows: multiply(rows, weight, dtype))


def project_two(x: Array, weight: Array, dtype: DTypeLike, gain: Array) -> tuple[Array, Array]:
    """x (..., in), weight (in, 2F), gain (in,) -> the two halves of the product, (..., F) each.

    Many rows on a CPU make two products: nothing then has to be cut or joined on the way back.
    """
    if on_cpu() and x.size > weight.size:
        x, weight = _gained(x, weight, gain[:, None], gain)
        one, two = backward.matmul_two(x.reshape(-1, x.shape[-1]), weight, dtype)
        return one.reshape(*x.shape[:-1], -1), two.reshape(*x.shape[:-1], -1)
    one, two = jnp.split(project(x, weight, dtype, gain), 2, axis=-1)
    return one, two


def unembed(x: Array, embed: Array, dtype: DTypeLike, gain: Array) -> Array:
    """x (..., D), embed (V, D), gain (D,) -> (..., V): the tied head, which multiplies by the embedding's other side."""
    x, embed = _gained(x, embed, gain, gain)
    multiply = backward.matmul_rows if on_cpu() else _plain_rows
    return _over_rows(x, lambda rows: multiply(rows, embed, dtype))


def _gained(x: Array, weight: Array, on_weight: Array, gain: Array) -> tuple[Array, Array]:
    if on_cpu() and x.size > weight.size:
        return x, weight * on_weight.astype(weight.dtype)
    return x * gain.astype(x.dtype), weight


def lookup(embed: Array, tokens: Array) -> Array:
    """embed (V, D), tokens (...) int32 -> (..., D) float32."""
    rows = backward.lookup(embed, tokens) if on_cpu() else embed[tokens]
    return rows.astype(jnp.float32)


def _plain(x: Array, weight: Array, dtype: DTypeLike) -> Array:
    return jnp.dot(x, weight.astype(x.dtype), preferred_element_type=dtype)


def _plain_rows(x: Array, embed: Array, dtype: DTypeLike) -> Array:
    return jnp.einsum("md,vd->mv", x, embed.astype(x.dtype), preferred_element_type=dtype)


def _over_rows(x: Array, multiply) -> Array:
    """Folds the leading axes into rows, at least two: with a single row the CPU converts the whole weight each call."""
    rows = x.reshape(-1, x.shape[-1])
    lone = rows.shape[0] == 1
    out = multiply(jnp.concatenate([rows, rows]) if lone else rows)
    return (out[:1] if lone else out).reshape(*x.shape[:-1], out.shape[-1])
