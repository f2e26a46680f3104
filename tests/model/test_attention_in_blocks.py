"""The kernel that attends in training: near what the plain layers give, the same whatever lies beside a text."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.model import layers, ops
from engine.model.attention_in_blocks import causal_attention_in_blocks
from engine.model.native.library import native_problem

# Texts, tokens, query heads, key heads, head width: less than a vector and than a tile, whole
# tiles, odd numbers of all.
SHAPES = [
    (3, 7, 6, 3, 4),
    (2, 64, 2, 2, 64),
    (2, 130, 6, 2, 20),
    (1, 256, 2, 1, 128),
    (1, 201, 3, 3, 33),
    (2, 2, 2, 1, 5),
]
# Furthest from the layers in float32, in parts of the largest number of value and gradients, as in
# test_beside_numpy.py; where one is a small difference of large numbers, twice as far as XLA's
# attention is.
DTYPES = {"float32": 5e-6, "bfloat16": 2.5e-2}
TEXTS = ("one", "packed", "mixed")  # in a row: segments that follow each other, or in any order


@pytest.fixture(scope="module", autouse=True)
def kernel():
    if problem := native_problem():
        pytest.skip(f"there is no kernel here: {problem}")


@functools.partial(jax.jit, static_argnums=0)
def attend(attention, qkv, segments, gradient):
    """Attention, and the gradients of queries, keys and values."""
    out, pull = jax.vjp(lambda *qkv: attention(*qkv, segments), *qkv)
    return out, *pull(gradient.astype(out.dtype))


def inputs(shape: int, dtype: str, texts: str, seed: int):
    """Queries scaled for scores up to 20 and more, keys, values, segments and a gradient."""
    B, T, N, K, H = SHAPES[shape]
    rng = np.random.default_rng(seed)
    numbers = lambda *sizes: jnp.asarray(
        rng.standard_normal(sizes) * rng.choice([0.1, 1, 3], (*sizes[:-1], 1)), dtype
    )
    segments = rng.integers(0, 3, (B, T)).astype(np.int32)
    segments = None if texts == "one" else np.sort(segments, axis=1) if texts == "packed" else segments
    return (
        [numbers(B, T, N, H) * H**-0.5, numbers(B, T, K, H), numbers(B, T, K, H)],
        segments,
        numbers(B, T, N * H),
    )


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.whole)])
@settings(max_examples=25)
@given(st.integers(0, len(SHAPES) - 1), st.sampled_from(TEXTS), st.integers(0, 2**32 - 1))
def test_near_what_the_layers_give(dtype, shape, texts, seed):
    qkv, segments, gradient = inputs(shape, dtype, texts, seed)
    exact = [x.astype(jnp.float32) for x in qkv], segments, gradient.astype(jnp.float32)
    ours, twin = (attend(path, qkv, segments, gradient) for path in (ops.native, causal_attention_in_blocks))
    assert [x.dtype for x in ours] == [dtype] * 4
    error = lambda array, true: float(jnp.abs(array.astype(jnp.float32) - true).max())
    expected = attend(layers.causal_attention, *exact)
    largest = max(float(jnp.abs(true).max()) for true in expected)
    for array, other, true in zip(ours, twin, expected, strict=True):
        assert error(array, true) <= max(DTYPES[dtype] * largest, 2 * error(other, true))


@pytest.mark.law("causality")
@pytest.mark.parametrize("texts", TEXTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_depends_on_itself_alone(dtype, texts):
    """In another place, beside other texts and numbers that are none: the same bits."""
    qkv, segments, gradient = inputs(2, dtype, texts, 7)
    expected = attend(ops.native, qkv, segments, gradient)
    beside = lambda x: jnp.concatenate([jnp.full_like(x[:1], jnp.nan), x[::-1]])
    segments = None if segments is None else np.concatenate([segments[:1], segments[::-1]])
    ours = attend(ops.native, [beside(x) for x in qkv], segments, beside(gradient))
    for array, other in zip(ours, expected, strict=True):
        assert np.asarray(array[1:][::-1]).tobytes() == np.asarray(other).tobytes()
        assert jnp.isnan(array[0].astype(jnp.float32)).all()


@pytest.mark.parametrize("spoilt", range(4))
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_reaches_the_gradients(dtype, spoilt):
    """So that the step is refused."""
    qkv, segments, gradient = inputs(2, dtype, "packed", 7)
    arrays = [*qkv, gradient]
    arrays[spoilt] = arrays[spoilt].at[1, 70, ..., 3].set(jnp.nan)
    results = attend(ops.native, arrays[:3], segments, arrays[3])
    assert any(jnp.isnan(x[1].astype(jnp.float32)).any() for x in results[1:])
    assert not any(jnp.isnan(x[0].astype(jnp.float32)).any() for x in results)


def bits() -> bytes:
    """What the kernel gives for each shape, type and way of packing."""
    assert not native_problem()
    cases = ((shape, dtype, texts) for shape in range(len(SHAPES)) for dtype in DTYPES for texts in TEXTS)
    return b"".join(np.asarray(x).tobytes() for case in cases for x in attend(ops.native, *inputs(*case, 11)))
