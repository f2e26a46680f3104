"""Blocks: a weight in GGUF's blocks, read from a file as they are or rounded here, and the product with it.

x is rounded to int8 with a scale for each 32 numbers, so numbers far above the rest make the steps
of their own group coarse and of no other. What a file has is not converted, and no weight is
rounded a second time. block_layout.py says how blocks lie.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from engine.model.native.library import target
from engine.model.ops import computes_in_c, over_rows
from engine.model.paths import leaf_paths
from engine.model.weights.block_layout import COLUMNS, GROUP, kind_name, kind_of, take_apart
from engine.model.weights.weight import TrainingForm, Weight

# the least and the largest that a weight is rounded to
INTEGER_RANGE = {"Q4_0": (-8, 7), "Q4_1": (0, 15), "Q8_0": (-127, 127)}
SMALLEST = np.finfo(np.float32).tiny  # a smaller scale's inverse could be infinite
LARGEST = 127
# the integer steps in a quarter of a block's range
QUARTER_STEPS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 64}


@functools.partial(jax.tree_util.register_dataclass, data_fields=["packed"], meta_fields=["columns", "axis"])
@dataclasses.dataclass(frozen=True)
class Blocks(Weight, TrainingForm):
    """packed (out / 16, in / inputs of a block, bytes of 16 blocks) uint8 or int8: a weight with
    `columns` outputs.

    `axis` 1: the matrix (in, out); 0: the embedding (V, D), its blocks along D, by whose transpose
    a tied head multiplies.
    """

    packed: Array
    columns: int
    axis: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        inputs = self.packed.shape[1] * kind_of(self.packed).inputs
        if self.axis == 0:
            return self.columns, inputs
        return inputs, self.columns

    @property
    def kind(self) -> str:
        return kind_name(self.packed)

    def dense(self, dtype: DTypeLike | None = None) -> Array:
        return dense_blocks(self)

    def times(self, x: Array, dtype: DTypeLike) -> Array:
        def multiply(rows: Array) -> Array:
            if self.fuses(rows):
                return self.times_fused(rows, dtype)
            return block_matmul_by_xla(rows, self, dtype)

        return over_rows(x, multiply)

    def cast(self, dtype: DTypeLike) -> "Blocks":
        return self

    def lookup(self, tokens: Array) -> Array:
        return lookup_blocks(self, tokens)

    @jax.jit
    def weight_of(self, trained: Array) -> Array:
        """Returns the matrix, float32, with trained factors, those of `factors_to_train`, in place of
        its own.
        """
        return dense_blocks(self, _round_factors(trained, self.kind))

    def fuses(self, x: Array) -> bool:
        return computes_in_c()

    def times_fused(
        self,
        x: Array,
        dtype: DTypeLike,
        gain: Array | None = None,
        eps: float = 0.0,
        pairs: tuple[Any, ...] = (),
    ) -> Array:
        rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        if gain is None:
            gain = jnp.zeros(0)
        else:
            gain = gain.astype(jnp.float32)
        shape = jax.ShapeDtypeStruct((len(rows), self.columns), jnp.float32)
        shapes = [shape]
        if pairs:
            shapes = [shape, shape]  # of the weight, and of its adapters
        kernel = jax.ffi.ffi_call(target("block_matmul"), shapes)
        parts = kernel(rows, self.packed, gain, np.float32(eps), *pairs)
        product = parts[0]
        if pairs:
            product = product + parts[1]
        return product.astype(dtype).reshape(*x.shape[:-1], -1)

    def beside(self, others: Sequence["Blocks"]) -> "Blocks | None":
        return join_blocks([self, *others])


def has_only_blocks(params: Any) -> bool:
    """Returns whether all matrices are Blocks. The kernel gives a row the same bits among any
    number of rows; XLA does not.
    """
    return all(isinstance(leaf, Blocks) or len(leaf.shape) < 2 for leaf in leaf_paths(params).values())


def served_kind(path: str, kind: str = "Q4_0") -> str:
    """Returns the kind that a matrix is rounded to where most become `kind`: embedding and head
    have 8 bits.

    Q4_1 takes a ninth more than Q4_0 and costs no less: 0.0025 bits per byte for 0.0012 (the
    default model after 300 steps).
    """
    if path in ("embed", "head"):
        return "Q8_0"
    return kind


@functools.partial(jax.jit, static_argnames=("kind", "axis"))
def round_to_blocks(weight: Array, kind: str, axis: int = 1) -> Blocks:
    """Returns the Blocks of a weight (in, out), or with `axis` 0 of an embedding (V, D), as
    `nearest` rounds it.
    """
    numbers, factors = nearest(weight, kind, axis)
    if axis:
        numbers = numbers.transpose(2, 0, 1)
        factors = [factor.transpose(2, 0, 1) for factor in factors]
    if kind == "Q8_0":
        numbers = numbers.astype(jnp.int8)
    else:
        low, high = jnp.split((numbers - INTEGER_RANGE[kind][0]).astype(jnp.uint8), 2, axis=-1)
        numbers = low | high << 4

    def pack(values: Array, together: int) -> Array:
        """values (out, groups, n) -> their bytes (out / 16, groups, 16 n), so many values of a
        column side by side.
        """
        bytes_together = together * values.dtype.itemsize
        data = jax.lax.bitcast_convert_type(values, jnp.uint8)
        data = data.reshape(*values.shape[:2], -1, bytes_together)
        padded = jnp.pad(data, ((0, -len(data) % COLUMNS), (0, 0), (0, 0), (0, 0)))
        strips = padded.reshape(-1, COLUMNS, *data.shape[1:])
        return strips.transpose(0, 2, 3, 1, 4).reshape(len(strips), data.shape[1], -1)

    packed = [pack(numbers, 4), *(pack(factor, 1) for factor in factors)]
    return Blocks(jnp.concatenate(packed, axis=-1), weight.shape[axis], axis)


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["kind", "axis"])
@dataclasses.dataclass(frozen=True)
class Rounding(TrainingForm):
    """Stands among the frozen weights where a weight trains that will be served in blocks:
    `paths.merge` rounds it.
    """

    kind: str
    axis: int

    @jax.jit
    def weight_of(self, trained: Array) -> Array:
        """Returns the numbers of a weight's Blocks, float32."""
        numbers, factors = nearest(trained, self.kind, self.axis)
        values = _times_factors(numbers, [factor.astype(jnp.float32) for factor in factors])
        return _straight_through(values.reshape(trained.shape), trained)

    def cast(self, dtype: DTypeLike) -> "Rounding":
        return self


