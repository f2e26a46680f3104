"""KVSegments: cut by position or whole, attention sees the same; and only what is copied between slots arrives there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.model.cache import segmented
from engine.model.cache.in_c import LayerInC
from engine.model.cache.segmented import (
    CacheRows,
    KVSegments,
    QuantizedKV,
    SegmentedLayer,
    make_kv_segments,
    segment_edges,
    segmented_cache,
)
from engine.model.native.library import native_problem
from tests.tiny import tiny_config

CFG = tiny_config(layers=2)
N, K, H = CFG.heads, CFG.kv_heads, CFG.head_dim
SLOTS, CAPACITY, FIRST = 5, 70, 8
EDGES = (0, 8, 16, 32, 64, 72)
DTYPES = ("float32", "bfloat16", "int8")
# Furthest from attention over the very stored keys and values, of numbers near 1: bfloat16 rounds
# the weights of the softmax to 8 bits, int8 keeps them to 15.
NEAR = {"float32": 2e-6, "bfloat16": 1e-2, "int8": 3e-4}
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES)
# By the kernel in C, where there is one, and by XLA: each compiled by itself.
PATHS = {
    "kernel": jax.jit(lambda q, k, v, layer: LayerInC(*layer).attend(q, k, v)),
    "XLA": jax.jit(lambda q, k, v, layer: layer.attend(q, k, v)),
}


@pytest.fixture(params=PATHS)
def attention(request):
    if request.param == "kernel" and (problem := native_problem()):
        pytest.skip(f"there is no kernel here: {problem}")
    return PATHS[request.param]


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


def new_qkv(rng: np.random.Generator, rows: int, tokens: int = 1) -> list[np.ndarray]:
    return [normal(rng, rows, tokens, heads, H) for heads in (N, K, K)]


def joined(layer) -> np.ndarray:
    """A layer's segments side by side, (B, K, S, H) float64, as the numbers they stand for."""
    wide = lambda segment: (
        segment.values * segment.scale[..., None] if isinstance(segment, QuantizedKV) else segment
    )
    return np.concatenate([np.asarray(wide(segment), np.float64) for segment in layer], axis=2)


def plain(q: np.ndarray, k: np.ndarray, v: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """q (T, N, H) at positions (T,) over k and v (K, S, H), one head and one query after the other
    -> (T, N * H).
    """
    out = np.zeros(q.shape)
    for t, position in enumerate(positions):
        for n in range(N):
            keys, values = k[n // (N // K), : position + 1], v[n // (N // K), : position + 1]
            weights = np.exp(keys @ q[t, n] - (keys @ q[t, n]).max())
            out[t, n] = weights @ values / weights.sum()
    return out.reshape(len(q), -1)


def rows_of(position, target, source=None, slot=None) -> CacheRows:
    source = np.arange(len(target)) if source is None else source
    slot = slot or (np.arange(len(position)) if len(position) > 1 else target)
    return CacheRows(*(jnp.asarray(field, jnp.int32) for field in (position, slot, source, target)))


def layer_at(segments: KVSegments, rows: CacheRows) -> SegmentedLayer:
    return segmented_cache(segments, rows).layer(0)


@functools.cache
def filled(dtype: str) -> tuple[KVSegments, list[np.ndarray]]:
    """KVSegments in which every slot holds CAPACITY tokens, read 8 at a time, and the keys and
    values that were put in.
    """
    rng, segments = (
        np.random.default_rng(0),
        make_kv_segments(CFG, SLOTS, segment_edges(CAPACITY, FIRST, FIRST), dtype),
    )
    numbers = [normal(rng, SLOTS, EDGES[-1], K, H) for _ in range(2)]
    for slot in range(SLOTS):
        for start in range(0, EDGES[-1], FIRST):
            k, v = (side[slot : slot + 1, start : start + FIRST] for side in numbers)
            _, layer = PATHS["XLA"](
                normal(rng, 1, FIRST, N, H), k, v, layer_at(segments, rows_of([start], [slot]))
            )
            segments = KVSegments((layer.k,) * 2, (layer.v,) * 2)
    return segments, numbers


def filled_for(attention, dtype: str) -> tuple[KVSegments, list[np.ndarray]]:
    """`filled`, in one segment for the kernel, which has no others."""
    segments, numbers = filled(dtype)
    if attention is PATHS["XLA"]:
        return segments, numbers
    join = lambda layer: (jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=2), *layer),)
    return KVSegments(*(tuple(map(join, side)) for side in segments)), numbers


