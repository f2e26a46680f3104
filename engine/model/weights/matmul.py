"""Multiplies by any kind of weight, alone or after the norm or SwiGLU before it, and prepares weights for that."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from engine.mesh import layout
from engine.model import backward
from engine.model.config import JOINED
from engine.model.paths import Params, leaf_paths, map_paths, unflatten
from engine.model.weights.blocks import GROUP, Blocks, Rounding, factors_to_train, round_to_blocks, served_kind
from engine.model.weights.lora import LoRA
from engine.model.weights.merged_product import is_merged, multiply_merged
from engine.model.weights.plain import as_weight
from engine.model.weights.weight import Weight


def project(x: Array, weight: Any, dtype: DTypeLike) -> Array:
    """x (..., in), weight (in, out) -> (..., out) in `dtype`, multiplied in x's dtype, summed in float32."""
    if isinstance(weight, LoRA) and is_merged(weight, x):
        return project_each(x, [weight], dtype)[0]
    return as_weight(weight).times(x, dtype)


def norm_and_project(x: Array, gain: Array, weights: Sequence[Any], eps: float, dtype: DTypeLike) -> tuple[Array, ...]:
    """x (..., in), gain (in,), each weight (in, out) -> x normalised times each weight, (..., out) in `dtype`.

    Weights that are converted for the product take the gain with them: its gradient is then a sum
    over the weights and not over all tokens, 3% of a training step of 6 layers by 384 on a CPU.
    """
    if all(as_weight(weight).fuses(x) for weight in weights):
        return tuple(weight.times_fused(x, dtype, gain, eps) for weight in weights)
    plain = [weight for weight in weights if isinstance(weight, Array) and weight.dtype != dtype]
    if len(plain) == len(weights) and _are_smaller(plain, x):
        return project_each(backward.rms_norm(x, None, eps, dtype), [weight * gain[:, None] for weight in plain], dtype)
    return project_each(backward.rms_norm(x, gain, eps, dtype), weights, dtype)


def swiglu_and_project(gate: Array, up: Array, weight: Any, dtype: DTypeLike) -> Array:
    """gate, up (..., in), weight (in, out) -> silu(gate) * up in `dtype`, times the weight, (..., out) float32."""
    if as_weight(weight).fuses(gate):
        return weight.times_fused(jnp.concatenate([gate, up], axis=-1), jnp.float32)
    return project(layout.shard_columns(backward.swiglu(gate, up, dtype)), weight, jnp.float32)


def _are_smaller(weights: Sequence[Any], x: Array) -> bool:
    """Whether a device multiplies more numbers of x than of all the weights."""
    return x.size // layout.row_shards() > sum(weight.size for weight in weights) // layout.column_shards()


def project_each(x: Array, weights: Sequence[Any], dtype: DTypeLike) -> tuple[Array, ...]:
    """x (..., in), each weight (in, out) -> each product (..., out), as `project`; going back, their dx add up in float32."""
    rows = x
    if not as_weight(weights[0]).rows_differ:
        rows = x.reshape(-1, x.shape[-1])
    if all(isinstance(weight, Array) for weight in weights):
        together = _are_smaller(weights, x)
    else:
        together = any(isinstance(weight, LoRA) for weight in weights) and all(is_merged(weight, x) for weight in weights)
    if together:
        parts = multiply_merged(rows, tuple(weights), dtype)
    else:  # all read the same rows, which a scan's backward pass then keeps once
        parts = tuple(project(rows, weight, dtype) for weight in weights)
    return tuple(part.reshape(*x.shape[:-1], -1) for part in parts)


def join_projections(block: Params) -> Params:
    """Returns a block for inference on one device, in which the weights of `JOINED` that are of one kind lie side by side."""
    for name, parts in JOINED.items():
        weights = [as_weight(block[part]) for part in parts if part in block]  # none where they are joined already
        if len({type(weight) for weight in weights}) != 1:
            continue
        joined = weights[0].beside(weights[1:])
        if joined is not None:
            block = {path: leaf for path, leaf in block.items() if path not in parts} | {name: joined}
    return block


def lookup(embed: Any, tokens: Array) -> Array:
    """embed (V, D), tokens (...) int32 -> (..., D) float32."""
    return as_weight(embed, axis=0).lookup(tokens)


def cast_matrices(params: Params, dtype: DTypeLike) -> Params:
    """Returns params with every plain matrix in `dtype`, adapters too. Gains, biases, Int8, Blocks and Roundings stay."""
    return unflatten({path: as_weight(leaf).cast(dtype) for path, leaf in leaf_paths(params).items()})


def matrices_to_blocks(params: Params, kind: str = "Q4_0") -> Params:
    """Returns params with every matrix rounded to the `served_kind` of it, after its adapters are merged in float32.

    Blocks stay, and so does a matrix whose inputs are no multiple of 32.
    """

    def convert(path: str, leaf: Any) -> Any:
        rounding = _rounding(path, leaf, kind)
        if rounding is None or isinstance(leaf, Blocks):
            return leaf
        return round_to_blocks(as_weight(leaf).dense(jnp.float32), rounding.kind, rounding.axis)

    return map_paths(convert, params)


def round_while_training(trainable: Params, frozen: Params) -> tuple[Params, Params]:
    """Returns what trains, of Blocks the factors, and frozen weights: merged they are the numbers of `matrices_to_blocks`."""
    trained: dict[str, Any] = {}
    forms = {path: as_weight(leaf).dense() for path, leaf in leaf_paths(matrices_to_blocks(frozen)).items()}
    for path, leaf in leaf_paths(trainable).items():
        if isinstance(leaf, Blocks):
            trained[path] = factors_to_train(leaf)
            forms[path] = leaf
            continue
        trained[path] = leaf
        rounding = _rounding(path, leaf)
        if rounding is not None:
            forms[path] = rounding
    return unflatten(trained), unflatten(forms)


def _rounding(path: str, leaf: Any, kind: str = "Q4_0") -> Rounding | None:
    """Returns how a matrix is rounded to blocks; None for gains, and where a column's inputs are no whole number of blocks."""
    axis = int(path != "embed")
    if len(leaf.shape) != 2 or leaf.shape[1 - axis] % GROUP:
        return None
    return Rounding(served_kind(path, kind), axis)


def weight_types(params: Params) -> str:
    """Returns the types of a model's matrices: `Q4_1, Q8_0` as in its file, int8, both, or else a dtype."""
    leaves = leaf_paths(params).values()
    kinds = {leaf.kind for leaf in leaves if isinstance(leaf, Weight)}
    if kinds:
        return ", ".join(sorted(kinds))
    return str(max(leaves, key=lambda leaf: leaf.ndim).dtype)
