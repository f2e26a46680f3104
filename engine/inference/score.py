"""How probable a text is under the model: the forward pass read as log-probabilities, for evaluation."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from engine.model.config import ModelConfig
from engine.model.transformer import Params, forward
from engine.text.batch import Batch


@functools.partial(jax.jit, static_argnames="cfg")
def score(cfg: ModelConfig, params: Params, batch: Batch) -> Array:
    """The summed negative log-probability of the masked-in targets, () float32 nats. Bits are nats / ln 2."""
    logits, _ = forward(cfg, params, batch.tokens, batch.positions, segments=batch.segments)
    targets = jnp.where(batch.mask, batch.targets, 0)
    log_probability = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)
    return -jnp.where(batch.mask, log_probability, 0.0).sum()
