"""Scoring: the log-probability of a text under the model, in a batch for evaluation, or as a request to an engine."""

from collections.abc import Sequence

import jax
from jax import Array

from engine.inference.constraints import ForcedTokens
from engine.inference.request import Adapter, Request, SamplingParams
from engine.model.config import ModelConfig
from engine.model.loss import target_losses
from engine.model.transformer import Params
from engine.text.batch import Batch

LOGITS_LIMIT = 64 * 2**20  # bytes of float32 logits made at once


@jax.jit(static_argnames="cfg")
def score(cfg: ModelConfig, params: Params, batch: Batch) -> Array:
    """Sums the negative log-probability of the masked-in targets, () float32 nats. Bits are nats / ln 2."""
    return target_losses(cfg, params, batch, LOGITS_LIMIT).sum()


def scored_request(
    prompt: Sequence[int], tokens: Sequence[int], namespace: str = "", top: int = 0, adapter: Adapter | None = None
) -> Request:
    """Returns the request whose completion of the prompt is `tokens`, each with its log-probability and the `top` others.

    They are computed as those of a completion's own tokens are, in the same program.
    """
    sampling = SamplingParams(max_tokens=len(tokens), temperature=0.0, logprobs=top)
    return Request(tuple(prompt), sampling, namespace, ForcedTokens(tokens), adapter=adapter)
