"""Int8: a weight as integers from -127 to 127 and one scale a column, and the products with it, which XLA makes.

It is a frozen base in training, and what inference has where no kernel in C multiplies `blocks`: on
accelerators and meshes. `activations` says how x is multiplied:

- "int8" (W8A8) rounds each row of x to int8 and multiplies integers, exactly, in int32. It has no
  gradient.
- "int16" rounds x to two such digits, 15 bits, for twice the products and the same reading of the
  weight: for rows in which 1/127 of the largest number is too coarse a step for the rest.
- "full" converts the weight inside the program and leaves x as it is; the gradient passes to x.
  That is the frozen base under an adapter (QLoRA: Dettmers et al. 2023, 2305.14314).
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from engine.errors import UserError
from engine.mesh import layout
from engine.mesh.rules import tensor_axes
from engine.model.config import JOINED, MATRICES
from engine.model.ops import over_rows
from engine.model.paths import Params, map_paths
from engine.model.weights.blocks import Blocks
from engine.model.weights.weight import Weight

Activations = Literal["int8", "int16", "full"]
DIGIT_STEPS = 254  # steps of the second digit of x in one step of the first
FEW_ROWS = 16  # the most rows of x for which a product takes no longer than reading the weight
# A weight of more columns is a head: transposing its result costs more than packing the weight.
HEAD_COLUMNS = 8192
LARGEST = 127  # -128 is not used, so that a weight and its negative are rounded alike


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "scale"],
    meta_fields=["activations", "axis", "transposed", "gathered"],
)
@dataclasses.dataclass(frozen=True)
class Int8(Weight):
    """values (in, out) int8, scale (out,) float32: the weight is values * scale.

    The scale runs along `axis`: 1, a scale a column; 0, a scale a row, for the embedding (V, D), by
    whose transpose a tied head multiplies. With `transposed` values lie as (out, in); shape, matrix
    and bits are the same. `gathered`: the axes of a mesh that still cut the values where "full"
    reads them, so that integers are exchanged.
    """

    values: Array
    scale: Array
    activations: Activations = "int8"
    axis: int = 1
    transposed: bool = False
    gathered: P | None = None

    merges_late = True

    @property
    def shape(self) -> tuple[int, ...]:
        if self.transposed:
            return self.values.shape[::-1]
        return self.values.shape

    @property
    def contracting_axis(self) -> int:
        """The axis of `values` that a product sums over; it has no scale."""
        if self.transposed:
            return self.axis
        return 1 - self.axis

    @property
    def kind(self) -> str:
        return "int8"

    def dense(self, dtype: DTypeLike | None = None) -> Array:
        """Returns values * scale, (in, out) float32."""
        values = self.values.T if self.transposed else _gather(self)
        return values.astype(jnp.float32) * jnp.expand_dims(self.scale, 1 - self.axis)

    def times(self, x: Array, dtype: DTypeLike) -> Array:
        return over_rows(x, lambda rows: int8_matmul(rows, self, dtype))

    def cast(self, dtype: DTypeLike) -> "Int8":
        return self

    def lookup(self, tokens: Array) -> Array:
        return self.values[tokens].astype(jnp.float32) * self.scale[tokens][..., None]

    def column_starts(self, size: int) -> list[int]:
        """Returns where pieces of `size` columns begin. A head is always cut, because with "full" all
        its columns, once widened, are larger than their logits.
        """
        return list(range(0, len(self.scale), size))

    def column_piece(self, start: int, stop: int) -> "Int8":
        columns_axis = 1 - self.contracting_axis
        last = min(stop, self.values.shape[columns_axis])
        values = jax.lax.slice_in_dim(self.values, start, last, axis=columns_axis)
        return dataclasses.replace(self, values=values, scale=self.scale[start:stop])

    def gradients(self, x: Array, g: Array) -> tuple[Array, None]:
        like_x = jnp.zeros((), x.dtype)  # stands for x, of which the backward pass needs only the type
        return widened_backward(jnp.float32, (self, like_x), g)

    @property
    def can_be_merged(self) -> bool:
        return self.activations == "full"

    def on_mesh(self, path: str) -> "Int8":
        """Returns the weight at a path of the model with its integers still cut along `fsdp`: a
        product gathers them when it reads them. If they were gathered here, a loop would hold them
        from forward to backward.
        """
        values = layout.pin({path: self.values})[path]
        return dataclasses.replace(self, values=values, gathered=P(*tensor_axes(path)))

    def beside(self, others: Sequence["Int8"]) -> "Int8 | None":
        """Returns the weights side by side; None where they are not stored in the same way."""
        if len({jax.tree.structure(weight) for weight in (self, *others)}) > 1:
            return None
        return jax.tree.map(_side_by_side, self, *others)

    def for_cpu(self) -> "Int8":
        """Returns the weight with `values` transposed in memory. With "full" it stays as it is."""
        if self.activations == "full":
            return self
        return store_transposed(self)


def _side_by_side(*arrays: Array) -> Array:
    return jnp.concatenate(arrays, axis=-1)


def quantize_matrix(weight: Array, activations: Activations = "int8", axis: int = 1) -> Int8:
    """Returns the Int8 nearest to weight (in, out): each column's largest magnitude becomes 127.

    No number is off by more than half a step, 1/254 of its column's largest magnitude. Columns of
    zeros stay zero.
    """
    weight = weight.astype(jnp.float32)
    scale = jnp.abs(weight).max(axis=1 - axis) / LARGEST
    steps = weight / jnp.expand_dims(jnp.where(scale == 0, 1, scale), 1 - axis)
    values = jnp.clip(jnp.round(steps), -LARGEST, LARGEST).astype(jnp.int8)
    return Int8(values, scale, activations, axis)


def _gather(leaf: Int8) -> Array:
    """Returns the integers, whole along `fsdp` where they are still cut along it."""
    if leaf.gathered is None:
        return leaf.values
    return jax.lax.with_sharding_constraint(leaf.values, leaf.gathered)


def store_transposed(leaf: Int8) -> Int8:
    """Returns the leaf with `values` transposed in memory: on a CPU a few rows of x then take half
    the time.
    """
    if leaf.contracting_axis == 1:
        return leaf
    return dataclasses.replace(leaf, values=leaf.values.T, transposed=True)


def quantize(params: Params, activations: Activations = "int8") -> Params:
    """Returns params with the matrices of the blocks and the head (tied: the embedding) as Int8;
    Blocks stay.

    The input of `down` has a few numbers far above the rest, so with "int8" it gets two digits:
    SmolLM2 then loses 0.6% in bits per byte, not 1.1%. Raises UserError for a leaf that is not a
    plain matrix: merge adapters first.
    """
    names = {*MATRICES, *JOINED, "head"}
    if "head" not in params:
        names.add("embed")

    def convert(path: str, leaf: Any) -> Any:
        name = path.rpartition("/")[2]
        if name not in names or isinstance(leaf, Blocks):
            return leaf
        if getattr(leaf, "ndim", 0) != 2:
            raise UserError(f"Only plain matrices can be quantised, and {path} is not one.")
        own_activations = activations
        if name == "down" and activations == "int8":
            own_activations = "int16"
        axis = 0 if path == "embed" else 1
        return _quantize_jitted(leaf, own_activations, axis)

    return map_paths(convert, params)


_quantize_jitted = jax.jit(quantize_matrix, static_argnums=(1, 2))


def round_rows(x: Array) -> tuple[Array, Array]:
    """x (..., M, D) -> values (..., M, D) int8, scale (..., M, 1) float32: each row's largest
    magnitude becomes 127.

    A NaN or an infinity spoils its row's scale, and no other's.
    """
    steps, scale = _scale_rows(x)
    return jnp.round(steps).astype(jnp.int8), scale


def two_digit_rows(x: Array) -> tuple[Array, Array]:
    """x (..., M, D) -> values (..., 2 M, D) int8, scale (..., M, 1) float32: rows as in
    `round_rows`, then the rest of each number in steps DIGIT_STEPS times smaller.
    """
    steps, scale = _scale_rows(x)
    first = jnp.round(steps)
    second = jnp.round((steps - first) * DIGIT_STEPS)
    return jnp.concatenate([first.astype(jnp.int8), second.astype(jnp.int8)], axis=-2), scale


def join_digits(products: Array) -> Array:
    """products (..., 2 M, X) of two-digit rows -> (..., M, X) float32, still to be multiplied by
    the rows' scale.
    """
    first, second = jnp.split(products.astype(jnp.float32), 2, axis=-2)
    return first + second * (1 / DIGIT_STEPS)


def _scale_rows(x: Array) -> tuple[Array, Array]:
    """x (..., M, D) -> x / scale and scale (..., M, 1), float32."""
    x = x.astype(jnp.float32)
    # The largest by its bits, which sort as magnitudes do, and a NaN's come last: XLA's maximum on
    # a CPU loses some NaNs.
    bits = jax.lax.bitcast_convert_type(jnp.abs(x), jnp.int32).max(axis=-1)
    scale = jax.lax.bitcast_convert_type(bits, jnp.float32) * (1 / LARGEST)
    scale = jnp.where(scale == 0, 1, scale)[..., None]
    # Written as multiplications: XLA makes them of divisions in some programs and not in others.
    return x * (1 / scale), scale


def int8_matmul(x: Array, weight: Int8, dtype: DTypeLike) -> Array:
    """x (M, in) -> x times the weight, (M, out) in `dtype`; with `axis` 0 times its transpose, x
    (M, D) -> (M, V).

    Raises UserError when a gradient is taken through a leaf whose activations are integers too.
    """
    if weight.activations == "full":
        return _multiply_widened(x, weight, dtype)
    return _multiply_integers(x, weight, dtype)


def _contract(x: Array, values: Array, axis: int, **options: Any) -> Array:
    """x (M, X), values (X, out), or with axis 1 (out, X) -> x times values, (M, out)."""
    return jax.lax.dot_general(x, values, (((1,), (axis,)), ((), ())), **options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _multiply_integers(x: Array, weight: Int8, dtype: DTypeLike) -> Array:
    has_two_digits = weight.activations == "int16"
    if has_two_digits:
        rows, row_scale = two_digit_rows(x)
    else:
        rows, row_scale = round_rows(x)
    is_head = len(weight.scale) > HEAD_COLUMNS
    if weight.contracting_axis == 1 and len(rows) <= FEW_ROWS and not is_head:
        # The weight on the left is read as it lies, on the right it would be packed first. Without
        # the barrier XLA would swap them back: held by tests/model/test_int8.py.
        product = _contract(weight.values, rows, 1, preferred_element_type=jnp.int32)
        product = jax.lax.optimization_barrier(product).T
    else:
        product = _contract(rows, weight.values, weight.contracting_axis, preferred_element_type=jnp.int32)
    if has_two_digits:
        product = join_digits(product)
    else:
        product = product.astype(jnp.float32)
    return (product * row_scale * weight.scale).astype(dtype)


def _no_gradient(*_: Any) -> Any:
    raise UserError(
        "This weight multiplies int8 by int8, which has no gradient. "
        "Quantise the base with activations 'full' to train on it."
    )


def _integers_forward(x: Array, weight: Int8, dtype: DTypeLike) -> tuple[Array, None]:
    return _multiply_integers(x, weight, dtype), None


_multiply_integers.defvjp(_integers_forward, _no_gradient)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _multiply_widened(x: Array, weight: Int8, dtype: DTypeLike) -> Array:
    """Returns x times the integers in x's type, then times the scale. Integers up to 127 are exact in
    bfloat16, so the weight is not rounded a second time.

    Without the barrier a forward pass would first widen the weights of all layers: held by
    tests/laws/test_barriers.py.
    """
    values, x = jax.lax.optimization_barrier((weight.values, x))
    widened = _gather(dataclasses.replace(weight, values=values)).astype(x.dtype)
    product = _contract(x, widened, weight.contracting_axis, preferred_element_type=jnp.float32)
    return (product * weight.scale).astype(dtype)


def _widened_forward(x: Array, weight: Int8, dtype: DTypeLike) -> tuple[Array, tuple[Int8, Array]]:
    like_x = jnp.zeros((), x.dtype)  # a residual is an array: this one hands on the type of x
    return _multiply_widened(x, weight, dtype), (weight, like_x)


def widened_backward(dtype: DTypeLike, residuals: tuple[Int8, Array], g: Array) -> tuple[Array, None]:
    """Returns dx = (g scale) values^T in the type of x, and None: the weight is frozen. `residuals`:
    the weight, and an array () of x's type.

    Without the barrier the forward pass would hold its wide copy of every weight until here: held by
    tests/laws/test_barriers.py.
    """
    weight, like_x = residuals
    scaled = (g.astype(jnp.float32) * weight.scale).astype(like_x.dtype)
    values, scaled = jax.lax.optimization_barrier((weight.values, scaled))
    values = _gather(dataclasses.replace(weight, values=values))
    widened = values.astype(like_x.dtype)
    dx = _contract(scaled, widened, 1 - weight.contracting_axis, preferred_element_type=like_x.dtype)
    return dx, None


_multiply_widened.defvjp(_widened_forward, widened_backward)
