"""KVSegments: the KV cache of many slots, cut by position, so that XLA multiplies only segments that a row has reached.

Segments double in length from the second on. Each segment of all slots is one array: a matrix
product on a CPU reads a whole array in place, but would copy a part of one first. Attention goes
segment by segment with a running softmax (Milakov & Gimelshein 2018, 1805.02867) and skips segments
that no row has reached. What a segment adds to a row that has not reached it is discarded, so a
row's bits depend on its own tokens alone. `in_c.py` attends by kernels in C.
"""

import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from engine.model.config import ModelConfig
from engine.model.layers import MASKED, einsum32, group_heads, join_heads
from engine.model.ops import ops
from engine.model.weights.int8 import join_digits, round_rows, two_digit_rows

KVDtype = Literal["bfloat16", "float32", "int8"]


class QuantizedKV(NamedTuple):
    """Keys or values: values (B, K, C, H) int8, scale (B, K, C) float32."""

    values: Array
    scale: Array


KVArray = Array | QuantizedKV
LayerSegments = tuple[KVArray, ...]  # the keys or the values of one layer


class CacheRows(NamedTuple):
    """The positions of a call's R rows, the slots that they read, and those that their keys and
    values are written to; int32.

    Row r holds T tokens from position[r] (R,) on, or none if that is -1, and reads slot[r] (R,).
    Without the kernel in C that is slot r, unless there is one row or one slot. Write u (U,) puts
    row source[u] into slot target[u], but not where that is no slot or beyond the last segment.
    `is_token` (R, T) bool: False for padding at a row's end; None where there is none.
    """

    position: Array
    slot: Array
    source: Array
    target: Array
    is_token: Array | None = None


class SegmentedLayer(NamedTuple):
    """One layer of a SegmentedCache."""

    k: LayerSegments
    v: LayerSegments
    rows: CacheRows
    destinations: tuple[Array, ...]

    @property
    def query_dtype(self) -> Any:
        """The type in which queries meet the stored keys."""
        stored = self.k[0]
        if isinstance(stored, QuantizedKV):
            return jnp.float32
        return stored.dtype

    def attend(self, q: Array, k: Array, v: Array) -> tuple[Array, "SegmentedLayer"]:
        """q (R, T, N, H) scaled by H ** -0.5, k and v (R, T, K, H) -> (R, T, N * H) in q's dtype,
        and the layer with k and v.

        A query at position p sees positions 0 .. p of its slot, this call's own among them. Padding
        gets keys and values of 0.
        """
        return attend_by_xla(q, k, v, self)


class KVSegments(NamedTuple):
    """k and v: for each layer and each segment, the keys or values (B, K, C, H) of its C positions
    in all slots.
    """

    k: tuple[LayerSegments, ...]
    v: tuple[LayerSegments, ...]

    @property
    def layer_type(self) -> type[SegmentedLayer]:
        return SegmentedLayer

    @property
    def slots(self) -> int:
        return jax.tree.leaves(self.k)[0].shape[0]

    @property
    def edges(self) -> tuple[int, ...]:
        """The position at which each segment starts, and S."""
        return _edges(self.k[0])


class SegmentedCache(NamedTuple):
    """The cache of one call of `forward`. `destinations`: for each segment (U, 2) int32, slot and
    position of each write.
    """

    segments: KVSegments
    rows: CacheRows
    destinations: tuple[Array, ...]

    def layer(self, i: int) -> SegmentedLayer:
        return self.segments.layer_type(self.segments.k[i], self.segments.v[i], self.rows, self.destinations)

    def with_layers(self, layers: Sequence[SegmentedLayer]) -> "SegmentedCache":
        """Returns this cache with the segments of these layers."""
        k, v, *_ = zip(*layers)
        return self._replace(segments=self.segments._replace(k=k, v=v))


def segmented_cache(segments: KVSegments, rows: CacheRows) -> SegmentedCache:
    """Makes the cache of one call."""
    destinations = _destinations(segments.edges, rows.target, rows.position[rows.source])
    return SegmentedCache(segments, rows, destinations)


def segment_edges(capacity: int, first: int, chunk: int) -> tuple[int, ...]:
    """Returns where segments for `capacity` tokens start, and where the last ends: at a multiple of
    `chunk`.

    The first has `first` positions, each other one as many as all before it, but the last perhaps
    fewer. A `first` of at least the capacity makes one segment.
    """
    end = math.ceil(capacity / chunk) * chunk
    if first >= capacity:
        return (0, end)
    edges = [0, first]
    while edges[-1] < end:
        edges.append(min(2 * edges[-1], end))
    return tuple(edges)


