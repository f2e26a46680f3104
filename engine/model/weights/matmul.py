"""What a weight can be, and the one place that multiplies by any of them: an Array, an Int8, or a LoRA on either.

A plain Array is float32 in training and the compute dtype once it is frozen or loaded for inference. A new kind of weight
is a new leaf and a new case here; the text of the model stays the same.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from engine.model import backward
from engine.model.backend import on_cpu
from engine.model.paths import map_paths
from engine.model.weights.int8 import Int8, dequantize, int8_matmul
from engine.model.weights.lora import LoRA, innermost_base, merge_weight
from engine.model.weights.lora_matmul import merged_matmul

Weight = Array | Int8 | LoRA


def project(x: Array, weight: Weight, dtype: DTypeLike, gain: Array | None = None) -> Array:
    """x (..., in), weight (in, out) -> (..., out) in `dtype`: (gain * x) weight, multiplied in x's dtype, summed in float32.

    `gain` (in,) is the norm's. While training on a CPU it scales the weight's rows instead of the far more numerous
    rows of x, which is the same product.
    """
    if isinstance(weight, LoRA):
        return _adapted(x, weight, dtype, gain, ((0, weight.shape[1]),))[0]
    if isinstance(weight, Int8):
        x = x if gain is None else x * gain.astype(x.dtype)
        return _over_rows(x, lambda rows: int8_matmul(rows, weight, dtype))
    if gain is not None:
        x, weight = _gained(x, weight, gain[:, None], gain)
    multiply = backward.matmul if on_cpu() else _plain
    return _over_rows(x, lambda rows: multiply(rows, weight, dtype))


def project_two(x: Array, weight: Weight, dtype: DTypeLike, gain: Array) -> tuple[Array, Array]:
    """x (..., in), weight (in, 2F), gain (in,) -> the two halves of the product, (..., F) each.

    Many rows on a CPU make two products: nothing then has to be cut or joined on the way back.
    """
    half = weight.shape[1] // 2
    if isinstance(weight, LoRA):
        one, two = _adapted(x, weight, dtype, gain, ((0, half), (half, 2 * half)))
        return one, two
    if _gain_on_weight(x, weight):
        x, weight = _gained(x, weight, gain[:, None], gain)
        one, two = backward.matmul_two(x.reshape(-1, x.shape[-1]), weight, dtype)
        return one.reshape(*x.shape[:-1], -1), two.reshape(*x.shape[:-1], -1)
    one, two = jnp.split(project(x, weight, dtype, gain), 2, axis=-1)
    return one, two


def unembed(x: Array, embed: Array | Int8, dtype: DTypeLike, gain: Array) -> Array:
    """x (..., D), embed (V, D), gain (D,) -> (..., V): the tied head, which multiplies by the embedding's other side."""
    if isinstance(embed, Int8):
        return project(x, embed, dtype, gain)
    x, embed = _gained(x, embed, gain, gain)
    multiply = backward.matmul_rows if on_cpu() else _plain_rows
    return _over_rows(x, lambda rows: multiply(rows, embed, dtype))


def lookup(embed: Array | Int8, tokens: Array) -> Array:
    """embed (V, D), tokens (...) int32 -> (..., D) float32."""
    if isinstance(embed, Int8):
        return embed.values[tokens].astype(jnp.float32) * embed.scale[tokens][..., None]
    rows = backward.lookup(embed, tokens) if on_cpu() else embed[tokens]
    return rows.astype(jnp.float32)


def dense(weight: Weight) -> Array:
    """The one matrix that a leaf stands for: a pair folded into its base, whole numbers times their scale."""
    if isinstance(weight, LoRA):
        return merge_weight(weight)
    return dequantize(weight) if isinstance(weight, Int8) else weight


def cast_matrices(params: dict[str, Any], dtype: DTypeLike) -> dict[str, Any]:
    """params with every plain matrix in `dtype`: how weights lie that nobody changes. Gains, biases and Int8 stay."""

    def cast(_: str, leaf: Any) -> Any:
        if isinstance(leaf, LoRA):
            base = None if leaf.base is None else cast("", leaf.base)
            return LoRA(base, leaf.a.astype(dtype), leaf.b.astype(dtype), leaf.scale, leaf.columns)
        return leaf.astype(dtype) if not isinstance(leaf, Int8) and leaf.ndim >= 2 else leaf

    return map_paths(cast, params)


def _adapted(x: Array, weight: LoRA, dtype: DTypeLike, gain: Array | None, cuts: Any) -> tuple[Array, ...]:
    """(gain x) (base + scale a b), cut by columns into one array for each (start, stop) of `cuts`.

    The pair is folded into the base first where that moves fewer numbers than x and the result hold. Otherwise it stays
    beside the base, as it must where the base multiplies whole numbers.
    """
    rows, columns = weight.shape
    results = x.size // rows * columns
    root = innermost_base(weight)
    if x.size + results > weight.size and not (isinstance(root, Int8) and root.activations != "full"):
        if gain is not None and not _gain_on_weight(x, weight):
            x, gain = x * gain.astype(x.dtype), None
        parts = merged_matmul(x.reshape(-1, rows), weight, gain, dtype, cuts)
        return tuple(part.reshape(*x.shape[:-1], -1) for part in parts)
    whole = project(x, jax.lax.stop_gradient(weight.base), dtype, gain)
    inner = project(x, weight.a, x.dtype, gain)
    pieces, done = [], 0
    for place, pair in enumerate(weight.parts()):
        mine = inner[..., place * weight.rank : (place + 1) * weight.rank]
        added = project(mine, pair.b * -weight.scale, dtype)
        # Subtracted, because x - 0 is x to the bit, while -0 + 0 is 0.
        pieces += [whole[..., done : pair.start], whole[..., pair.start : pair.stop] - added]
        done = pair.stop
    whole = jnp.concatenate([*pieces, whole[..., done:]], axis=-1)
    return tuple(whole[..., start:stop] for start, stop in cuts)


def _gain_on_weight(x: Array, weight: Weight) -> bool:
    """Whether a norm's gain scales the weight rather than x: while training on a CPU, where x has more rows."""
    return on_cpu() and x.size > weight.size and not isinstance(innermost_base(weight), Int8)


def _gained(x: Array, weight: Any, on_weight: Array, gain: Array) -> tuple[Array, Array]:
    if _gain_on_weight(x, weight):
        return x, (weight.astype(jnp.float32) * on_weight).astype(weight.dtype)
    return x * gain.astype(x.dtype), weight


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
