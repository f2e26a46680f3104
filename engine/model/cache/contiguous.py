"""KVCache: the keys and values of rows that start together."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from engine.model.config import ModelConfig


class KVCache(NamedTuple):
    """k and v: one array (B, K, S, H) for each of the L layers; length (B,) int32, the tokens each row holds.

    What lies at or beyond a row's length is stale and is never read.
    """

    k: tuple[Array, ...]
    v: tuple[Array, ...]
    length: Array

    def layer(self, i: int) -> tuple[Array, Array, Array]:
        return self.k[i], self.v[i], self.length

    def with_layers(self, layers: Sequence[tuple[Array, Array, Array]]) -> "KVCache":
        k, v, _ = zip(*layers)
        return KVCache(k, v, self.length)


def make_cache(cfg: ModelConfig, batch: int, capacity: int) -> KVCache:
    shape = (batch, cfg.kv_heads, capacity, cfg.head_dim)
    empty = lambda: tuple(jnp.zeros(shape, jnp.dtype(cfg.dtype)) for _ in range(cfg.layers))
    return KVCache(empty(), empty(), jnp.zeros((batch,), jnp.int32))


def write(cached: Array, new: Array, start: Array) -> Array:
    """Writes new (B, K, T, H) into cached (B, K, S, H) at start (B,)."""
    write_row = lambda row, value, at: jax.lax.dynamic_update_slice(row, value, (0, at, 0))
    return jax.vmap(write_row)(cached, new.astype(cached.dtype), start)
