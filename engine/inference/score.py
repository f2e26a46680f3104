"""Scoring: the log-probability of a text under the model, for evaluation."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from engine.model.chunked_cross_entropy import chunked_cross_entropy, head_weight
from engine.model.config import ModelConfig
from engine.model.transformer import Params, forward, hidden_states
from engine.text.batch import Batch

LOGITS_LIMIT = 64 * 2**20  # bytes of float32 logits beyond which they are made a few rows at a time


@functools.partial(jax.jit, static_argnames="cfg")
def score(cfg: ModelConfig, params: Params, batch: Batch) -> Array:
    """Sums the negative log-probability of the masked-in targets, () float32 nats. Bits are nats / ln 2."""
    targets = jnp.where(batch.mask, batch.targets, 0)
    size = LOGITS_LIMIT // (4 * cfg.vocab)
    if targets.size <= size:
        logits, _ = forward(cfg, params, batch.tokens, batch.positions, segments=batch.segments)
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        nats = jax.nn.logsumexp(logits, axis=-1) - picked
    else:
        hidden, _ = hidden_states(cfg, params, batch.tokens, batch.positions, segments=batch.segments)
        rows = hidden.reshape(-1, cfg.width), targets.reshape(-1)
        nats = chunked_cross_entropy(head_weight(cfg, params), *rows, cfg.tied, max(2, size)).reshape(targets.shape)
    return jnp.where(batch.mask, nats, 0.0).sum()