@EVERY_DTYPE
def test_segments_double_up_to_the_capacity_and_hold_what_is_written(dtype):
    segments, (k, v) = filled(dtype)
    assert segments.edges == EDGES
    assert segments.slots == SLOTS
    assert segment_edges(5, 8, 8) == (0, 8)
    assert segment_edges(129, 128, 128) == (0, 128, 256)
    exact = {"float32": 0, "bfloat16": 2**-8, "int8": 0.5 / 127 + 1e-6}[dtype]
    for layer, numbers in ((segments.k[0], k), (segments.v[0], v)):
        largest = np.abs(numbers).max(-1).transpose(0, 2, 1)[..., None]
        assert (np.abs(joined(layer) - numbers.transpose(0, 2, 1, 3)) <= exact * largest).all()


def check_attention(attention, dtype: str, segments: KVSegments, q, k, v, starts, slots) -> None:
    """Each row's tokens see in its slot what plain attention sees over the very keys and values
    that are stored.
    """
    out, layer = attention(q, k, v, layer_at(segments, rows_of(starts, slots)))
    rounded = np.asarray(jnp.asarray(q, "bfloat16") if dtype == "bfloat16" else q, np.float64)
    keys, values = joined(layer.k), joined(layer.v)
    for row, (start, slot) in enumerate(zip(starts, slots)):
        expected = plain(rounded[row], keys[slot], values[slot], start + np.arange(q.shape[1]))
        np.testing.assert_allclose(out[row], expected, rtol=0, atol=NEAR[dtype])


