"""Scoring: the log-probability of a text under the model, for evaluation."""

import jax
import jax.numpy as jnp
from jax import Array

from engine.model.config import ModelConfig
from engine.model.cross_entropy import chunked_cross_entropy, token_losses
from engine.model.transformer import Params, forward, hidden_states
from engine.text.batch import Batch

LOGITS_LIMIT = 64 * 2**20  # bytes of float32 logits beyond which they are made a few rows at a time


@jax.jit(static_argnames="cfg")
def score(cfg: ModelConfig, params: Params, batch: Batch) -> Array:
    """Sums the negative log-probability of the masked-in targets, () float32 nats. Bits are nats / ln 2."""
    targets = jnp.where(batch.mask, batch.targets, 0)
    if 4 * targets.size * cfg.vocab <= LOGITS_LIMIT:
        logits, _ = forward(cfg, params, batch.tokens, batch.positions, segments=batch.segments)
        nats = token_losses(logits, targets)
    else:
        hidden, _ = hidden_states(cfg, params, batch.tokens, batch.positions, segments=batch.segments)
        nats = chunked_cross_entropy(cfg, params, hidden, targets, LOGITS_LIMIT)
    return jnp.where(batch.mask, nats, 0.0).sum()
