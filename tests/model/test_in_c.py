"""The kernels that attend over the KV cache: near XLA, the same whatever lies beside a text, and nothing else read."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.model.cache import segmented
from engine.model.cache.in_c import KVInC
from engine.model.cache.segmented import CacheRows, KVSegments, make_kv_segments
from engine.model.native.library import native_problem
from tests.model import test_attention_in_blocks, test_blocks
from tests.tiny import tiny_config

DTYPES = ("float32", "bfloat16", "int8")
# Furthest from XLA's result, in parts of the largest value, for scores up to 50: XLA rounds the
# softmax to bfloat16's 8 bits, and with int8 queries and softmax to 15.
NEAR = {"float32": 2e-5, "bfloat16": 8e-3, "int8": 1e-3}
# Slots, key heads, queries of each, head width; where the cache begins and ends.
SHAPES = [
    ((2, 1, 1, 4), (0, 3)),
    ((5, 3, 3, 64), (0, 777)),
    ((3, 2, 7, 20), (0, 30)),
    ((1, 4, 2, 16), (0, 300)),
    ((2, 1, 5, 128), (0, 257)),
]
SIZES, ANY_SEED = st.integers(0, len(SHAPES) - 1), st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module", autouse=True)
def kernel():
    if problem := native_problem():
        pytest.skip(f"there is no kernel here: {problem}")


@functools.partial(jax.jit, static_argnums=0)
def attend(by_kernel: bool, qkv, segments, rows):
    """Attention, and the segments' arrays."""
    cache = KVInC(*segments) if by_kernel else KVSegments(*segments)
    out, layer = segmented.segmented_cache(cache, rows).layer(0).attend(*qkv)
    return out, jax.tree.leaves((layer.k, layer.v))


def inputs(shape: int, dtype: str, seed: int):
    """q, k and v of a step, a layer full of numbers of very different sizes, and rows at any
    positions, some not in use.
    """
    (slots, K, G, H), edges = SHAPES[shape]
    rng, R = np.random.default_rng(seed), max(slots, 2)
    numbers = lambda *sizes: (
        rng.standard_normal(sizes) * 10.0 ** rng.uniform(-3, 0.5, (*sizes[:-1], 1))
    ).astype(np.float32)

    def fill(array):
        if array.dtype == jnp.int8:
            return jnp.asarray(rng.integers(-127, 128, array.shape), jnp.int8)
        return jnp.asarray(
            np.abs(numbers(*array.shape)) / 127 if array.ndim == 3 else numbers(*array.shape), array.dtype
        )

    cfg = tiny_config(layers=1, heads=K * G, kv_heads=K, head_dim=H)
    segments = jax.tree.map(fill, make_kv_segments(cfg, slots, edges, dtype))
    position = rng.integers(-1, edges[-1], R)
    position[rng.integers(R)] = edges[-1] - 1
    if slots == 1:
        position[1] = position[0] - 1
    slot = np.minimum(np.arange(R), slots - 1)
    source, target = [*range(R), *rng.integers(0, R, 3)], [*slot, *[slots] * 3]
    rows = CacheRows(*(jnp.asarray(field, jnp.int32) for field in (position, slot, source, target)))
    qkv = [jnp.asarray(numbers(R, 1, heads, H) * size) for heads, size in ((K * G, H**-0.5), (K, 1), (K, 1))]
    return qkv, segments, rows


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25)
@given(SIZES, ANY_SEED)
def test_near_what_xla_gives_and_the_same_is_written(dtype, shape, seed):
    qkv, segments, rows = inputs(shape, dtype, seed)
    (ours, written), (theirs, expected) = (
        attend(by_kernel, qkv, segments, rows) for by_kernel in (True, False)
    )
    in_use = np.asarray(rows.position) >= 0
    assert np.isnan(np.asarray(ours)[~in_use]).all()
    largest = max(
        float(jnp.abs(array).max())
        for array in jax.tree.leaves((segments.v, qkv[2]))
        if array.dtype != jnp.int8
    )
    largest *= 127 if dtype == "int8" else 1
    np.testing.assert_allclose(
        np.asarray(ours)[in_use], np.asarray(theirs)[in_use], rtol=0, atol=NEAR[dtype] * largest
    )
    for array, other in zip(written, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(array), np.asarray(other))