def _straight_through(values: Array, x: Array) -> Array:
    """Returns the bits of `values` with the gradient of x (Bengio et al. 2013, 1308.3432)."""
    return jax.lax.stop_gradient(values) + (x - jax.lax.stop_gradient(x))


@jax.jit
def factors_to_train(weight: Blocks) -> Array:
    """Returns the numbers that train while the integers stay (Kim et al. 2023, 2305.14152):
    (out / 16, in / 32, 1 or 2, 16) float32.

    The first is a quarter of each block's range; in Q4_1 the second is half its center. A block's
    weights move by twice what these move, so the learning rate that is best for weights is best for
    them.
    """
    scale, *minimum = jnp.moveaxis(take_apart(weight.packed)[1], -2, 0)
    quarter = QUARTER_STEPS[weight.kind] * scale
    return jnp.stack([quarter, *(least / 2 + quarter for least in minimum)], axis=-2)


@jax.jit
def with_factors(weight: Blocks, trained: Array) -> Blocks:
    """Returns the weight with trained factors, those of `factors_to_train`, rounded to float16."""
    halves = _round_factors(trained, weight.kind).astype(jnp.float16)
    factors = jax.lax.bitcast_convert_type(halves, jnp.uint8)
    data = factors.reshape(*weight.packed.shape[:2], -1)
    return dataclasses.replace(weight, packed=weight.packed.at[..., -data.shape[2] :].set(data))


def _round_factors(trained: Array, kind: str) -> Array:
    """Returns scales and minima of float16 in float32, with the gradient of what is trained."""
    quarter, *center = jnp.moveaxis(trained, -2, 0)
    scale = _to_half(quarter / QUARTER_STEPS[kind])
    minimum = [_to_half(2 * (part - QUARTER_STEPS[kind] * scale)) for part in center]
    return jnp.stack([scale, *minimum], axis=-2)


def _to_half(x: Array) -> Array:
    """Returns x rounded to float16, in float32, with the gradient of x."""
    return _straight_through(x.astype(jnp.float16).astype(jnp.float32), x)