def make_kv_segments(
    cfg: ModelConfig,
    slots: int,
    edges: Sequence[int],
    dtype: KVDtype = "bfloat16",
    cache: type[KVSegments] = KVSegments,
) -> KVSegments:
    """Makes an empty cache, with segments between `edges`, for as many texts as there are slots."""

    def empty(length: int) -> KVArray:
        shape = (slots, cfg.kv_heads, length, cfg.head_dim)
        if dtype == "int8":
            return QuantizedKV(jnp.zeros(shape, jnp.int8), jnp.zeros(shape[:-1], jnp.float32))
        return jnp.zeros(shape, jnp.dtype(dtype))

    def layers() -> tuple[LayerSegments, ...]:
        lengths = [stop - start for start, stop in itertools.pairwise(edges)]
        return tuple(tuple(map(empty, lengths)) for _ in range(cfg.layers))

    return cache(layers(), layers())


def read_chunk(segments: KVSegments, slot: Array, start: Array, length: int) -> KVArray:
    """Copies out the keys, then the values, of `length` positions of a slot from `start` on: (2 L,
    K, length, H).
    """
    edges = segments.edges

    def read(segment: int) -> KVArray:
        @jax.jit(inline=True)  # traced once for all layers
        def cut(array: Array) -> Array:
            starts: tuple[Any, ...] = (slot, 0, start - edges[segment], *[0] * (array.ndim - 3))
            sizes = (1, array.shape[1], length, *array.shape[3:])
            return jax.lax.dynamic_slice(array, starts, sizes)[0]

        def stack(*arrays: Array) -> Array:
            return jnp.stack([cut(array) for array in arrays])

        layers = (layer[segment] for layer in (*segments.k, *segments.v))
        return jax.tree.map(stack, *layers)

    segment_of_start = jnp.sum(start >= jnp.array(edges[1:-1], jnp.int32))
    readers = [functools.partial(read, segment) for segment in range(len(edges) - 1)]
    return jax.lax.switch(segment_of_start, readers)


def write_chunk(segments: KVSegments, chunk: KVArray, slot: Array, start: Array, count: Array) -> KVSegments:
    """Writes the first `count` positions of a chunk of `read_chunk` into a slot from `start` on,
    and zeros for the others.
    """
    L = len(segments.k)
    destinations = _destinations(segments.edges, slot[None], start[None])

    def clear_others(array: Array) -> Array:
        is_first = jnp.arange(array.shape[2]).reshape(-1, *[1] * (array.ndim - 3)) < count
        return jnp.where(is_first, array, 0)

    chunk = jax.tree.map(clear_others, chunk)
    layers = []
    for i, layer in enumerate((*segments.k, *segments.v)):
        part = jax.tree.map(operator.itemgetter(slice(i, i + 1)), chunk)
        layers.append(_write(layer, part, destinations))
    return segments._replace(k=tuple(layers[:L]), v=tuple(layers[L:]))


def map_segments(f: Callable[..., KVArray], segments: KVSegments, *each: Sequence[Any]) -> KVSegments:
    """Returns the segments f(segment, ...) of each layer's keys and values; `each` has an argument
    for every segment.
    """

    def map_layers(layers: tuple[LayerSegments, ...]) -> tuple[LayerSegments, ...]:
        return tuple(tuple(map(f, layer, *each)) for layer in layers)

    return segments._replace(k=map_layers(segments.k), v=map_layers(segments.v))


def clear_slot(segments: KVSegments, slot: Array, max_positions: Array) -> KVSegments:
    """Zeros a slot's segments that begin below `max_positions`, so that no NaN of another text is
    left there.
    """

    @jax.jit(inline=True)  # traced once for the many arrays of a shape
    def clear(array: Array, at: Array) -> Array:
        return _scatter(array, jnp.zeros((1, *array.shape[1:]), array.dtype), at)

    slots = [jnp.where(edge < max_positions, slot, segments.slots) for edge in segments.edges[:-1]]
    starts = [jnp.stack([slot, 0])[None] for slot in slots]

    def clear_segment(segment: KVArray, at: Array) -> KVArray:
        return jax.tree.map(functools.partial(clear, at=at), segment)

    return map_segments(clear_segment, segments, starts)


