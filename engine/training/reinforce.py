"""GRPO: a policy gradient from rewards of whole answers, whose baseline is the group's mean (Shao et al. 2024,
2402.03300, equation 3, with the mean taken over all tokens of the batch).

Several answers to each prompt are sampled and rewarded. The advantage of each token of an answer is its reward less its
group's mean, in standard deviations.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from engine.errors import UserError
from engine.model.config import ModelConfig
from engine.model.transformer import Params
from engine.text.batch import Batch
from engine.training.loss import target_losses
from engine.training.step import Objective


class Rollouts(NamedTuple):
    """B answers as a batch whose mask counts the sampled tokens, and each answer's advantage (B,) float32.

    `old` (B, T) float32: the log-probabilities of sampling, where more than one step is made on them. `reference` (B, T):
    those of the reference model, where there is a pull towards it.
    """

    batch: Batch
    advantage: Any
    old: Any = None
    reference: Any = None


def group_advantages(rewards: ArrayLike, eps: float = 1e-6) -> Array:
    """rewards (prompts, answers) -> the same shape, float32: (r - mean) / (standard deviation + eps) within each row.

    0 where all answers to a prompt are rewarded alike.
    """
    rewards = jnp.asarray(rewards, jnp.float32)
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    spread = jnp.sqrt((centred**2).mean(axis=1, keepdims=True))
    alike = (rewards == rewards[:, :1]).all(axis=1, keepdims=True)
    return jnp.where(alike, 0.0, centred / (spread + eps))


@jax.jit(static_argnames="cfg")
def log_probabilities(cfg: ModelConfig, params: Params, batch: Batch) -> Array:
    """Returns the log-probability of each target, (B, T) float32, 0 where the mask is False."""
    return -target_losses(cfg, params, batch)


@functools.cache
def grpo(clip: float = 0.2, pull: float = 0.0) -> Objective:
    """Returns the objective -min(r A, clipped r A) + pull * KL, mean over sampled tokens; r is new / old probability.

    r is clipped to 1 - clip .. 1 + clip (Schulman et al. 2017, 1707.06347, equation 7): beyond it a token has nothing
    more to gain. KL to the reference is estimated token by token as q - log q - 1, q = reference / new. Raises UserError
    for a clip or pull out of range, and ValueError for a pull without a reference.
    """
    if not (clip > 0 and pull >= 0):
        raise UserError(f"clip must be above 0 and pull at least 0, not {clip!r} and {pull!r}.")

    def summed(cfg: ModelConfig, params: Params, rollouts: Rollouts) -> Array:
        new = -target_losses(cfg, params, rollouts.batch)
        old = jax.lax.stop_gradient(new) if rollouts.old is None else rollouts.old
        ratio, advantage = jnp.exp(new - old), rollouts.advantage[:, None]
        loss = -jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - clip, 1 + clip) * advantage)
        if pull:
            if rollouts.reference is None:
                raise ValueError("A pull towards a reference needs the reference's log-probabilities.")
            behind = rollouts.reference - new
            loss = loss + pull * (jnp.exp(behind) - behind - 1)
        return jnp.where(rollouts.batch.mask, loss, 0.0).sum()

    return Objective(summed, lambda rollouts: rollouts.batch.mask.sum())
