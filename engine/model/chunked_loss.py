"""The loss where not all logits may exist at once: of a few rows at a time, or of a chunk of the vocabulary.

A head that is frozen or only read goes by rows. With p the softmax of a row's logits, the gradient
of its loss by the hidden state is (p - one-hot) W^T, computed in the forward pass while the logits
exist; the backward pass only scales it. An int8 head is also multiplied a few columns at a time:
widened, it would be larger than its logits.

A trained head goes by chunks of the vocabulary: by rows the gradient of its matrix would be a sum
of one a piece, which takes 3 times the memory of a chunk's (943 MB for 310, 4,096 rows of 49,152
logits).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from engine.mesh import layout
from engine.model.config import ModelConfig
from engine.model.layers import MASKED
from engine.model.paths import Params
from engine.model.weights.matmul import project
from engine.model.weights.plain import as_weight

COLUMNS = 8192  # of an int8 head that are widened at once
CHUNK = 4096  # columns of the vocabulary a chunk


class _Columns(NamedTuple):
    """Some columns of the logits, or of their gradient: those from `start` on, (rows, columns)."""

    start: int
    values: Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def row_losses(weight: Any, hidden: Array, targets: Array, tied: bool, size: int) -> Array:
    """hidden (M, D), targets (M,) int32 -> (M,) float32 nats, holding the logits of `size` rows at
    a time on a device.
    """
    head = as_weight(weight, axis=int(not tied))
    losses = []
    for rows, labels in _parts(size, hidden, targets):
        pieces = _logits(head, rows)
        losses.append(_normalizer(pieces) - _picked(pieces, labels))
    return layout.join(losses, layout.spread_shards(len(hidden)))


def _parts(size: int, *arrays: Array) -> list[tuple[Array, ...]]:
    """Cuts arrays (M, ...) into parts of `size` rows of each device; a part has its rows of each array."""
    length = len(arrays[0]) // layout.spread_shards(len(arrays[0]))
    return [tuple(layout.cut_rows(array, at, size) for array in arrays) for at in range(0, length, size)]


def _normalizer(pieces: list[_Columns]) -> Array:
    """Returns log sum exp of all columns, (rows,)."""
    return functools.reduce(jnp.logaddexp, [jax.nn.logsumexp(piece.values, axis=-1) for piece in pieces])


def _picked(pieces: list[_Columns], targets: Array) -> Array:
    """Returns the logit of each target, (rows,)."""
    picked = jnp.zeros(len(targets))
    for start, values in pieces:
        at = jnp.clip(targets - start, 0, values.shape[1] - 1)
        is_here = at == targets - start
        logits_here = jnp.take_along_axis(values, at[:, None], axis=-1)[:, 0]
        picked = jnp.where(is_here, logits_here, picked)
    return picked


def _logits(head: Any, x: Array) -> list[_Columns]:
    """Returns the logits of x (rows, D), all columns at once or of an int8 head COLUMNS at a time."""
    starts = head.column_starts(COLUMNS)
    if not starts:
        return [_Columns(0, head.times(x, jnp.float32))]
    pieces: list[_Columns] = []
    for start in starts:
        # One after the other: held by tests/laws/test_barriers.py, as are the barriers of
        # `_head_backward` and `_forward`.
        head, x, _ = jax.lax.optimization_barrier((head, x, pieces[-1:]))
        part = head.column_piece(start, start + COLUMNS)
        pieces.append(_Columns(start, part.times(x, jnp.float32)))
    return pieces


def _slope(pieces: list[_Columns], targets: Array) -> list[_Columns]:
    """Returns p - one-hot, the gradient of each row's loss by its logits."""
    whole = _normalizer(pieces)[:, None]
    slopes = []
    for start, values in pieces:
        is_target = start + jnp.arange(values.shape[1]) == targets[:, None]
        slopes.append(_Columns(start, jnp.exp(values - whole) - is_target))
    return slopes