def copy_slot(segments: KVSegments, slot: Array, targets: Array, max_positions: Array) -> KVSegments:
    """Copies a single sequence's segments that begin below `max_positions` to the slots targets
    (X,) int32, whose rows check its draft tokens. A target of no slot is skipped.
    """
    L = len(segments.k)
    at = jnp.stack([targets, jnp.zeros_like(targets)], axis=1)

    @jax.jit(inline=True)
    def copy_array(array: Array) -> Array:
        content = jax.lax.dynamic_index_in_dim(array, slot, 0)
        return _scatter(array, jnp.broadcast_to(content, (len(targets), *array.shape[1:])), at)

    def copy_all(layers: tuple[KVArray, ...]) -> Any:
        return jax.tree.map(copy_array, layers)

    def copy_segment(layers: tuple[KVArray, ...], start: int) -> Any:
        return jax.lax.cond(start < max_positions, copy_all, _unchanged, layers)

    layers = tuple(zip(*map(copy_segment, zip(*segments.k, *segments.v), segments.edges)))
    return segments._replace(k=layers[:L], v=layers[L:])


def attend_by_xla(q: Array, k: Array, v: Array, layer: SegmentedLayer) -> tuple[Array, SegmentedLayer]:
    """Writes the keys and values, then attends segment by segment. Arguments as of
    `SegmentedLayer.attend`.
    """
    rows = layer.rows
    new = stored_heads(k, v, layer)
    queries = group_heads(q.astype(layer.query_dtype), k.shape[2])
    R, K, G, T, H = queries.shape
    layer = write_new(layer, *new)
    queries = queries.reshape(R, K, G * T, H)
    positions = jnp.where(rows.position[:, None] < 0, -1, rows.position[:, None] + jnp.arange(T))
    positions = jnp.tile(positions, (1, G))
    is_shared = R > 1 and jax.tree.leaves(layer.k)[0].shape[0] == 1  # all rows read one slot
    if is_shared:
        queries = queries.swapaxes(0, 1).reshape(1, K, R * G * T, H)
        positions = positions.reshape(1, -1)
    out = _attend(queries, positions, layer)
    if is_shared:
        out = out.reshape(K, R, G * T, H).swapaxes(0, 1)
    return join_heads(out.reshape(R, K, G, T, H)).astype(q.dtype), layer


def stored_heads(k: Array, v: Array, layer: SegmentedLayer) -> tuple[KVArray, KVArray]:
    """k and v (R, T, K, H) -> keys and values (R, K, T, H) as the layer stores them, 0 for padding."""

    def to_stored(new: Array) -> KVArray:
        new = new.transpose(0, 2, 1, 3)
        stored = layer.k[0]
        if isinstance(stored, Array):
            return new.astype(stored.dtype)
        values, scale = round_rows(new)
        return QuantizedKV(values, scale[..., 0])

    is_token = layer.rows.is_token
    return to_stored(mask_padding(k, 0, is_token)), to_stored(mask_padding(v, 0, is_token))


def mask_padding(x: Array, other: float, is_token: Array | None) -> Array:
    """x (R, T, ...) -> x, and `other` for padding."""
    if is_token is None:
        return x
    return jnp.where(jnp.expand_dims(is_token, range(2, x.ndim)), x, other)


def write_new[Layer: SegmentedLayer](layer: Layer, keys: KVArray, values: KVArray) -> Layer:
    """Returns the layer with the keys and values (R, K, T, H) of each row in the slots that it is
    written to.
    """

    def write(side: LayerSegments, new: KVArray) -> LayerSegments:
        return _write(side, jax.tree.map(operator.itemgetter(layer.rows.source), new), layer.destinations)

    return layer._replace(k=write(layer.k, keys), v=write(layer.v, values))


def _attend(q: Array, positions: Array, layer: SegmentedLayer) -> Array:
    """q (R, K, M, H), positions (R, M) -> (R, K, M, H) float32."""
    R, K, M, H = q.shape
    if M == 1 and ops().pads_lone_row:
        two_queries = jnp.concatenate([q, q], axis=2)
        two_positions = jnp.concatenate([positions, positions], axis=1)
        return _attend(two_queries, two_positions, layer)[:, :, :1]
    slot = None
    if R == 1:
        slot = layer.rows.slot[0]
    state = Mixture(
        best=jnp.full((R, K, M), MASKED), total=jnp.zeros((R, K, M)), mixed=jnp.zeros((R, K, M, H))
    )
    queries: Any = q
    if isinstance(layer.k[0], QuantizedKV):
        queries = two_digit_rows(q)
    longest = positions.max()
    for keys, values, start in zip(layer.k, layer.v, _edges(layer.k)):
        add = functools.partial(attend_segment, queries, positions - start, keys, values, slot)
        with jax.named_scope(f"segment_{start}"):
            if start == 0:
                state = add(state)
            else:
                state = jax.lax.cond(longest >= start, add, _unchanged, state)
    return state.mixed / state.total[..., None]