@pytest.mark.law("cache equivalence")
@EVERY_DTYPE
def test_a_step_and_a_chunk_see_what_plain_attention_sees_at_every_length_in_every_slot(attention, dtype):
    """Rows stand at different lengths: all from 1 to the capacity, the ones around every edge among
    them.
    """
    (segments, _), rng = filled_for(attention, dtype), np.random.default_rng(1)
    for lengths in np.stack([np.roll(np.arange(EDGES[-1]), 31 * row) for row in range(SLOTS)], 1):
        check_attention(attention, dtype, segments, *new_qkv(rng, SLOTS), lengths, range(SLOTS))
    for start in range(0, EDGES[-1], FIRST):
        check_attention(
            attention, dtype, segments, *new_qkv(rng, 1, FIRST), [start], [start // FIRST % SLOTS]
        )


@EVERY_DTYPE
def test_int8_keys_and_values_are_near_the_ones_that_came(attention, dtype):
    """Against the numbers before they were rounded: what a type costs, root mean square, of outputs
    near 0.3.
    """
    segments, (k, v) = filled_for(attention, dtype)
    q = normal(np.random.default_rng(3), SLOTS, 1, N, H)
    at = np.full(SLOTS, EDGES[-1] - 1)
    out, _ = attention(q, k[:, -1:], v[:, -1:], layer_at(segments, rows_of(at, range(SLOTS))))
    wide = lambda row: (x.astype(np.float64) for x in (q[row], k[row].swapaxes(0, 1), v[row].swapaxes(0, 1)))
    expected = np.array([plain(*wide(row), at[:1]) for row in range(SLOTS)])
    error = np.sqrt(((np.asarray(out) - expected) ** 2).mean() / (expected**2).mean())
    assert error < {"float32": 1e-6, "bfloat16": 6e-3, "int8": 1e-2}[dtype]


@pytest.mark.law("batch invariance")
@EVERY_DTYPE
def test_a_row_is_the_same_to_the_bit_however_far_the_others_are(attention, dtype):
    """Alone among rows that are not in use, and beside rows that reach further, whose slots hold
    NaN and infinity.
    """
    (segments, _), rng = filled_for(attention, dtype), np.random.default_rng(4)
    qkv = new_qkv(rng, 1)
    for length in (0, 7, 8, 15, 16, 40, 63, 64, 71):
        results = set()
        for slot in range(SLOTS):
            own = np.arange(SLOTS) == slot
            for other_length, rubbish in ((-1, np.nan), (0, np.inf), (71, np.nan), (7, 1.0)):

                def place(array, slot=slot, own=own, rubbish=rubbish):
                    array = jnp.roll(array, slot, axis=0)
                    keep = own.reshape(-1, *[1] * (array.ndim - 1))
                    return array if array.dtype == jnp.int8 else jnp.where(keep, array, rubbish)

                rows = rows_of(np.where(own, length, other_length), range(SLOTS))
                company = [
                    np.where(own.reshape(-1, 1, 1, 1), x, normal(rng, SLOTS, *x.shape[1:])) for x in qkv
                ]
                out, layer = attention(*company, layer_at(jax.tree.map(place, segments), rows))
                bits = [np.asarray(leaf)[slot].tobytes() for leaf in jax.tree.leaves((layer.k, layer.v))]
                results.add((np.asarray(out)[slot].tobytes(), *bits))
        assert len(results) == 1, length


@pytest.mark.law("isolation")
@EVERY_DTYPE
def test_what_a_row_may_not_see_does_not_matter(attention, dtype):
    """Behind its own position other numbers, in its own slot: the same bits. (Cleared slots hold no
    NaN there.)
    """
    segments, _ = filled_for(attention, dtype)
    new, rows = new_qkv(np.random.default_rng(5), SLOTS), rows_of([3, 15, 16, 33, 70], range(SLOTS))

    def changed(array, start: int):
        beyond = (start + np.arange(array.shape[2])) > np.asarray(rows.position)[:, None]
        beyond = beyond.reshape(SLOTS, 1, -1, *[1] * (array.ndim - 3))
        return jnp.where(beyond, (3 * array).astype(array.dtype), array)

    change = lambda layer: tuple(
        jax.tree.map(functools.partial(changed, start=start), segment)
        for segment, start in zip(layer, segments.edges)
    )
    other = KVSegments((change(segments.k[0]),), (change(segments.v[0]),))
    ours, expected = (attention(*new, layer_at(each, rows))[0] for each in (other, segments))
    assert np.asarray(ours).tobytes() == np.asarray(expected).tobytes()


def test_rows_are_written_where_they_are_sent_and_nowhere_else(attention):
    """Twice, once, not at all; never beyond the last segment or before the first."""
    segments, _ = filled_for(attention, "float32")
    rng = np.random.default_rng(6)
    k = normal(rng, SLOTS, 1, K, H)
    position, source, target = [5, 72, -1, 16, 71], [0, 1, 2, 3, 4, 0, 3, 3], [0, 1, 2, 3, 4, 1, 0, SLOTS]
    _, layer = attention(
        normal(rng, SLOTS, 1, N, H), k, k, layer_at(segments, rows_of(position, target, source))
    )
    expected = joined(segments.k[0])
    for slot, at, row in ((0, 5, 0), (1, 5, 0), (3, 16, 3), (0, 16, 3), (4, 71, 4)):
        expected[slot, :, at] = k[row, 0]
    np.testing.assert_array_equal(joined(layer.k), expected)


def all_arrays(segments: KVSegments) -> list[np.ndarray]:
    """A writable copy of all that lies in segments: of the 2 L layers, the numbers (and the
    scales), (B, K, S, ...).
    """
    layers = [zip(*map(jax.tree.leaves, layer)) for layer in (*segments.k, *segments.v)]
    return [
        np.concatenate([np.asarray(array) for array in arrays], axis=2)
        for layer in layers
        for arrays in layer
    ]


def check_same(segments: KVSegments, expected: list[np.ndarray]) -> None:
    for ours, array in zip(all_arrays(segments), expected, strict=True):
        assert (ours.tobytes(), ours.dtype) == (array.tobytes(), array.dtype)


def reached(reach: int) -> int:
    """The end of the last segment that holds a position below `reach`."""
    return min(edge for edge in EDGES if edge >= min(reach, EDGES[-1]))


read_chunk, write_chunk = jax.jit(segmented.read_chunk, static_argnums=3), jax.jit(segmented.write_chunk)
clear, copy = jax.jit(segmented.clear_slot), jax.jit(segmented.copy_slot)


@EVERY_DTYPE
def test_a_chunk_that_is_read_and_written_arrives_and_touches_nothing_else(dtype):
    segments, _ = filled(dtype)
    for start in range(0, EDGES[-1], FIRST):
        chunk = read_chunk(segments, np.int32(2), np.int32(start), FIRST)
        for slot, count in ((0, FIRST), (4, 1), (SLOTS, FIRST)):
            expected = all_arrays(segments)
            for array in expected:
                array[slot : slot + 1, :, start : start + count] = array[2, :, start : start + count]
                array[slot : slot + 1, :, start + count : start + FIRST] = 0
            spoilt = jax.tree.map(
                lambda x, n=count: x if x.dtype == jnp.int8 else x.at[:, :, n:].set(np.nan), chunk
            )
            check_same(
                write_chunk(segments, spoilt, np.int32(slot), np.int32(start), np.int32(count)), expected
            )


@EVERY_DTYPE
@settings(max_examples=15)
@given(st.permutations(range(SLOTS)), st.integers(0, 3), st.integers(0, EDGES[-1] + 9))
def test_a_slot_is_cleared_and_copied_as_far_as_it_will_be_read_and_others_stay(dtype, order, count, reach):
    segments, _ = filled(dtype)
    slot, targets = order[0], [*order[1 : 1 + count], *[SLOTS] * (3 - count)]
    expected = all_arrays(segments)
    for array in expected:
        array[targets[:count], :, : reached(reach)] = array[slot, :, : reached(reach)]
    check_same(copy(segments, np.int32(slot), np.array(targets, np.int32), np.int32(reach)), expected)

    spoilt = jax.tree.map(
        lambda array: array if array.dtype == jnp.int8 else array.at[slot].set(np.nan), segments
    )
    for cleared in (slot, SLOTS):
        expected = all_arrays(spoilt)
        for array in expected:
            array[cleared : cleared + 1, :, : reached(reach)] = 0
        check_same(clear(spoilt, np.int32(cleared), np.int32(reach)), expected)
