"""Blocks of a GGUF file: multiplied as they are, by the kernel near its twin in XLA, each row on its own to the bit."""

import functools

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.model.native.library import native_problem
from engine.model.weights import blocks, stacked_lora
from engine.model.weights.block_layout import KINDS, ROUNDED, pack_blocks, unpack_blocks
from engine.model.weights.blocks import (
    Blocks,
    Rounding,
    block_matmul_by_xla,
    dense_blocks,
    factors_to_train,
    round_groups,
    round_to_blocks,
    with_factors,
)
from engine.model.weights.lora import to_dense
from engine.model.weights.matmul import lookup, norm_and_project, swiglu_and_project
from tests.storage.gguf_files import random_blocks
from tests.tiny import assert_near, normal

# one block and several; whole strips of columns and others; several parts
WIDTHS = [(32, 5), (64, 16), (160, 70), (576, 701)]
WIDE = [(256, 5), (768, 701)]  # of kinds whose blocks have 256 inputs
F32 = jnp.dtype("float32")


def shapes_of(kind: str) -> list[tuple[int, int]]:
    return WIDE if KINDS[kind].groups > 1 else WIDTHS


# One kind of each size of group by default: the others differ in how their numbers are packed.
FEW_KINDS = ("Q4_1", "Q6_K")
MOST_KINDS_WHOLE = [pytest.param(kind, marks=[pytest.mark.whole] * (kind not in FEW_KINDS)) for kind in KINDS]
KINDS_AND_SHAPES = [(kind, shape) for kind in KINDS for shape in shapes_of(kind)]


def blocks_of(seed: int, kind: str, shape: tuple[int, int]) -> np.ndarray:
    """(out, bytes of a row), with factors of very different sizes."""
    generator = np.random.default_rng(seed)
    scales = 10.0 ** generator.integers(-6, 2, (shape[1], 1, 1))
    return random_blocks(generator, kind, shape, scales)


@jax.jit
def multiply_by_xla(x: jax.Array, leaf: Blocks) -> jax.Array:
    return block_matmul_by_xla(x, leaf, F32)


@jax.jit
def multiply_as_here(x: jax.Array, leaf: Blocks) -> jax.Array:
    if leaf.fuses(x):
        return leaf.times_fused(x, F32)
    return block_matmul_by_xla(x, leaf, F32)


@functools.cache
def weight(seed: int, kind: str, shape: tuple[int, int], axis: int = 1) -> Blocks:
    return Blocks(jnp.asarray(pack_blocks(blocks_of(seed, kind, shape), kind)), shape[1], axis)


