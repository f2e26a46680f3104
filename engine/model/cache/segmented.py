"""Spans: the keys and values of many slots, cut by position, so that a call multiplies only what somebody has reached.

A slot is room for one text. Its positions 0 .. S - 1 are cut into spans, each twice as long as all before it but the
second, and each span of all slots is one array: a matrix product on a CPU reads a whole array in place, while a part of
one would be copied first. Attention goes span by span with a running softmax (Milakov & Gimelshein 2018, 1805.02867)
and leaves out the spans that no row has reached. What a span adds to a row that has not reached it is discarded by
selection, so a row's numbers depend on its own length alone and not, to the bit, on how far others have come.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from engine.model.config import ModelConfig
from engine.model.layers import MASKED

Kind = Literal["bfloat16", "float32", "int8"]
FINE = 254  # steps of the second digit in one of the first


class Rounded(NamedTuple):
    """Keys or values as whole numbers: values (B, K, C, H) int8, scale (B, K, C) float32, one for each key or value."""

    values: Array
    scale: Array


Kept = Array | Rounded


class Spans(NamedTuple):
    """k and v: for each of the L layers, for each span, the keys or values (B, K, C, H) of its C positions in all slots."""

    k: tuple[tuple[Kept, ...], ...]
    v: tuple[tuple[Kept, ...], ...]

    @property
    def slots(self) -> int:
        """B"""
        return jax.tree.leaves(self.k)[0].shape[0]

    @property
    def edges(self) -> tuple[int, ...]:
        """Where spans start, and S at the end."""
        return edges_of(self.k[0])


class Rows(NamedTuple):
    """Where the R rows of a call stand, and where their keys and values are written.

    Row r holds T tokens from position[r] (R,) on; -1 where it is not in use. It reads slot r, or, where it is the only
    row, the slot it writes. Write u (U,) puts the row source[u] into the slot target[u]; a target that is no slot is
    not written, and neither is a position beyond the last span.
    """

    position: Array
    source: Array
    target: Array


Places = tuple[Array, ...]  # for each span, (U, 2) int32: the slot and the position in the span that each write goes to


class SpanLayer(NamedTuple):
    """One layer's part of Spans, the rows of the call, and where they are written."""

    k: tuple[Kept, ...]
    v: tuple[Kept, ...]
    rows: Rows
    places: Places


class SpanCache(NamedTuple):
    """What `forward` is given as its cache, and returns with the call's keys and values written. See `span_cache`."""

    spans: Spans
    rows: Rows
    places: Places

    def layer(self, i: int) -> SpanLayer:
        """What layer i reads and writes."""
        return SpanLayer(self.spans.k[i], self.spans.v[i], self.rows, self.places)

    def with_layers(self, layers: Sequence[SpanLayer]) -> "SpanCache":
        """The same with every layer replaced."""
        return self._replace(spans=Spans(tuple(layer.k for layer in layers), tuple(layer.v for layer in layers)))


def span_cache(spans: Spans, rows: Rows) -> SpanCache:
    """The cache of one call. Where its rows are written is told once, for it is the same in every layer."""
    places = places_of(spans.edges, rows.target, rows.position[rows.source])
    return SpanCache(spans, rows, jax.lax.optimization_barrier(places))  # else XLA works it out anew for each layer


def edges_of(layer: tuple[Kept, ...]) -> tuple[int, ...]:
    edges = [0]
    for kept in layer:
        edges.append(edges[-1] + jax.tree.leaves(kept)[0].shape[2])
    return tuple(edges)