def nearest(weight: Array, kind: str, axis: int) -> tuple[Array, list[Array]]:
    """weight (in, out), or with `axis` 0 (V, D) -> integers float32, and a scale, in Q4_1 a minimum
    too, float16 each.

    Inputs become in / 32 blocks, which share a factor: (in / 32, 32, out) and (in / 32, 1, out). A
    block's largest magnitude becomes 127 in Q8_0 and -8 in Q4_0; in Q4_1 its least number becomes 0
    and its largest 15: llama.cpp's rule but for ties. A block that was rounded once stays as it is.
    A scale by least squares brings weights nearer to theirs, and the model's predictions no nearer
    (bench/results/tries/rounding.csv).
    """
    inputs = 1 - axis
    x = weight.astype(jnp.float32).reshape(*weight.shape[:inputs], -1, GROUP, *weight.shape[inputs + 1 :])
    low = x.min(axis=inputs + 1, keepdims=True)
    high = x.max(axis=inputs + 1, keepdims=True)
    minimum = []
    if kind == "Q4_1":
        minimum = [low.astype(jnp.float16)]
        x = x - minimum[0]
        scale = (high - minimum[0]) * (1 / 15)
    elif kind == "Q4_0":
        scale = jnp.where(high > -low, high, low) * (-1 / 8)
    else:
        scale = jnp.maximum(high, -low) * (1 / LARGEST)
    scale = jnp.where(scale == 0, 0, scale).astype(jnp.float16)  # and not -0
    steps = x * (1 / jnp.where(scale == 0, 1, scale).astype(jnp.float32))
    return jnp.clip(jnp.round(steps), *INTEGER_RANGE[kind]), [scale, *minimum]


def block_matmul_by_xla(x: Array, weight: Blocks, dtype: DTypeLike) -> Array:
    """x (M, in) -> x times the weight, (M, out) in `dtype`; with `axis` 0 times its transpose, x
    (M, D) -> (M, V).

    The kernel of native/ adds the same products in another order. A row of x with a number that is
    not finite gives NaN, and changes no other row. There is no gradient.
    """
    values = dense_blocks(dataclasses.replace(weight, axis=1))
    return jnp.dot(round_groups(x), values, precision=jax.lax.Precision.HIGHEST).astype(dtype)


def round_groups(x: Array) -> Array:
    """x (M, in) -> float32: each 32 numbers rounded to the 255 steps of their largest magnitude;
    NaN in rows not finite.
    """
    x = x.astype(jnp.float32)
    groups = x.reshape(len(x), -1, GROUP)
    scale = jnp.abs(groups).max(axis=-1, keepdims=True) * (1 / LARGEST)
    scale = jnp.where(scale < SMALLEST, 1, scale)
    rounded = (jnp.round(groups * (1 / scale)) * scale).reshape(x.shape)
    return jnp.where(jnp.isfinite(x).all(axis=-1, keepdims=True), rounded, jnp.nan)


def lookup_blocks(weight: Blocks, rows: Array) -> Array:
    """weight of axis 0 (V, D), rows (...) int32 -> those rows of the matrix, (..., D) float32."""
    flat = rows.reshape(-1)
    packed = weight.packed[flat // COLUMNS]  # the 16 columns among which each row is
    strips = dense_blocks(dataclasses.replace(weight, packed=packed, columns=COLUMNS * len(flat)))
    strips = strips.reshape(len(flat), COLUMNS, -1)
    return jnp.take_along_axis(strips, (flat % COLUMNS)[:, None, None], axis=1).reshape(*rows.shape, -1)


def join_blocks(weights: Sequence[Blocks]) -> Blocks | None:
    """Returns weights side by side; None where they are of several kinds or inputs, or where one
    before the last does not fill its last 16 columns.
    """
    kinds_and_inputs = {(weight.kind, weight.packed.shape[1]) for weight in weights}
    fills_columns = all(weight.columns % COLUMNS == 0 for weight in weights[:-1])
    if len(kinds_and_inputs) > 1 or not fills_columns:
        return None
    packed = jnp.concatenate([weight.packed for weight in weights])
    return dataclasses.replace(weights[0], packed=packed, columns=sum(weight.columns for weight in weights))


def dense_blocks(weight: Blocks, factors: Array | None = None) -> Array:
    """Returns the matrix, (in, out) or of `axis` 0 (V, D), float32; with other factors in the shape
    of `take_apart`.
    """
    numbers, own = take_apart(weight.packed)
    if factors is None:
        factors = own
    factors = jnp.moveaxis(factors, (2, 3), (0, 2))  # (1 or 2, out / 16, 16, inputs / those of a factor)
    columns = weight.packed.shape[0] * COLUMNS
    numbers = jnp.moveaxis(numbers, 3, 1).reshape(columns, factors.shape[3], -1)[: weight.columns]
    factors = factors.reshape(len(factors), columns, -1, 1)[:, : weight.columns]
    if weight.axis:  # before the product, whose gradient need not be transposed
        numbers = numbers.transpose(1, 2, 0)
        factors = factors.transpose(0, 2, 3, 1)
    return _times_factors(numbers, factors).reshape(weight.shape)


def _times_factors(numbers: Array, factors: Sequence[Array] | Array) -> Array:
    """Returns numbers times the first factor, the scale, and where there is a second, a minimum, that
    added.
    """
    values = numbers * factors[0]
    if len(factors) == 2:
        values = values + factors[1]
    return values