def rows_of(seed: int, rows: int, width: int, spoil: float) -> np.ndarray:
    """Rows of very different sizes, within a row too: one zero, one tiny, one spoiled."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((rows, width)) * 10.0 ** (
        generator.integers(-20, 20, (rows, 1)) + generator.integers(-4, 4, width)
    )
    x[seed % rows] = 0
    x[(seed + 1) % rows] = 1e-39
    x[(seed + 2) % rows, seed % width] += spoil
    return x.astype(np.float32)


@pytest.mark.law("quantisation")
@pytest.mark.parametrize("kind", MOST_KINDS_WHOLE)
@settings(max_examples=25)
@given(
    st.integers(0, 3),
    st.sampled_from([1, 7, 40]),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, np.nan, np.inf, -np.inf]),
)
def test_both_ways_give_the_products_of_the_files_numbers(kind, place, rows, seed, spoil):
    shape = shapes_of(kind)[place % len(shapes_of(kind))]
    leaf, x = weight(seed % 3, kind, shape), rows_of(seed, rows, shape[0], spoil)
    rounded = np.asarray(round_groups(jnp.asarray(x)), np.float64)
    dense = gguf.dequantize(blocks_of(seed % 3, kind, shape), gguf.GGMLQuantizationType[kind]).astype(
        np.float64
    )
    # Minima of a block are added to numbers that may be as large: what is added up in float32 is
    # that large.
    largest = (
        np.abs(rounded)
        @ (np.abs(dense).reshape(len(dense), -1, 32).max(-1).repeat(32, -1) + 2 * np.abs(dense)).T
    )
    for multiply in (multiply_by_xla, multiply_as_here):
        ours = np.asarray(multiply(x, leaf))
        is_finite = np.isfinite(x).all(1)
        assert np.isnan(ours[~is_finite]).all()
        error = np.abs(ours - rounded @ dense.T)[is_finite]
        assert (error <= 2e-6 * largest[is_finite] + 1e-37).all(), multiply


@pytest.fixture(scope="module")
def kernel():
    if problem := native_problem():
        pytest.skip(f"there is no kernel here: {problem}")


EPS = 1e-5
BEFORE = {
    "norm": lambda x, gain, leaf: norm_and_project(x, gain, [leaf], EPS, F32)[0],
    "SwiGLU": lambda x, _, leaf: swiglu_and_project(*jnp.split(x, 2, axis=1), leaf, F32),
}
as_here = {name: jax.jit(function) for name, function in BEFORE.items()}


@functools.partial(jax.jit, static_argnames="name")
def by_xla(name: str, *arguments: object) -> jax.Array:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stacked_lora, "computes_in_c", lambda: False)
        patch.setattr(blocks, "computes_in_c", lambda: False)
        return BEFORE[name](*arguments)


@pytest.mark.whole
@pytest.mark.parametrize("name", BEFORE)
@settings(max_examples=40)
@given(
    st.sampled_from(KINDS_AND_SHAPES),
    st.sampled_from([1, 7, 40]),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, np.nan, np.inf, -np.inf]),
)
def test_a_norm_or_swiglu_before_a_product_is_computed_by_both_ways(name, kind_and_shape, rows, seed, spoil):
    kind, shape = kind_and_shape
    leaf, generator, width = weight(seed % 3, kind, shape), np.random.default_rng(seed), shape[0]
    gain = generator.standard_normal(width).astype(np.float32)
    x = generator.standard_normal((rows, width * (1 + (name == "SwiGLU")))) * 10.0 ** generator.integers(
        -3, 3, (rows, 1)
    )
    x[(seed + 1) % rows] = 0
    x[(seed + 2) % rows, seed % width] += spoil
    x = x.astype(np.float32)
    wide, is_finite = np.where(np.isfinite(x), x, 0).astype(np.float64), np.isfinite(x).all(1)
    if name == "norm":
        before = wide / np.sqrt((wide**2).mean(1, keepdims=True) + EPS) * gain
    else:
        before = wide[:, :width] / (1 + np.exp(-wide[:, :width])) * wide[:, width:]
    dense = np.asarray(dense_blocks(leaf), np.float64)
    # Where float32 is off by a bit a number is rounded to the next step: half a step is the bound
    # for both.
    groups = np.abs(before).reshape(rows, -1, 32)
    step = groups.max(-1).repeat(32, -1) / 127
    bound = (0.501 * step + 1e-37) @ np.abs(dense) + 4e-6 * np.abs(before) @ np.abs(dense) + 1e-37
    if KINDS[kind].has_minimum:
        largest = np.abs(before) @ (np.abs(dense).reshape(-1, 32, dense.shape[1]).max(1).repeat(32, 0))
        bound += 4e-6 * largest
    for way in (as_here[name], functools.partial(by_xla, name)):
        ours = np.asarray(way(x, gain, leaf))
        assert np.isnan(ours[~is_finite]).all()
        assert (np.abs(ours - before @ dense) <= bound)[is_finite].all(), way


@pytest.mark.law("batch invariance")
@pytest.mark.parametrize("name", ["product", *BEFORE])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10)
@given(st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_a_row_has_the_same_bits_alone_and_among_any_others(kernel, kind, name, place, seed):
    """By the kernel: in calls of 1 to 9 rows and many, at each place, beside rows that are spoiled."""
    shape = shapes_of(kind)[place % len(shapes_of(kind))]
    leaf, generator, width = (
        weight(0, kind, shape),
        np.random.default_rng(seed),
        shape[0] * (1 + (name == "SwiGLU")),
    )
    row, gain = (generator.standard_normal(size).astype(np.float32) for size in ((1, width), shape[0]))
    multiply = multiply_as_here if name == "product" else lambda x, leaf: as_here[name](x, gain, leaf)
    alone = np.asarray(multiply(row, leaf)).tobytes()
    for rows in (*range(2, 10), 33):
        x = rows_of(seed, rows, width, np.nan)
        for place in {0, seed % rows, rows - 1}:
            x[place] = row
            assert np.asarray(multiply(x, leaf))[place].tobytes() == alone


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [np.nan, np.inf, -np.inf, 65504, 6e-8])
def test_a_factor_that_is_no_ordinary_number_spoils_its_column_alone(kind, factor):
    """As `pack_blocks` lets none through that is not finite; small factors too have every bit set."""
    shape = shapes_of(kind)[-1]
    leaf, x = weight(1, kind, shape), rows_of(3, 7, shape[0], 0.0)
    packed = np.array(leaf.packed)
    strip, block, column = 2, 1, 5
    rest = KINDS[kind].number_bytes
    small = KINDS[kind].groups * KINDS[kind].small * 16
    packed[strip, block, rest : rest + small].reshape(-1, 16)[:, column] = (
        -1 if packed.dtype == np.int8 else 255
    )
    factors = packed[strip, block, rest + small :].view(np.float16).reshape(-1, 16)
    factors[:, column] = factor
    damaged = Blocks(jnp.asarray(packed), leaf.columns)
    others = np.arange(leaf.columns) != strip * 16 + column
    for multiply in (multiply_as_here, multiply_by_xla):
        product = np.asarray(multiply(x, damaged))
        np.testing.assert_array_equal(product[:, others], np.asarray(multiply(x, leaf))[:, others])
        is_zero = ~x.any(axis=1)
        own = product[~is_zero][:, ~others]
        if np.isfinite(factor):
            assert not np.isnan(own).any()
        else:
            assert not np.isfinite(own).any()


def bits() -> bytes:
    """What the kernel and XLA give for each shape and kind."""
    products = (
        multiply(rows_of(7, 9, shape[0], 0.0), weight(1, kind, shape))
        for multiply in (multiply_as_here, multiply_by_xla)
        for kind, shape in KINDS_AND_SHAPES
    )
    return b"".join(np.asarray(product).tobytes() for product in products)


@pytest.mark.law("quantisation")
@pytest.mark.parametrize("kind", ROUNDED)
@pytest.mark.parametrize("axis", [0, 1])
def test_a_weight_is_rounded_to_the_nearest_of_its_blocks(kind, axis):
    """No number is off by more than half a step, as llama.cpp reads the rows; what was rounded once
    stays as it is.
    """
    rows = np.asarray(normal(0, 70, 160)) * 10.0 ** np.random.default_rng(0).integers(-3, 2, (70, 1))
    rows[:, :32], rows[0, 32:64] = 0, 0.3  # a block of zeros, and one without a range
    leaf = round_to_blocks(jnp.asarray(rows.T if axis else rows, jnp.float32), kind, axis)
    file = unpack_blocks(np.asarray(leaf.packed), leaf.columns)
    np.testing.assert_array_equal(pack_blocks(file, kind), leaf.packed)
    dense = gguf.dequantize(file, gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(dense_blocks(leaf), dense.T if axis else dense)
    in_blocks = rows.reshape(70, 5, 32)
    largest = np.abs(in_blocks).max(-1)
    # What is as large as -8 but positive becomes 7, a whole step less.
    most = {"Q4_0": largest / 8, "Q4_1": np.ptp(in_blocks, axis=-1) / 30, "Q8_0": largest / 254}[kind]
    most = most + largest * 2**-10  # float16 has 11 bits
    assert (np.abs(dense - rows).reshape(70, 5, 32).max(-1) <= most).all()
    again = round_to_blocks(dense_blocks(leaf), kind, axis)
    np.testing.assert_array_equal(again.packed, leaf.packed)
    weight = jnp.asarray(rows.T if axis else rows, jnp.float32)
    in_training, backward = jax.vjp(Rounding(kind, axis).weight_of, weight)
    np.testing.assert_array_equal(in_training, dense_blocks(leaf))
    np.testing.assert_array_equal(backward(weight)[0], weight)


@pytest.mark.parametrize("kind", ROUNDED)
@pytest.mark.parametrize("axis", [0, 1])
def test_factors_train_and_integers_stay(kind, axis):
    """As they begin they give the very weight; moved, what trains is what is served, and the
    gradient is that of both.
    """
    leaf = round_to_blocks(normal(0, *((96, 70) if axis else (70, 96))), kind, axis)
    begun = factors_to_train(leaf)
    assert begun.shape == (5, 3, 2 if kind == "Q4_1" else 1, 16)
    np.testing.assert_array_equal(leaf.weight_of(begun), dense_blocks(leaf))
    np.testing.assert_array_equal(with_factors(leaf, begun).packed, leaf.packed)
    trained = begun + 0.01 * normal(1, *begun.shape)
    served, values, end = with_factors(leaf, trained), leaf.weight_of(trained), -32 * begun.shape[2]
    np.testing.assert_array_equal(values, dense_blocks(served))
    np.testing.assert_array_equal(served.packed[..., :end], leaf.packed[..., :end])
    assert (served.packed[..., end:] != leaf.packed[..., end:]).any()
    # A number of Q4_1 is 2 (quarter (n - 8) / 4 / 2 + half the center): without the rounding it is
    # linear in both.
    g = normal(2, *values.shape)
    linear = jax.vjp(leaf.weight_of, trained)[1](g)[0]
    step = jnp.zeros_like(trained).at[2, 1, :, 5].set(0.5)  # of the second block of output 37
    moved = leaf.weight_of(trained + step) - values
    assert jnp.sum(moved * g) == pytest.approx(float(jnp.sum(linear * step)), rel=2e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tied_head_looks_up_the_rows_that_it_multiplies_by(kind):
    shape = (2 * KINDS[kind].inputs, 53)
    leaf = weight(2, kind, shape, 0)
    rows = jnp.asarray([[0, 52, 16], [15, 17, 0]])
    matrix = gguf.dequantize(blocks_of(2, kind, shape), gguf.GGMLQuantizationType[kind])
    assert leaf.shape == shape[::-1]
    np.testing.assert_array_equal(to_dense(leaf), matrix)
    np.testing.assert_array_equal(lookup(leaf, rows), matrix[np.asarray(rows)])
    x = normal(0, 3, shape[0])
    assert_near(leaf.times(x, F32), np.asarray(round_groups(x)) @ matrix.T, 1e-5)
    np.testing.assert_array_equal(dense_blocks(weight(2, kind, shape)), matrix.T)
