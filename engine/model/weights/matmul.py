"""Multiplies by any kind of weight: an Array, an Int8 or Blocks, a LoRA on one of the first two, a StackedLoRA on any.

A plain Array is float32 in training and the compute dtype once it is frozen or loaded for inference.

Many rows are multiplied by a LoRA's merged weight. Unmerged, the pair would cost every row two thin products and two passes
over results as wide as the base's: on a CPU half as much again as the base's own product. Merging costs R operations a weight.
The backward pass still needs no gradient of the whole matrix: with W = base + scale a b and y = x W,

    dx = g W^T,    da = x^T (g (scale b)^T),    db = (x a)^T (scale g).

W is rounded to x's dtype, as in full training. The backward pass merges again, in a hundredth of the time of the products: all
merged weights together would be a second model.
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
from engine.model import backward
from engine.model.config import JOINED
from engine.model.layers import dot32, einsum32
from engine.model.ops import ops, transpose
from engine.model.paths import Params, leaf_paths, map_paths, unflatten
from engine.model.weights.blocks import (
    GROUP,
    Blocks,
    Rounding,
    block_matmul,
    factors_to_train,
    join_blocks,
    lookup_blocks,
    round_to_blocks,
    served_kind,
)
from engine.model.weights.int8 import Int8, int8_matmul, lookup_rows
from engine.model.weights.lora import LoRA, innermost_base, to_dense
from engine.model.weights.stacked_lora import StackedLoRA, adapter_product, fuses_norm_or_swiglu

Weight = Array | Int8 | Blocks | LoRA


def _product_with(weight: Any, otherwise: Any) -> Any:
    return int8_matmul if isinstance(weight, Int8) else block_matmul if isinstance(weight, Blocks) else otherwise


def project(x: Array, weight: Weight | StackedLoRA, dtype: DTypeLike) -> Array:
    """x (..., in), weight (in, out) -> (..., out) in `dtype`, multiplied in x's dtype, summed in float32."""
    if isinstance(weight, LoRA):
        if _is_merged(weight, x):
            return project_each(x, [weight], dtype)[0]
        whole = project(x, jax.lax.stop_gradient(weight.base), dtype)
        # Subtracted, because x - 0 is x to the bit, while -0 + 0 is 0.
        return whole - project(project(x, weight.a, x.dtype), weight.b * -weight.scale, dtype)
    if isinstance(weight, StackedLoRA):
        if fuses_norm_or_swiglu(x, weight):
            return multiply_by_kernel(x, weight, dtype)
        return (project(x, weight.base, jnp.float32) + adapter_product(x, weight)).astype(dtype)
    multiply = _product_with(weight, backward.matmul)
    return _over_rows(x, lambda rows: multiply(rows, weight, dtype))


def norm_and_project(x: Array, gain: Array, weights: Sequence[Weight], eps: float, dtype: DTypeLike) -> tuple[Array, ...]:
    """x (..., in), gain (in,), each weight (in, out) -> x normalised times each weight, (..., out) in `dtype`.

    Weights that are converted for the product take the gain with them: its gradient is then a sum over the weights and not over
    all tokens, 3% of a training step of 6 layers by 384 on a CPU.
    """
    if all(fuses_norm_or_swiglu(x, weight) for weight in weights):
        return tuple(multiply_by_kernel(x, weight, dtype, gain=gain, eps=eps) for weight in weights)
    plain = [weight for weight in weights if isinstance(weight, Array) and weight.dtype != dtype]
    if len(plain) == len(weights) and _are_smaller(plain, x):
        return project_each(backward.rms_norm(x, None, eps, dtype), [weight * gain[:, None] for weight in plain], dtype)
    return project_each(backward.rms_norm(x, gain, eps, dtype), weights, dtype)


def swiglu_and_project(gate: Array, up: Array, weight: Weight, dtype: DTypeLike) -> Array:
    """gate, up (..., in), weight (in, out) -> silu(gate) * up in `dtype`, times the weight, (..., out) float32."""
    if fuses_norm_or_swiglu(gate, weight):
        return multiply_by_kernel(jnp.concatenate([gate, up], axis=-1), weight, jnp.float32)
    return project(layout.shard_columns(backward.swiglu(gate, up, dtype)), weight, jnp.float32)


def multiply_by_kernel(x: Array, weight: Any, dtype: DTypeLike, **before: Any) -> Array:
    """x (..., in), weight (in, out), Blocks with adapters or without -> (..., out); `before` as in `block_matmul`."""
    base, pairs = (weight.base, weight.pairs) if isinstance(weight, StackedLoRA) else (weight, ())
    out = block_matmul(x.reshape(-1, x.shape[-1]), base, dtype, pairs, **before)
    return out.reshape(*x.shape[:-1], -1)


def _are_smaller(weights: Sequence[Any], x: Array) -> bool:
    """Whether a device multiplies more numbers of x than of all the weights."""
    return x.size // layout.row_shards() > sum(weight.size for weight in weights) // layout.column_shards()