@pytest.mark.law("batch invariance")
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25)
@given(SIZES, ANY_SEED, st.sampled_from([np.nan, np.inf, 1e30]))
def test_a_row_depends_on_its_own_text_alone(dtype, shape, seed, rubbish):
    """Other rows elsewhere or not in use, and rubbish behind its own position and in all other
    slots: the same bits.
    """
    qkv, segments, rows = inputs(shape, dtype, seed)
    expected, _ = attend(True, qkv, segments, rows)
    slots, rng = segments.slots, np.random.default_rng(seed)
    position = np.asarray(rows.position)
    row = int(np.argmax(position))

    def spoil(array, start):
        beyond = start + np.arange(array.shape[2]) > position[row]
        beyond = beyond | (np.arange(slots) != min(row, slots - 1))[:, None]
        beyond = beyond.reshape(slots, 1, -1, *[1] * (array.ndim - 3))
        return jnp.where(beyond, 99 if array.dtype == jnp.int8 else rubbish, array).astype(array.dtype)

    spoilt = segmented.map_segments(
        lambda segment, start: jax.tree.map(functools.partial(spoil, start=start), segment),
        segments,
        segments.edges[:-1],
    )
    if slots > 1:
        others = rng.integers(-1, segments.edges[-1], len(position))
        rows = rows._replace(
            position=jnp.asarray(np.where(np.arange(len(position)) == row, position, others), jnp.int32)
        )
    ours, _ = attend(True, qkv, spoilt, rows)
    assert np.asarray(ours)[row].tobytes() == np.asarray(expected)[row].tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_share_a_slot_have_the_bits_of_rows_with_copies_of_it(dtype):
    qkv, segments, rows = inputs(1, dtype, 3)
    copied = jax.tree.map(lambda array: jnp.broadcast_to(array[2], array.shape), segments)
    slot, source = jnp.arange(5, dtype=jnp.int32), jnp.asarray([0, 1, 2] * 5, jnp.int32)
    rows = CacheRows(jnp.asarray([254, 255, 256, -1, -1], jnp.int32), slot, source, jnp.repeat(slot, 3))
    copies, _ = attend(True, qkv, copied, rows)
    shared, _ = attend(True, qkv, segments, rows._replace(slot=jnp.full(5, 2, jnp.int32)))
    assert np.asarray(shared)[:3].tobytes() == np.asarray(copies)[:3].tobytes()