def _head_backward(head: Any, rows: Array, slopes: list[_Columns]) -> tuple[Array, Array | None]:
    """Returns the gradients of rows and head for the gradient of the logits."""
    if not head.column_starts(COLUMNS):
        return head.gradients(rows, slopes[0].values)
    total = jnp.zeros(rows.shape)
    for start, g in slopes:
        head, total = jax.lax.optimization_barrier((head, total))
        total = total + head.column_piece(start, start + COLUMNS).gradients(rows, g)[0]
    return total.astype(rows.dtype), None


def _forward(weight: Any, hidden: Array, targets: Array, tied: bool, size: int):
    head = as_weight(weight, axis=int(not tied))
    losses: list[Array] = []
    slopes: list[Array] = []
    for rows, labels in _parts(size, hidden, targets):
        if slopes:  # one part after another, or all logits might exist at once
            rows = jax.lax.optimization_barrier((rows, slopes[-1]))[0]
        pieces = _logits(head, rows)
        losses.append(_normalizer(pieces) - _picked(pieces, labels))
        slopes.append(_head_backward(head, rows, _slope(pieces, labels))[0])
    groups = layout.spread_shards(len(hidden))
    return layout.join(losses, groups), (weight, hidden, targets, layout.join(slopes, groups))


def _backward(tied: bool, size: int, residuals: tuple[Any, Array, Array, Array], g: Array):
    weight, hidden, targets, slope = residuals
    head = as_weight(weight, axis=int(not tied))
    # XLA drops this loop unless the head trains.
    dweight: Array | None = None
    for rows, labels, row_g in _parts(size, hidden, targets, g):
        slopes = _slope(_logits(head, rows), labels)
        dlogits = [_Columns(start, values * row_g[:, None]) for start, values in slopes]
        _, part = _head_backward(head, rows, dlogits)
        if dweight is None or part is None:
            dweight = part
        else:
            dweight = dweight + part
    return dweight, (slope.astype(jnp.float32) * g[:, None]).astype(hidden.dtype), None


row_losses.defvjp(_forward, _backward)


def chunked_losses(cfg: ModelConfig, params: Params, hidden: Array, targets: Array, chunk: int) -> Array:
    """hidden (B, T, D), targets (B, T) -> (B, T) nats, holding (B, T, chunk) logits at a time,
    forward and backward.

    A running maximum and sum give the log-sum-exp (Milakov & Gimelshein 2018, algorithm 3); the
    backward pass makes each chunk's logits again.
    """
    B, T, D = hidden.shape
    hidden = layout.spread_rows(hidden.reshape(-1, D))
    targets = targets.reshape(-1)
    columns = as_weight(params[cfg.head_path]).dense()
    if cfg.tied:
        columns = columns.T
    count = -(-cfg.vocab // chunk)
    columns = jnp.pad(columns, ((0, 0), (0, count * chunk - cfg.vocab)))
    chunks = columns.reshape(D, count, chunk).transpose(1, 0, 2).astype(hidden.dtype)

    def add_chunk(carry: Any, part: tuple[Array, Array]) -> tuple[Any, None]:
        highest, total, picked = carry
        weight, start = part
        logits = project(hidden, weight, jnp.float32)
        logits = jnp.where(start + jnp.arange(chunk) < cfg.vocab, logits, -jnp.inf)
        new_highest = jnp.maximum(highest, logits.max(-1))
        total = total * jnp.exp(highest - new_highest) + jnp.exp(logits - new_highest[:, None]).sum(-1)
        at = targets - start
        here = (at >= 0) & (at < chunk)
        logit = jnp.take_along_axis(logits, jnp.clip(at, 0, chunk - 1)[:, None], axis=-1)[:, 0]
        return (new_highest, total, jnp.where(here, logit, picked)), None

    rows = hidden.shape[0]
    start = (jnp.full(rows, MASKED), jnp.zeros(rows), jnp.zeros(rows))
    (highest, total, picked), _ = jax.lax.scan(
        jax.checkpoint(add_chunk), start, (chunks, jnp.arange(count) * chunk)
    )
    return (highest + jnp.log(total) - picked).reshape(B, T)
