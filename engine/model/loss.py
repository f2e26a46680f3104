"""Next-token cross-entropy, float32. Chooses how many logits exist at once: all, a few rows, or a chunk of the vocabulary."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from engine.mesh import layout
from engine.model.chunked_loss import CHUNK, chunked_losses, row_losses
from engine.model.config import ModelConfig
from engine.model.transformer import Params, hidden_states, logits_of

# The most bytes of float32 logits that a device makes at once: of a head that trains, else chunk by
# chunk; of a frozen head, else a few rows at a time; and of `score`, by rows too.
LOGITS_LIMIT = 512 * 2**20
ROWS_LIMIT = 32 * 2**20
SCORED_LIMIT = 64 * 2**20
LOGIT_BYTES = 4


def target_losses(
    cfg: ModelConfig, params: Params, batch: Any, head_trains: bool, limit: int | None = None
) -> Array:
    """Returns the nats of each target of a Batch, (B, T) float32, 0 where the mask is False.

    Makes at most `limit` bytes of logits at a time on a device, by default LOGITS_LIMIT for a head
    that trains, and ROWS_LIMIT for a frozen one. Where there are more it takes a chunk of the
    vocabulary at a time for a head that trains, else a few rows.
    """
    if limit is None:
        limit = LOGITS_LIMIT if head_trains else ROWS_LIMIT
    targets = jnp.where(batch.mask, batch.targets, 0)
    hidden, _ = hidden_states(cfg, params, batch.tokens, batch.positions, segments=batch.segments)
    if LOGIT_BYTES * targets.size * cfg.vocab <= limit * layout.spread_shards(len(targets)):
        losses = token_losses(logits_of(cfg, params, layout.spread_rows(hidden)), targets)
    elif head_trains:
        losses = chunked_losses(cfg, params, hidden, targets, CHUNK)
    else:
        rows = layout.spread_rows(layout.spread_rows(hidden).reshape(-1, cfg.width))
        labels = targets.reshape(-1)
        head = layout.replicate(params[cfg.head_path])
        rows_at_once = max(2, limit // (LOGIT_BYTES * cfg.vocab))
        with jax.named_scope("head"):
            losses = row_losses(head, rows, labels, cfg.tied, rows_at_once).reshape(targets.shape)
    return jnp.where(batch.mask, losses, 0.0)


def summed_loss(cfg: ModelConfig, params: Params, batch: Any, head_trains: bool = True) -> Array:
    """Returns the summed nats of the batch's masked-in targets, each times its weight where the
    mask has weights.
    """
    losses = target_losses(cfg, params, batch, head_trains)
    if batch.mask.dtype != bool:
        losses = losses * batch.mask
    return losses.sum()


@jax.jit(static_argnames="cfg")
def score(cfg: ModelConfig, params: Params, batch: Any) -> Array:
    """Sums the negative log-probability of the masked-in targets, () float32 nats. Bits are nats / ln 2."""
    return target_losses(cfg, params, batch, head_trains=False, limit=SCORED_LIMIT).sum()


def loss_chunks(cfg: ModelConfig, rows: int, head_trains: bool) -> int:
    """Returns the number of pieces of `target_losses`' logits for `rows` tokens on a device."""
    size = LOGIT_BYTES * rows * cfg.vocab
    if not head_trains:
        return math.ceil(size / ROWS_LIMIT)
    if size <= LOGITS_LIMIT:
        return 1
    return math.ceil(cfg.vocab / CHUNK)


def token_losses(logits: Array, targets: Array) -> Array:
    """logits (..., V) float32, targets (...) int32 -> (...) nats: log sum exp(logits) - logits[target]."""
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked
