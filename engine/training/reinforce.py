"""Learning from a reward on whole answers: a policy gradient whose baseline is the group's mean (GRPO: Shao et al. 2024,
2402.03300, equation 3, with the mean taken over all tokens of the batch).

Several answers are drawn to each prompt, each gets a reward, and what it has above the mean of its group, in standard
deviations, is the advantage of every one of its tokens. No second model estimates values.
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
    """B answers as a batch whose mask counts the drawn tokens, and each answer's advantage (B,) float32.

    `old` (B, T) float32 are the log-probabilities under which they were drawn, for more than one step on one draw; None
    for one. `reference` (B, T) are those of the model that must not be left far behind; None without that pull.
    """

    batch: Batch
    advantage: Any
    old: Any = None
    reference: Any = None


def group_advantages(rewards: ArrayLike, eps: float = 1e-6) -> Array:
    """rewards (prompts, answers) -> the same shape, float32: (r - mean) / (standard deviation + eps) within each row.

    Where all answers to a prompt are rewarded alike they are all 0: nothing is to be learned there.
    """
    rewards = jnp.asarray(rewards, jnp.float32)
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    spread = jnp.sqrt((centred**2).mean(axis=1, keepdims=True))
    alike = (rewards == rewards[:, :1]).all(axis=1, keepdims=True)
    return jnp.where(alike, 0.0, centred / (spread + eps))


def log_probability(cfg: ModelConfig, params: Params, batch: Batch) -> Array:
    """(B, T) float32 log-probability of each target, 0 where the mask is False."""
    return -target_losses(cfg, params, batch)


log_probabilities = jax.jit(log_probability, static_argnums=0)


@functools.cache
def grpo(clip: float = 0.2, pull: float = 0.0) -> Objective:
    """The mean over drawn tokens of -min(r A, clipped r A) + pull * KL, with r the ratio of new to old probability.

    r is clipped to 1 - clip .. 1 + clip (Schulman et al. 2017, 1707.06347, equation 7): beyond it a token has nothing
    more to gain. KL to the reference is estimated token by token as q - log q - 1, q = reference / new. Raises UserError
    for a clip or pull below 0, and ValueError when there is a pull and no reference.
    """
    if not (clip > 0 and pull >= 0):
        raise UserError(f"clip must be above 0 and pull at least 0, not {clip!r} and {pull!r}.")

    def summed(cfg: ModelConfig, params: Params, rollouts: Rollouts) -> Array:
        new = log_probability(cfg, params, rollouts.batch)
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