def make_spans(cfg: ModelConfig, slots: int, capacity: int, first: int, kind: Kind = "bfloat16") -> Spans:
    """Empty spans for `slots` texts of `capacity` tokens, rounded up to a multiple of `first`, the shortest span's length."""
    edges = [0, first]
    while edges[-1] < capacity:
        edges.append(min(2 * edges[-1], -(-capacity // first) * first))

    def empty(length: int) -> Kept:
        shape = (slots, cfg.kv_heads, length, cfg.head_dim)
        if kind == "int8":
            return Rounded(jnp.zeros(shape, jnp.int8), jnp.zeros(shape[:-1], jnp.float32))
        return jnp.zeros(shape, jnp.dtype(kind))

    layer = lambda: tuple(empty(stop - start) for start, stop in itertools.pairwise(edges))
    layers = lambda: tuple(layer() for _ in range(cfg.layers))
    return Spans(layers(), layers())


def attention(q: Array, k: Array, v: Array, layer: SpanLayer) -> tuple[Array, SpanLayer]:
    """q (R, T, N, H) scaled by H ** -0.5, k and v (R, T, K, H) -> (R, T, N * H) in q's dtype, and the layer with k, v written.

    A query at position p sees the positions 0 .. p of its slot, this call's own among them.
    """
    R, T, N, H = q.shape
    K = k.shape[2]
    G = N // K
    rows = layer.rows
    layer = SpanLayer(
        written(layer.k, k.transpose(0, 2, 1, 3)[rows.source], layer.places),
        written(layer.v, v.transpose(0, 2, 1, 3)[rows.source], layer.places),
        rows,
        layer.places,
    )
    asked = q if isinstance(layer.k[0], Rounded) else q.astype(layer.k[0].dtype)
    queries = asked.reshape(R, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(R, K, G * T, H)
    positions = jnp.where(rows.position[:, None] < 0, -1, rows.position[:, None] + jnp.arange(T))
    out = _attended(queries, jnp.tile(positions, (1, G)), layer)
    return out.reshape(R, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(R, T, N * H).astype(q.dtype), layer


def places_of(edges: tuple[int, ...], slots: Array, positions: Array) -> Places:
    """Where slots (U,) are written from positions (U,) on: behind a span's end in every span but the one that it lies in."""

    def within(start: int, stop: int) -> Array:
        at = jnp.where((positions >= start) & (positions < stop), positions - start, stop - start)
        return jnp.stack([slots, at], axis=1)

    return tuple(within(start, stop) for start, stop in itertools.pairwise(edges))


def written(spans: tuple[Kept, ...], new: Array, places: Places) -> tuple[Kept, ...]:
    """A layer's spans with new (U, K, T, H) put at their places; T tokens lie in one span."""
    return placed(spans, _rounded(new) if isinstance(spans[0], Rounded) else new, places)


def placed(spans: tuple[Kept, ...], new: Kept, places: Places) -> tuple[Kept, ...]:
    """As `written`, for what is rounded already where the spans are."""
    return tuple(
        jax.tree.map(lambda array, part, at=at: put(array, part.astype(array.dtype), at), kept, new)
        for kept, at in zip(spans, places)
    )


def put(array: Array, new: Array, places: Array) -> Array:
    """array (B, K, C, ...) with new (U, K, T, ...) at [slot, :, at : at + T], places (U, 2); what does not fit is left out."""
    window = tuple(range(1, new.ndim))
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=window, inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0, 2)
    )
    return jax.lax.scatter(array, places, new, numbers, mode=jax.lax.GatherScatterMode.FILL_OR_DROP)


def taken(spans: Spans, slot: Array, start: Array, length: int) -> Kept:
    """Keys, then values, of `length` positions of a slot from `start` on, in all layers: (2 L, K, length, H)."""
    edges = spans.edges

    def part(span: int) -> Kept:
        def cut(array: Array) -> Array:
            sizes = (1, array.shape[1], length, *array.shape[3:])
            return jax.lax.dynamic_slice(array, (slot, 0, start - edges[span], *[0] * (array.ndim - 3)), sizes)[0]

        parts = [jax.tree.map(cut, layer[span]) for layer in (*spans.k, *spans.v)]
        return jax.tree.map(lambda *arrays: jnp.stack(arrays), *parts)

    which = jnp.sum(start >= jnp.array(edges[1:-1], jnp.int32))
    return jax.lax.switch(which, [lambda span=span: part(span) for span in range(len(edges) - 1)])


def given(spans: Spans, chunk: Kept, slot: Array, start: Array) -> Spans:
    """spans with what `taken` took put into a slot from `start` on."""
    places = places_of(spans.edges, slot[None], start[None])
    layers = [
        placed(layer, jax.tree.map(lambda array, i=i: array[i][None], chunk), places)
        for i, layer in enumerate((*spans.k, *spans.v))
    ]
    return Spans(tuple(layers[: len(spans.k)]), tuple(layers[len(spans.k) :]))


def cleared(spans: Spans, slot: Array, reach: Array) -> Spans:
    """spans with zeros in all of a slot's spans that hold a position below `reach`: no NaN of another text is left there."""
    return _slots_set(spans, slot[None], reach, lambda array: jnp.zeros((1, *array.shape[1:]), array.dtype))


def mirrored(spans: Spans, slot: Array, targets: Array, reach: Array) -> Spans:
    """spans with a slot's content below `reach` put into the slots targets (X,) as well; a target that is none is left out."""

    def copies(array: Array) -> Array:
        return jnp.broadcast_to(jax.lax.dynamic_index_in_dim(array, slot, 0), (len(targets), *array.shape[1:]))

    return _slots_set(spans, targets, reach, copies)


def _slots_set(spans: Spans, slots: Array, reach: Array, content: Callable[[Array], Array]) -> Spans:
    def whole(layer: tuple[Kept, ...]) -> tuple[Kept, ...]:
        done = []
        for kept, start in zip(layer, edges_of(layer)):
            to = jnp.where(start < reach, slots, spans.slots)
            whole_span = jnp.stack([to, jnp.zeros_like(to)], axis=1)
            done.append(jax.tree.map(lambda array, at=whole_span: put(array, content(array), at), kept))
        return tuple(done)

    return Spans(tuple(whole(layer) for layer in spans.k), tuple(whole(layer) for layer in spans.v))


def _attended(q: Array, positions: Array, layer: SpanLayer) -> Array:
    """q (R, K, M, H), positions (R, M) -> (R, K, M, H) float32."""
    R, K, M, H = q.shape
    if M == 1:  # a product with a single row takes a slow path on a CPU
        return _attended(jnp.concatenate([q, q], axis=2), jnp.concatenate([positions] * 2, axis=1), layer)[:, :, :1]
    lone = R == 1
    pick = lambda kept: jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer.rows.target[0], 0), kept) if lone else kept
    edges, longest = edges_of(layer.k), positions.max()
    state = (jnp.full((R, K, M), MASKED), jnp.zeros((R, K, M)), jnp.zeros((R, K, M, H)))
    asked = _two_digits(q) if isinstance(layer.k[0], Rounded) else q
    for keys, values, start, stop in zip(layer.k, layer.v, edges, edges[1:]):
        last = positions - start  # of the span's own places, the last that each query sees

        def added(best: Array, total: Array, mixed: Array, keys=keys, values=values, last=last, length=stop - start):
            mask = (jnp.arange(length) <= last[:, :, None])[:, None]
            scores = jnp.where(mask, _scores(asked, pick(keys)), MASKED)
            higher = jnp.maximum(best, scores.max(-1))
            weights, factor = jnp.exp(scores - higher[..., None]), jnp.exp(best - higher)
            more = mixed * factor[..., None] + _mixed(weights, pick(values), mask)
            here = (last >= 0)[:, None]
            return (
                jnp.where(here, higher, best),
                jnp.where(here, total * factor + weights.sum(-1), total),
                jnp.where(here[..., None], more, mixed),
            )

        with jax.named_scope(f"span_{start}"):
            state = jax.lax.cond(longest >= start, added, lambda *state: state, *state) if start else added(*state)
    _, total, mixed = state
    return mixed / total[..., None]


def _scores(q: Any, keys: Kept) -> Array:
    """q (R, K, M, H), in two digits where keys are rounded, keys (R, K, C, H) -> (R, K, M, C) float32."""
    if not isinstance(keys, Rounded):
        return jnp.einsum("rkmh,rkch->rkmc", q, keys, preferred_element_type=jnp.float32)
    digits, scale = q
    products = jnp.einsum("rkmh,rkch->rkmc", digits, keys.values, preferred_element_type=jnp.int32)
    return _joined(products) * scale[..., None] * keys.scale[:, :, None]


def _mixed(weights: Array, values: Kept, mask: Array) -> Array:
    """weights (R, K, M, C), values (R, K, C, H) -> (R, K, M, H) float32."""
    if not isinstance(values, Rounded):
        return jnp.einsum("rkmc,rkch->rkmh", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    # Beyond a row's end a scale may be stale, even NaN, and 0 times NaN is NaN.
    digits, scale = _two_digits(jnp.where(mask, weights * values.scale[:, :, None], 0))
    products = jnp.einsum("rkmc,rkch->rkmh", digits, values.values, preferred_element_type=jnp.int32)
    return _joined(products) * scale[..., None]


def _rounded(x: Array) -> Rounded:
    """x (..., H) -> int8 and a scale for each vector: the largest magnitude becomes 127."""
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(-1) / 127
    scale = jnp.where(scale == 0, 1, scale)
    return Rounded(jnp.round(x / scale[..., None]).astype(jnp.int8), scale)


def _two_digits(x: Array) -> tuple[Array, Array]:
    """x (..., M, H) -> (..., 2 M, H) int8, scale (..., M): x as two whole numbers, of which the second tells 1/254 of the
    first. The kept side is read once for both, so the second costs next to nothing."""
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(-1) / 127
    scale = jnp.where(scale == 0, 1, scale)
    steps = x / scale[..., None]
    whole = jnp.round(steps)
    rest = jnp.round((steps - whole) * FINE)
    return jnp.concatenate([whole, rest], axis=-2).astype(jnp.int8), scale


def _joined(products: Array) -> Array:
    """The products (..., 2 M, X) int32 of two digits -> (..., M, X) float32."""
    whole, rest = jnp.split(products.astype(jnp.float32), 2, axis=-2)
    return whole + rest / FINE