@pytest.mark.law("isolation")
@pytest.mark.parametrize("spoilt", ["q", "k", "v", "a key", "a value"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_spoils_its_own_row(dtype, spoilt):
    qkv, segments, rows = inputs(1, dtype, 7)
    rows = rows._replace(position=jnp.asarray([3, 700, 130, -1, 50], jnp.int32))
    expected, _ = attend(True, qkv, segments, rows)
    at = {4: (1, 0, 140, 5), 3: (1, 0, 140)}  # of slot 1, in the last segment
    spoil = lambda array: array if array.dtype == jnp.int8 else array.at[at[array.ndim]].set(np.nan)
    spoil_side = lambda side: ((*side[0][:-1], jax.tree.map(spoil, side[0][-1])),)
    if spoilt in ("q", "k", "v"):
        qkv["qkv".index(spoilt)] = qkv["qkv".index(spoilt)].at[1, 0, :, 2].set(np.nan)
    elif spoilt == "a key":
        segments = segments._replace(k=spoil_side(segments.k))
    else:
        segments = segments._replace(v=spoil_side(segments.v))
    ours, _ = attend(True, qkv, segments, rows)
    assert np.asarray(ours)[[0, 2, 4]].tobytes() == np.asarray(expected)[[0, 2, 4]].tobytes()
    assert np.isnan(np.asarray(ours)[1]).any()


def prefill(
    by_kernel: bool, chunk, segments, start: int, slot: int, tokens: int | None = None
) -> tuple[np.ndarray, KVSegments]:
    """Attention of a chunk's queries, (1, T, N * H), of which the first are `tokens`, and the
    segments with its keys and values.
    """
    at = [jnp.full(1, number, jnp.int32) for number in (start, slot, 0, slot)]
    is_token = None if tokens is None else jnp.arange(chunk[0].shape[1])[None] < tokens
    out, arrays = attend(by_kernel, chunk, segments, CacheRows(*at, is_token))
    return np.asarray(out), jax.tree.unflatten(jax.tree.structure(segments), arrays)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=10)
@given(st.sampled_from([1, 2]), ANY_SEED, st.sampled_from([np.nan, np.inf, 1e30]))
def test_a_token_of_a_prompt_has_the_same_bits_however_it_is_cut(dtype, shape, seed, rubbish):
    """At once and in chunks, which rubbish fills up, with rubbish behind each and in all other
    slots; near what XLA gives.
    """
    (slots, K, G, H), (_, S) = SHAPES[shape]
    rng = np.random.default_rng(seed)
    slot, length = int(rng.integers(slots)), int(rng.choice([S, S // 2 + 1]))
    empty = make_kv_segments(tiny_config(layers=1, heads=K * G, kv_heads=K, head_dim=H), slots, (0, S), dtype)
    spoilt = jax.tree.map(
        lambda array: jnp.full_like(array, 99 if array.dtype == jnp.int8 else rubbish), empty
    )
    sizes = ((K * G, 4 * H**-0.5), (K, 1), (K, 1))
    qkv = [(rng.standard_normal((1, length, heads, H)) * size).astype(np.float32) for heads, size in sizes]
    whole, filled = prefill(True, qkv, spoilt, 0, slot)
    expected, near = prefill(False, qkv, empty, 0, slot)
    np.testing.assert_allclose(whole, expected, rtol=0, atol=NEAR[dtype] * np.abs(qkv[2]).max())
    segments, size = spoilt, int(rng.choice([7, 50]))
    for start in range(0, length, size):
        end = min(start + size, length)
        padding = ((0, 0), (0, min(start + size, S) - end), (0, 0), (0, 0))
        chunk = [np.pad(x[:, start:end], padding, constant_values=rubbish) for x in qkv]
        part, segments = prefill(True, chunk, segments, start, slot, end - start)
        assert part[:, : end - start].tobytes() == whole[:, start:end].tobytes()
        assert np.isnan(part[:, end - start :]).all()
    for array, other, theirs in zip(*map(jax.tree.leaves, (segments, filled, near)), strict=True):
        ours, other = np.array(array), np.array(other)
        np.testing.assert_array_equal(ours[slot, :, :length], theirs[slot, :, :length])
        assert (
            ours.ndim == 3 or not ours[slot, :, length : min(start + size, S)].any()
        )  # 3: the scales of int8
        ours[slot, :, length:] = other[slot, :, length:]
        assert ours.tobytes() == other.tobytes()
    assert np.isnan(prefill(True, qkv, spoilt, 0, slots)[0]).all()


def bits(by_kernel: bool) -> bytes:
    """What the kernels, or XLA, give for each shape and type."""
    assert not native_problem()
    steps = (
        attend(by_kernel, *inputs(shape, dtype, 11))[0] for shape in range(len(SHAPES)) for dtype in DTYPES
    )
    segments, rng = inputs(1, "bfloat16", 11)[1], np.random.default_rng(11)
    chunk = [jnp.asarray(rng.standard_normal((1, 100, heads, 64)), jnp.float32) for heads in (9, 3, 3)]
    chunks = (prefill(by_kernel, chunk, segments, start, 2)[0] for start in (0, 512, 677))
    return b"".join(np.asarray(result).tobytes() for result in (*steps, *chunks))


def all_bits() -> bytes:
    """What the two ways here, the kernel of training and the two ways of blocks give; the products
    of int8 are exact.
    """
    return bits(True) + bits(False) + test_attention_in_blocks.bits() + test_blocks.bits()


def run_here(program: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])} | environment
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=False)


@pytest.mark.whole
def test_the_same_with_one_thread():
    one = "import os, sys; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"
    result = run_here(
        f"{one}; from tests.model.test_in_c import all_bits; sys.stdout.buffer.write(all_bits())"
    )
    assert result.stdout == all_bits(), result.stderr.decode()