def project_each(x: Array, weights: Sequence[Weight], dtype: DTypeLike) -> tuple[Array, ...]:
    """x (..., in), each weight (in, out) -> each product (..., out), as `project`; going back, their dx add up in float32."""
    rows = x if isinstance(weights[0], StackedLoRA) else x.reshape(-1, x.shape[-1])  # whose rows have adapters of their own
    if all(isinstance(weight, Array) for weight in weights):
        together = _are_smaller(weights, x)
    else:
        together = any(isinstance(weight, LoRA) for weight in weights) and all(_is_merged(weight, x) for weight in weights)
    if together:
        parts = _multiply_whole(rows, tuple(weights), dtype)
    else:  # all read the same rows, which a scan's backward pass then keeps once
        parts = tuple(project(rows, weight, dtype) for weight in weights)
    return tuple(part.reshape(*x.shape[:-1], -1) for part in parts)


def join_projections(block: Params) -> Params:
    """Returns a block for inference on one device, in which the weights of `JOINED` that are of one kind lie side by side."""
    for name, parts in JOINED.items():
        weights = [block[part] for part in parts if part in block]  # none where they are joined already
        joined: Any = None
        if weights and all(isinstance(weight, Blocks) for weight in weights):
            joined = join_blocks(weights)
        elif len({jax.tree.structure(weight) for weight in weights}) == 1:
            joined = jax.tree.map(
                lambda *arrays: (np if isinstance(arrays[0], np.ndarray) else jnp).concatenate(arrays, axis=-1), *weights
            )
        if joined is not None:
            block = {path: leaf for path, leaf in block.items() if path not in parts} | {name: joined}
    return block


def unembed(x: Array, embed: Array | Int8 | Blocks, dtype: DTypeLike) -> Array:
    """x (..., D), embed (V, D) -> (..., V) in `dtype`: the tied head, x times the embedding's transpose."""
    multiply = _product_with(embed, backward.matmul_rows)
    return _over_rows(x, lambda rows: multiply(rows, embed, dtype))


def lookup(embed: Array | Int8 | Blocks, tokens: Array) -> Array:
    """embed (V, D), tokens (...) int32 -> (..., D) float32."""
    if isinstance(embed, Int8):
        return lookup_rows(embed, tokens)
    if isinstance(embed, Blocks):
        return lookup_blocks(embed, tokens)
    return backward.lookup(embed, tokens).astype(jnp.float32)


def cast_matrices(params: Params, dtype: DTypeLike) -> Params:
    """Returns params with every plain matrix in `dtype`, adapters too. Gains, biases, Int8, Blocks and Roundings stay."""

    def cast(_: str, leaf: Any) -> Any:
        if isinstance(leaf, LoRA):
            base = None if leaf.base is None else cast("", leaf.base)
            return dataclasses.replace(leaf, base=base, a=leaf.a.astype(dtype), b=leaf.b.astype(dtype))
        return leaf.astype(dtype) if not isinstance(leaf, Int8 | Blocks | Rounding) and leaf.ndim >= 2 else leaf

    return map_paths(cast, params)


def matrices_to_blocks(params: Params, kind: str = "Q4_0") -> Params:
    """Returns params with every matrix rounded to the `served_kind` of it, after its adapters are merged in float32.

    Blocks stay, and so does a matrix whose inputs are no multiple of 32.
    """

    def convert(path: str, leaf: Any) -> Any:
        rounding = None if isinstance(leaf, Blocks) else _rounding(path, leaf, kind)
        return round_to_blocks(to_dense(leaf, jnp.float32), rounding.kind, rounding.axis) if rounding else leaf

    return map_paths(convert, params)


def round_while_training(trainable: Params, frozen: Params) -> tuple[Params, Params]:
    """Returns what trains, of Blocks the factors, and frozen weights: merged they are the numbers of `matrices_to_blocks`."""
    trained, leaves = {}, leaf_paths(map_paths(lambda _, leaf: to_dense(leaf), matrices_to_blocks(frozen)))
    for path, leaf in leaf_paths(trainable).items():
        is_packed = isinstance(leaf, Blocks)
        trained[path] = factors_to_train(leaf) if is_packed else leaf
        leaves |= {path: rounding} if (rounding := leaf if is_packed else _rounding(path, leaf)) else {}
    return unflatten(trained), unflatten(leaves)


def _rounding(path: str, leaf: Any, kind: str = "Q4_0") -> Rounding | None:
    axis = int(path != "embed")
    return Rounding(served_kind(path, kind), axis) if len(leaf.shape) == 2 and leaf.shape[1 - axis] % GROUP == 0 else None


def weight_types(params: Params) -> str:
    """Returns the types of a model's matrices: `Q4_1, Q8_0` as in its file, int8, both, or else a dtype."""
    leaves = leaf_paths(params).values()
    kinds = sorted({leaf.kind for leaf in leaves if isinstance(leaf, Blocks)}) + ["int8"] * any(
        isinstance(leaf, Int8) for leaf in leaves
    )
    return ", ".join(kinds) or str(max(leaves, key=lambda leaf: leaf.ndim).dtype)


