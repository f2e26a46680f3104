"""Whether attention to slots in turn has the bits of attention to all at once, so that a call may do either."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engine.inference.programs import make_rows
from engine.model.cache.segmented import KVSegments, attention, segmented_cache
from engine.model.config import ModelConfig


def same_bits_in_turn(cfg: ModelConfig, segments: KVSegments) -> bool:
    """Computes one layer's attention to random numbers both ways, for a row of each slot, at different positions.

    Of `segments` only the shapes are read.
    """
    R, rng = segments.slots, np.random.default_rng(0)

    def randomized(like: Any) -> Any:
        """The same numbers in every slot: positive where they are the scales of int8."""
        if like.dtype == jnp.int8:
            one = rng.integers(-127, 128, like.shape[1:], np.int8)
        else:
            one = (
                rng.random(like.shape[1:], np.float32) * 0.02
                if like.ndim == 3
                else rng.standard_normal(like.shape[1:], np.float32)
            )
        return jnp.broadcast_to(jnp.asarray(one, like.dtype), like.shape)

    layer = jax.tree.map(randomized, KVSegments(segments.k[:1], segments.v[:1]))
    q, k, v = (
        rng.standard_normal((R, 1, heads, cfg.head_dim), np.float32) for heads in (cfg.heads, cfg.kv_heads, cfg.kv_heads)
    )
    position = np.linspace(0, segments.edges[-1] - 1, R).astype(np.int32)

    @jax.jit
    def attend(layer: KVSegments, q: Any, k: Any, v: Any, few: Any) -> Any:
        rows = make_rows(position)._replace(few=few)
        return attention(q * cfg.head_dim**-0.5, k, v, segmented_cache(layer, rows).layer(0))[0]

    at_once, in_turn = (np.asarray(attend(layer, q, k, v, np.int32(few))).tobytes() for few in (0, R))
    return at_once == in_turn
