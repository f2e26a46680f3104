"""Batch: what one step of training or evaluation reads."""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import jax
    import numpy as np


class Batch(NamedTuple):
    """B windows of T tokens, each with the token that follows it. NumPy or JAX arrays; a pytree either way.

    `mask` is True where the target counts. `positions` are what RoPE turns by; tokens of different `segments` of a row
    may not attend to one another; None means one segment a row, which spares the comparison.
    """

    tokens: "np.ndarray | jax.Array"  # (B, T) int32
    targets: "np.ndarray | jax.Array"  # (B, T) int32
    mask: "np.ndarray | jax.Array"  # (B, T) bool
    positions: "np.ndarray | jax.Array"  # (B, T) int32
    segments: "np.ndarray | jax.Array | None" = None  # (B, T) int32