def _is_merged(weight: Weight, x: Array) -> bool:
    """Whether x is multiplied by the whole weight in x's dtype: where the weight is smaller than x, or, if it has a pair to
    merge, than x and the result; not where the base multiplies integers.
    """
    base, (rows, columns), share = innermost_base(weight), weight.shape, x.size // layout.row_shards()
    results = share // rows * columns if isinstance(weight, LoRA) else 0
    return share + results > rows * columns and not (isinstance(base, Int8) and base.activations != "full")


def _over_rows(x: Array, multiply) -> Array:
    """Folds the leading axes into rows; a lone row is doubled where a platform's product needs that."""
    rows = x.reshape(-1, x.shape[-1])
    lone = rows.shape[0] == 1 and ops().pads_lone_row
    out = multiply(jnp.concatenate([rows, rows]) if lone else rows)
    return (out[:1] if lone else out).reshape(*x.shape[:-1], out.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _multiply_whole(x: Array, weights: tuple[Weight, ...], dtype: DTypeLike) -> tuple[Array, ...]:
    """x (M, in) -> x times each weight, adapters merged, in `dtype`. An Int8, and what lies under a pair, gets no gradient."""
    return _forward(x, weights, dtype)[0]


def _merge(weight: Weight, dtype: DTypeLike) -> Array:
    """Returns the weight, base + scale a b added up in float32, in `dtype`."""
    if not isinstance(weight, LoRA):
        return to_dense(weight).astype(dtype)
    base = to_dense(weight.base)
    less = _dot(weight.a, (weight.b * -weight.scale).astype(dtype), dtype)  # subtracted as in `to_dense`
    return (base.astype(jnp.float32) - less.astype(jnp.float32)).astype(base.dtype).astype(dtype)


def _dot(x: Array, w: Array, dtype: DTypeLike) -> Array:
    return jnp.dot(x.astype(w.dtype), w, preferred_element_type=dtype)


def _after(weight: Weight, other: Array) -> tuple[Weight, Array]:
    """Returns both so that the weight is merged, and its pair multiplied, only once `other` is there.

    One weight at a time: a barrier keeps all that goes through it.
    """
    return jax.lax.optimization_barrier((weight, other)) if isinstance(weight, LoRA | Int8) else layout.regather(weight, other)


def _forward(x: Array, weights: tuple[Weight, ...], dtype: DTypeLike):
    products = []
    for weight in weights:
        rows = x
        merged = weight
        if isinstance(weight, LoRA | Int8):  # else XLA would first merge the weights of all layers
            merged, rows = _after(weight, x)
        products.append(_dot(rows, _merge(merged, x.dtype), dtype))
    return tuple(products), (x, weights)


def _backward(dtype: DTypeLike, residuals: tuple[Array, tuple[Weight, ...]], gs: tuple[Array, ...]):
    x, weights = residuals
    # Else XLA would keep what the forward pass merged, or the products of the pairs: a fifth to a third more memory for a step.
    ordered, gs = zip(*(_after(weight, g.astype(x.dtype)) for weight, g in zip(weights, gs)))
    dx, x_transposed = _input_gradient(gs, [_merge(weight, x.dtype) for weight in ordered]), transpose(x)
    pairs = [(weight, g) for weight, g in zip(weights, gs) if isinstance(weight, LoRA)]
    of_pairs = iter(_pair_gradients(x, pairs) if pairs else [])
    gradients: list[Any] = []
    for weight, g in zip(weights, gs):
        if isinstance(weight, LoRA):
            gradients.append(next(of_pairs))
        else:  # an Int8 is frozen
            gradients.append(None if isinstance(weight, Int8 | Blocks) else dot32(x_transposed, g).astype(weight.dtype))
    return dx, tuple(gradients)


def _pair_gradients(x: Array, pairs: list[tuple[LoRA, Array]]) -> list[LoRA]:
    """Returns da and db of each pair, given the gradient of its product. All a side by side: x is read once for each."""
    ends = np.cumsum([weight.rank for weight, _ in pairs])[:-1].tolist()
    inner = jnp.split(transpose(_dot(x, jnp.concatenate([weight.a for weight, _ in pairs], 1).astype(x.dtype), x.dtype)), ends)
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
    if layout.column_shards() > 1:
        gs, weights = ([layout.join(each, layout.column_shards(), axis=1)] for each in (gs, weights))
    if len(gs) == 1:
        return jnp.einsum("mf,df->md", gs[0], weights[0], preferred_element_type=gs[0].dtype)
    products = (einsum32("mf,df->md", g, w) for g, w in zip(gs, weights))
    return functools.reduce(operator.add, products).astype(gs[0].dtype)


_multiply_whole.defvjp(_forward, _backward)
