"""Multiplies by any kind of weight, alone or after the norm or SwiGLU before it."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from engine.mesh import layout
from engine.model import backward
from engine.model.weights.lora import LoRA
from engine.model.weights.merged_product import is_merged, multiply_merged
from engine.model.weights.plain import as_weight


def project(x: Array, weight: Any, dtype: DTypeLike) -> Array:
    """x (..., in), weight (in, out) -> (..., out) in `dtype`, multiplied in x's dtype, summed in float32."""
    if isinstance(weight, LoRA) and is_merged(weight, x):
        return project_each(x, [weight], dtype)[0]
    return as_weight(weight).times(x, dtype)


def norm_and_project(
    x: Array, gain: Array, weights: Sequence[Any], eps: float, dtype: DTypeLike
) -> tuple[Array, ...]:
    """x (..., in), gain (in,), each weight (in, out) -> x normalised times each weight, (..., out)
    in `dtype`.

    Weights that are converted for the product take the gain with them: its gradient is then a sum
    over the weights and not over all tokens, 3% of a training step of 6 layers by 384 on a CPU.
    """
    if all(as_weight(weight).fuses(x) for weight in weights):
        return tuple(weight.times_fused(x, dtype, gain, eps) for weight in weights)
    plain = [weight for weight in weights if isinstance(weight, Array) and weight.dtype != dtype]
    if len(plain) == len(weights) and _are_smaller(plain, x):
        return project_each(
            backward.rms_norm(x, None, eps, dtype), [weight * gain[:, None] for weight in plain], dtype
        )
    return project_each(backward.rms_norm(x, gain, eps, dtype), weights, dtype)


def swiglu_and_project(gate: Array, up: Array, weight: Any, dtype: DTypeLike) -> Array:
    """gate, up (..., in), weight (in, out) -> silu(gate) * up in `dtype`, times the weight, (...,
    out) float32.
    """
    if as_weight(weight).fuses(gate):
        return weight.times_fused(jnp.concatenate([gate, up], axis=-1), jnp.float32)
    return project(layout.shard_columns(backward.swiglu(gate, up, dtype)), weight, jnp.float32)


def _are_smaller(weights: Sequence[Any], x: Array) -> bool:
    """Whether a device multiplies more numbers of x than of all the weights."""
    return x.size // layout.row_shards() > sum(weight.size for weight in weights) // layout.column_shards()


def project_each(x: Array, weights: Sequence[Any], dtype: DTypeLike) -> tuple[Array, ...]:
    """x (..., in), each weight (in, out) -> each product (..., out), as `project`; going back,
    their dx add up in float32.
    """
    rows = x
    if not as_weight(weights[0]).rows_differ:
        rows = x.reshape(-1, x.shape[-1])
    if all(isinstance(weight, Array) for weight in weights):
        together = _are_smaller(weights, x)
    else:
        together = any(isinstance(weight, LoRA) for weight in weights) and all(
            is_merged(weight, x) for weight in weights
        )
    if together:
        parts = multiply_merged(rows, tuple(weights), dtype)
    else:  # all read the same rows, which a scan's backward pass then keeps once
        parts = tuple(project(rows, weight, dtype) for weight in weights)
    return tuple(part.reshape(*x.shape[:-1], -1) for part in parts)


def lookup(embed: Any, tokens: Array) -> Array:
    """embed (V, D), tokens (...) int32 -> (..., D) float32."""
    return as_weight(embed, axis=0).lookup(tokens)