class Mixture(NamedTuple):
    """Attention so far: each query's best score and sum of weights (R, K, M), and its weighted
    values (R, K, M, H).
    """

    best: Array
    total: Array
    mixed: Array


def attend_segment(
    q: Any, last: Array, keys: KVArray, values: KVArray, slot: Array | None, state: Mixture
) -> Mixture:
    """Adds a segment's keys and values (B, K, C, H) to the attention of queries (R, K, M, H).

    last (R, M): the last position of the segment that each query sees; below 0 the query's state
    stays, to the bit. `slot` is that of a single row; without it row r reads slot r.
    """
    if slot is not None:

        def of_slot(array: Array) -> Array:
            return jax.lax.dynamic_index_in_dim(array, slot, 0)

        keys = jax.tree.map(of_slot, keys)
        values = jax.tree.map(of_slot, values)
    mask = (jnp.arange(jax.tree.leaves(keys)[0].shape[2]) <= last[:, :, None])[:, None]
    scores = jnp.where(mask, _scores(q, keys), MASKED)
    best = jnp.maximum(state.best, scores.max(-1))
    weights = jnp.exp(scores - best[..., None])
    factor = jnp.exp(state.best - best)
    mixed = state.mixed * factor[..., None] + _mix(weights, values, mask)
    is_reached = (last >= 0)[:, None]
    return Mixture(
        best=jnp.where(is_reached, best, state.best),
        total=jnp.where(is_reached, state.total * factor + weights.sum(-1), state.total),
        mixed=jnp.where(is_reached[..., None], mixed, state.mixed),
    )


def _scores(q: Any, keys: KVArray) -> Array:
    """q (R, K, M, H), as `two_digit_rows` for quantized keys, keys (R, K, C, H) -> (R, K, M, C) float32."""
    if not isinstance(keys, QuantizedKV):
        return einsum32("rkmh,rkch->rkmc", q, keys)
    digits, scale = q
    products = jnp.einsum("rkmh,rkch->rkmc", digits, keys.values, preferred_element_type=jnp.int32)
    return join_digits(products) * scale * keys.scale[:, :, None]


def _mix(weights: Array, values: KVArray, mask: Array) -> Array:
    """weights (R, K, M, C), values (R, K, C, H) -> (R, K, M, H) float32."""
    if not isinstance(values, QuantizedKV):
        return einsum32("rkmc,rkch->rkmh", weights.astype(values.dtype), values)
    # Beyond a row's end a scale may be a stale NaN, and 0 times NaN is NaN.
    digits, scale = two_digit_rows(jnp.where(mask, weights * values.scale[:, :, None], 0))
    products = jnp.einsum("rkmc,rkch->rkmh", digits, values.values, preferred_element_type=jnp.int32)
    return join_digits(products) * scale


def _unchanged(tree: Any) -> Any:
    return tree


def _edges(layer: LayerSegments) -> tuple[int, ...]:
    """Returns the position at which each segment starts, and S."""
    lengths = [jax.tree.leaves(segment)[0].shape[2] for segment in layer]
    return tuple(itertools.accumulate(lengths, initial=0))


def _destinations(edges: tuple[int, ...], slots: Array, positions: Array) -> tuple[Array, ...]:
    """Returns where writes to slots (U,) from positions (U,) on go: beyond the end of every segment
    but their own.
    """
    destinations = []
    for start, stop in itertools.pairwise(edges):
        inside = (positions >= start) & (positions < stop)
        at = jnp.where(inside, positions - start, stop - start)
        destinations.append(jnp.stack([slots, at], axis=1))
    return tuple(destinations)


def _write(layer: LayerSegments, new: KVArray, destinations: tuple[Array, ...]) -> LayerSegments:
    """Writes new (U, K, T, H), whose T tokens lie in one segment, at its destinations."""
    segments = []
    for segment, at in zip(layer, destinations):

        def scatter(array: Array, part: Array, at: Array = at) -> Array:
            return _scatter(array, part.astype(array.dtype), at)

        segments.append(jax.tree.map(scatter, segment, new))
    return tuple(segments)


@jax.jit(inline=True)
def _scatter(array: Array, new: Array, at: Array) -> Array:
    """Writes new (U, K, T, ...) into array (B, K, C, ...) at slot and start, `at` (U, 2); drops
    what does not fit.
    """
    window = tuple(range(1, new.ndim))
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=window, inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0, 2)
    )
    return jax.lax.scatter(array, at, new, numbers, mode=jax.lax.GatherScatterMode.FILL_OR_DROP)
