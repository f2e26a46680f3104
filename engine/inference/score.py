"""Scoring: the log-probability of a text under the model, for evaluation."""

import jax
from jax import Array

from engine.model.config import ModelConfig
from engine.model.cross_entropy import cross_entropy
from engine.model.transformer import Params
from engine.text.batch import Batch

LOGITS_LIMIT = 64 * 2**20  # bytes of float32 logits made at once


@jax.jit(static_argnames="cfg")
def score(cfg: ModelConfig, params: Params, batch: Batch) -> Array:
    """Sums the negative log-probability of the masked-in targets, () float32 nats. Bits are nats / ln 2."""
    return cross_entropy(cfg, params, batch, LOGITS_LIMIT).sum()
