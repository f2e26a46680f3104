"""Multiplies by any kind of weight: an Array, an Int8, or a LoRA on either.

A plain Array is float32 in training and the compute dtype once it is frozen or loaded for inference. `engine/README.md`
lists the other files that know the kinds.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from engine.mesh import layout
from engine.model import backward
from engine.model.config import JOINED
from engine.model.ops import ops
from engine.model.paths import Params, map_paths
from engine.model.weights.int8 import Int8, int8_matmul, lookup_rows
from engine.model.weights.lora import LoRA, innermost_base, merged_matmul

Weight = Array | Int8 | LoRA


def project(x: Array, weight: Weight, dtype: DTypeLike) -> Array:
    """x (..., in), weight (in, out) -> (..., out) in `dtype`, multiplied in x's dtype, summed in float32."""
    if isinstance(weight, LoRA):
        return _project_lora(x, weight, dtype)
    if isinstance(weight, Int8):
        return _over_rows(x, lambda rows: int8_matmul(rows, weight, dtype))
    return _over_rows(x, lambda rows: backward.matmul(rows, weight, dtype))


def norm_and_project(x: Array, gain: Array, weights: Sequence[Weight], eps: float, dtype: DTypeLike) -> tuple[Array, ...]:
    """x (..., in), gain (in,), each weight (in, out) -> x normalised times each weight, (..., out) in `dtype`.

    Weights that are converted for the product take the gain with them: the gain's gradient is then a sum over the
    weights and not one over all tokens, 3% of a training step of 6 layers by 384 on a CPU.
    """
    plain = [weight for weight in weights if isinstance(weight, Array) and weight.dtype != dtype]
    if len(plain) == len(weights) and _are_smaller(plain, x):
        return project_each(backward.rms_norm(x, None, eps, dtype), [weight * gain[:, None] for weight in plain], dtype)
    return project_each(backward.rms_norm(x, gain, eps, dtype), weights, dtype)


def _are_smaller(weights: Sequence[Array], x: Array) -> bool:
    """Whether a device multiplies more numbers of x than of all the weights."""
    return x.size // layout.row_shards() > sum(weight.size for weight in weights) // layout.column_shards()


def project_each(x: Array, weights: Sequence[Weight], dtype: DTypeLike) -> tuple[Array, ...]:
    """x (..., in), each weight (in, out) -> each product (..., out), as `project`; going back, their dx add up in float32."""
    rows = x.reshape(-1, x.shape[-1])
    plain = tuple(weight for weight in weights if isinstance(weight, Array))
    if len(plain) == len(weights) and _are_smaller(plain, x):
        parts = backward.matmul_each(rows, plain, dtype)
    elif any(isinstance(weight, LoRA) for weight in weights) and all(_is_merged(weight, x) for weight in weights):
        parts = merged_matmul(rows, tuple(weights), dtype)
    else:  # all read the same rows, which a scan's backward pass then keeps once
        parts = tuple(project(rows, weight, dtype) for weight in weights)
    return tuple(part.reshape(*x.shape[:-1], -1) for part in parts)


def join_projections(block: Params) -> Params:
    """Returns a block for inference on one device, in which the weights of `JOINED` that are of one kind lie side by side.

    One product then reads x once.
    """
    for name, parts in JOINED.items():
        weights = [block[part] for part in parts if part in block]  # none where they are joined already
        if len({jax.tree.structure(weight) for weight in weights}) == 1:
            joined = jax.tree.map(lambda *arrays: jnp.concatenate(arrays, axis=-1), *weights)
            block = {path: leaf for path, leaf in block.items() if path not in parts} | {name: joined}
    return block


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


def _is_merged(weight: Weight, x: Array) -> bool:
    """Whether x is multiplied by the whole weight in x's dtype: where the weight is smaller than x, or, if it has a pair to
    merge, than x and the result; not where the base multiplies integers."""
    base, (rows, columns), share = innermost_base(weight), weight.shape, x.size // layout.row_shards()
    results = share // rows * columns if isinstance(weight, LoRA) else 0
    return share + results > rows * columns and not (isinstance(base, Int8) and base.activations != "full")


def _project_lora(x: Array, weight: LoRA, dtype: DTypeLike) -> Array:
    """Returns x (base + scale a b)."""
    if _is_merged(weight, x):
        return project_each(x, [weight], dtype)[0]
    whole = project(x, jax.lax.stop_gradient(weight.base), dtype)
    # Subtracted, because x - 0 is x to the bit, while -0 + 0 is 0.
    return whole - project(project(x, weight.a, x.dtype), weight.b * -weight.scale, dtype)


def _over_rows(x: Array, multiply) -> Array:
    """Folds the leading axes into rows; a lone row is doubled where a platform's product needs that."""
    rows = x.reshape(-1, x.shape[-1])
    lone = rows.shape[0] == 1 and ops().pads_lone_row
    out = multiply(jnp.concatenate([rows, rows]) if lone else rows)
    return (out[:1] if lone else out).reshape(*x.shape[:-1], out.shape[-1])
