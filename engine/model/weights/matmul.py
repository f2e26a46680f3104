"""Multiplies by any kind of weight: an Array, an Int8, or a LoRA on either.

A plain Array is float32 in training and the compute dtype once it is frozen or loaded for inference. A new kind of weight
is a new leaf and a new case here.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from engine.mesh import layout
from engine.model import backward
from engine.model.ops import ops
from engine.model.paths import Params, map_paths
from engine.model.weights.int8 import Int8, int8_matmul, lookup_rows
from engine.model.weights.lora import LoRA, innermost_base, over_groups
from engine.model.weights.lora_matmul import Cuts, merged_matmul

Weight = Array | Int8 | LoRA


def project(x: Array, weight: Weight, dtype: DTypeLike) -> Array:
    """x (..., in), weight (in, out) -> (..., out) in `dtype`, multiplied in x's dtype, summed in float32."""
    if isinstance(weight, LoRA):
        return _project_lora(x, weight, dtype, ((0, weight.shape[1]),))[0]
    if isinstance(weight, Int8):
        return _over_rows(x, lambda rows: int8_matmul(rows, weight, dtype))
    return _over_rows(x, lambda rows: backward.matmul(rows, weight, dtype))


def norm_and_weight(x: Array, gain: Array, weight: Weight, eps: float, dtype: DTypeLike) -> tuple[Array, Weight]:
    """x (..., in), gain (in,), weight (in, out) -> x normalised, in `dtype`, and the weight to multiply it with.

    A weight that is converted for the product takes the gain with it: the gain's gradient is then a sum over the
    weight and not one over all tokens, 3% of a training step of 6 layers by 384 on a CPU.
    """
    if isinstance(weight, Array) and weight.dtype != dtype and _is_smaller(weight, x):
        return backward.rms_norm(x, None, eps, dtype), weight * gain[:, None]
    return backward.rms_norm(x, gain, eps, dtype), weight


def _is_smaller(weight: Array, x: Array) -> bool:
    """Whether a device multiplies more numbers of x than of the weight."""
    return x.size // layout.row_shards() > weight.size // layout.column_shards()


def project_two(x: Array, weight: Weight, dtype: DTypeLike) -> tuple[Array, Array]:
    """x (..., in), weight (in, 2F) -> the two halves of the product, (..., F) each in `dtype`."""
    half = weight.shape[1] // 2
    if isinstance(weight, LoRA):
        left, right = _project_lora(x, weight, dtype, ((0, half), (half, 2 * half)))
        return left, right
    if not isinstance(weight, Int8) and _is_smaller(weight, x):
        left, right = backward.matmul_two(x.reshape(-1, x.shape[-1]), weight, dtype)
        return left.reshape(*x.shape[:-1], -1), right.reshape(*x.shape[:-1], -1)
    left, right = layout.split_columns(project(x, weight, dtype), [half, half])
    return left, right


def unembed(x: Array, embed: Array | Int8, dtype: DTypeLike) -> Array:
    """x (..., D), embed (V, D) -> (..., V) in `dtype`: the tied head, x times the embedding's transpose."""
    if isinstance(embed, Int8):
        return project(x, embed, dtype)
    return _over_rows(x, lambda rows: backward.matmul_rows(rows, embed, dtype))


def lookup(embed: Array | Int8, tokens: Array) -> Array:
    """embed (V, D), tokens (...) int32 -> (..., D) float32."""
    if isinstance(embed, Int8):
        return lookup_rows(embed, tokens)
    return backward.lookup(embed, tokens).astype(jnp.float32)


def cast_matrices(params: Params, dtype: DTypeLike) -> Params:
    """Returns params with every plain matrix in `dtype`, adapters too. Gains, biases and Int8 stay."""

    def cast(_: str, leaf: Any) -> Any:
        if isinstance(leaf, LoRA):
            base = None if leaf.base is None else cast("", leaf.base)
            return dataclasses.replace(leaf, base=base, a=leaf.a.astype(dtype), b=leaf.b.astype(dtype))
        return leaf.astype(dtype) if not isinstance(leaf, Int8) and leaf.ndim >= 2 else leaf

    return map_paths(cast, params)


def _project_lora(x: Array, weight: LoRA, dtype: DTypeLike, cuts: Cuts) -> tuple[Array, ...]:
    """Returns x (base + scale a b), cut by columns into one array for each (start, stop) of `cuts`.

    The pair is merged first where the weight has fewer numbers than x and the result, unless the base multiplies integers.
    """
    if (groups := weight.groups) > 1:
        shares = tuple((start // groups, stop // groups) for start, stop in cuts)
        return over_groups(lambda one: _project_lora(x, one, dtype, shares), weight)
    rows, columns = weight.shape
    base, share = innermost_base(weight), x.size // layout.row_shards()
    if share + share // rows * columns > rows * columns and not (isinstance(base, Int8) and base.activations != "full"):
        parts = merged_matmul(x.reshape(-1, rows), weight, dtype, cuts)
        return tuple(part.reshape(*x.shape[:-1], -1) for part in parts)
    whole = project(x, jax.lax.stop_gradient(weight.base), dtype)
    inner = project(x, weight.a, x.dtype)
    pieces, done = [], 0
    for place, part in enumerate(weight.parts()):
        added = project(inner[..., place * weight.rank : (place + 1) * weight.rank], part.b * -weight.scale, dtype)
        # Subtracted, because x - 0 is x to the bit, while -0 + 0 is 0.
        pieces += [whole[..., done : part.start], whole[..., part.start : part.stop] - added]
        done = part.stop
    whole = jnp.concatenate([*pieces, whole[..., done:]], axis=-1)
    return tuple(whole[..., start:stop] for start, stop in cuts)


def _over_rows(x: Array, multiply) -> Array:
    """Folds the leading axes into rows; a lone row is doubled where a platform's product needs that."""
    rows = x.reshape(-1, x.shape[-1])
    lone = rows.shape[0] == 1 and ops().pads_lone_row
    out = multiply(jnp.concatenate([rows, rows]) if lone else rows)
    return (out[:1] if lone else out).reshape(*x.shape[:-1], out.shape[-1])
