"""The transformer: (params, tokens) -> logits, the one function that training and inference share."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from engine.model import backward
from engine.model.config import ModelConfig
from engine.model.paths import Params
from engine.model.weights.plain import as_weight


class KVCache(NamedTuple):
    """k and v: one array (B, K, S, H) for each of the L layers; length (B,) int32, the tokens each
    row holds.

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

    def empty() -> tuple[Array, ...]:
        return tuple(jnp.zeros(shape, jnp.dtype(cfg.dtype)) for _ in range(cfg.layers))

    return KVCache(empty(), empty(), jnp.zeros((batch,), jnp.int32))


def init_params(cfg: ModelConfig, key: Array) -> Params:
    """Makes random float32 weights with which the first loss is ln V: blocks are the identity and
    an untied head is zero.

    With a tied head the first SwiGLU is random, or the model would predict each token to follow
    itself.
    """
    from engine.model.flax_modules import Transformer

    tokens = jnp.zeros((1, 2), jnp.int32)
    return Transformer(cfg).init(key, tokens, tokens)["params"]


def forward(
    cfg: ModelConfig,
    params: Params,
    tokens: Array,
    positions: Array,
    cache: Any = None,
    segments: Array | None = None,
) -> tuple[Array, Any]:
    """tokens, positions (B, T) int32 -> logits (B, T, V) float32 and the cache with these T tokens'
    keys and values.

    Token t sees tokens 0..t of its row (and segment), and what `cache`, a KVCache or
    SegmentedCache, holds. A KVCache's `length` does not change.
    """
    x, cache = _apply(cfg, params, tokens, positions, cache, segments)
    return _norm_and_logits(cfg, params, x), cache


def hidden_states(
    cfg: ModelConfig,
    params: Params,
    tokens: Array,
    positions: Array,
    cache: Any = None,
    segments: Array | None = None,
) -> tuple[Array, Any]:
    """Returns the head's input (B, T, D) in the compute dtype, and the cache; else as `forward`."""
    x, cache = _apply(cfg, params, tokens, positions, cache, segments)
    return _normalise(cfg, params, x), cache


def _apply(
    cfg: ModelConfig, params: Params, tokens: Array, positions: Array, cache: Any, segments: Array | None
) -> Any:
    # The import takes 80 ms, and a program that is stored does without.
    from engine.model.flax_modules import Transformer

    return Transformer(cfg).apply({"params": params}, tokens, positions, segments, cache)


def _normalise(cfg: ModelConfig, params: Params, x: Array) -> Array:
    return backward.rms_norm(x, params["norm"], cfg.eps, jnp.dtype(cfg.dtype))


def _norm_and_logits(cfg: ModelConfig, params: Params, x: Array) -> Array:
    head = _head(cfg, params)
    if head.fuses(x):
        return head.times_fused(x, jnp.float32, params["norm"], cfg.eps)
    return logits_of(cfg, params, _normalise(cfg, params, x))


def _head(cfg: ModelConfig, params: Params) -> Any:
    return as_weight(params[cfg.head_path], axis=int(not cfg.tied))


def logits_of(cfg: ModelConfig, params: Params, hidden: Array) -> Array:
    """hidden (..., D) -> logits (..., V) float32, by the head, tied or not."""
    with jax.named_scope("head"):
        return _head(cfg, params).times(hidden, jnp.float32)
