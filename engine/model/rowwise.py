"""Cross-entropy behind a head that makes its logits a few rows at a time, for a vocabulary that is larger than the model.

With p the softmax of a row's logits, the gradient of its loss is (p - one-hot) W^T for what the head reads. It is made
in the forward pass, while the logits exist; going back only multiplies it by what the loss counts. No logits are kept
and none are made twice, unless the head itself learns, whose gradient x^T (p - one-hot) wants them again.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from engine.model import backward, int8
from engine.model.int8 import Int8


class Head(NamedTuple):
    """weight: (D, V), or (V, D) where the head is `tied` to the lookup table; gain (D,) is the last norm's."""

    weight: Array | Int8
    gain: Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def rowwise_losses(head: Head, hidden: Array, targets: Array, tied: bool, size: int) -> Array:
    """hidden (M, D), targets (M,) int32 -> (M,) float32 nats, holding the logits of `size` rows at a time."""
    return jnp.concatenate([
        jax.nn.logsumexp(logits := _logits(head, rows, tied), axis=-1) - _picked(logits, some)
        for rows, some in _parts(size, hidden, targets)
    ])  # fmt: skip


def _parts(size: int, *arrays: Array) -> list[tuple[Array, ...]]:
    return [tuple(array[at : at + size] for array in arrays) for at in range(0, len(arrays[0]), size)]


def _picked(logits: Array, targets: Array) -> Array:
    return jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]


def _logits(head: Head, rows: Array, tied: bool) -> Array:
    x = rows * head.gain.astype(rows.dtype)
    if isinstance(head.weight, Int8):
        return int8.int8_matmul(x, head.weight, jnp.float32)
    return (backward.matmul_rows if tied else backward.matmul)(x, head.weight, jnp.float32)


def _slope(logits: Array, targets: Array) -> Array:
    """Of each row's loss, (rows, V): p - one-hot."""
    return jax.nn.softmax(logits, axis=-1) - (jnp.arange(logits.shape[1]) == targets[:, None])


def _back(head: Head, rows: Array, g: Array, tied: bool) -> tuple[Array, Array | None]:
    """(what comes back to gain * rows, the weight's gradient)."""
    if isinstance(head.weight, Int8):
        return int8._converted_backward(jnp.float32, (head.weight, jnp.zeros((), rows.dtype)), g)[0], None
    rule = backward._matmul_rows_backward if tied else backward._matmul_backward
    return rule(jnp.float32, (rows * head.gain.astype(rows.dtype), head.weight), g)


def _forward(head: Head, hidden: Array, targets: Array, tied: bool, size: int):
    losses: list[Array] = []
    slopes: list[Array] = []
    for rows, some in _parts(size, hidden, targets):
        if slopes:  # one part after the other, or all logits might exist at once
            rows = jax.lax.optimization_barrier((rows, slopes[-1]))[0]
        logits = _logits(head, rows, tied)
        losses.append(jax.nn.logsumexp(logits, axis=-1) - _picked(logits, some))
        slopes.append(_back(head, rows, _slope(logits, some), tied)[0])
    return jnp.concatenate(losses), (head, hidden, targets, jnp.concatenate(slopes))


def _backward(tied: bool, size: int, kept: tuple[Head, Array, Array, Array], g: Array):
    head, hidden, targets, slope = kept
    slope = slope.astype(jnp.float32) * g[:, None]
    # Dead code unless the head learns.
    weight: Array | None = None
    for rows, some, count in _parts(size, hidden, targets, g):
        grown = _back(head, rows, _slope(_logits(head, rows, tied), some) * count[:, None], tied)[1]
        weight = grown if weight is None or grown is None else weight + grown
    gain = jnp.sum(hidden.astype(jnp.float32) * slope, axis=0).astype(head.gain.dtype)
    return Head(weight, gain), (slope * head.gain).astype(hidden.dtype), None  # type: ignore[arg-type]


rowwise_losses.defvjp(_forward, _backward)
