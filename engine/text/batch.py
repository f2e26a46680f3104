"""Batch: the tokens that one step of training or evaluation reads."""

from typing import Any, NamedTuple


class Batch(NamedTuple):
    """B windows of T tokens, each with the token that follows it. NumPy or JAX arrays; a pytree either way.

    `mask` is True where the target counts; in float32 it is the weight of the target's loss, 0 where it does not count.
    `positions`, for RoPE, are required. Tokens of different `segments` of a row may not attend to one another; `segments` alone
    may be None: one segment a row, which spares the comparison.
    """

    tokens: Any  # (B, T) int32
    targets: Any  # (B, T) int32
    mask: Any  # (B, T) bool, or float32
    positions: Any  # (B, T) int32
    segments: Any = None  # (B, T) int32 or None
