"""GRPO: a policy gradient from rewards of completions, whose baseline is their mean; and rewards by rule.

After Shao et al. 2024 (2402.03300, equation 3). Several completions of each prompt are sampled and
rewarded. The advantage of a completion's tokens is its reward less its group's mean, in standard
deviations. A completion weighs the same however long it is: in a mean over all tokens the long
ones, where they are the worse, would make all that is sampled less probable.

    reward = make_reward("length:12")
    reward("The sea is wide and cold.", None)      # 0.5: six words of twelve
"""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from engine.errors import UserError, did_you_mean
from engine.model.config import ModelConfig
from engine.model.loss import target_losses
from engine.model.transformer import Params
from engine.text.batch import Batch
from engine.training.step import Objective


class PolicyBatch(NamedTuple):
    """B completions as a batch whose mask counts the sampled tokens, and each one's advantage (B,)
    float32.

    `old_logprobs` (B, T) float32: those of sampling, where more than one step is made.
    `reference_logprobs` (B, T): those of the reference model, where KL has a weight.
    """

    batch: Batch
    advantage: Any
    old_logprobs: Any = None
    reference_logprobs: Any = None


def group_advantages(rewards: ArrayLike, second: ArrayLike = 0.0) -> Array:
    """rewards (prompts, completions) -> the same shape, float32: (r - mean) / (standard deviation +
    1e-6) within each row.

    r is a reward plus a second one. 0 where `rewards` are alike in a row: there the second alone
    would come to full size.
    """
    rewards = jnp.asarray(rewards, jnp.float32)
    alike = (rewards == rewards[:, :1]).all(axis=1, keepdims=True)
    total = rewards + jnp.asarray(second, jnp.float32)
    centred = total - total.mean(axis=1, keepdims=True)
    spread = jnp.sqrt((centred**2).mean(axis=1, keepdims=True))
    return jnp.where(alike, 0.0, centred / (spread + 1e-6))


@jax.jit(static_argnames="cfg")
def log_probabilities(cfg: ModelConfig, params: Params, batch: Batch) -> Array:
    """Returns the log-probability of each target, (B, T) float32, 0 where the mask is False."""
    return -target_losses(cfg, params, batch, head_trains=False)


@functools.cache
def grpo(clip: float = 0.2, kl_weight: float = 0.0) -> Objective:
    """Returns the objective -min(r A, clipped r A) + kl_weight * KL; r is new / old probability.

    The mean over a completion's tokens, then over completions. r is clipped to 1 - clip .. 1 + clip
    (Schulman et al. 2017, 1707.06347, equation 7): beyond it a token has nothing more to gain. KL
    to the reference is estimated token by token as q - log q - 1, q = reference / new, which is
    never below 0 (2402.03300, equation 4; k3 of Schulman 2020, "Approximating KL Divergence"). A
    kl_weight above 0 needs reference_logprobs.
    """

    def summed(cfg: ModelConfig, params: Params, rollouts: PolicyBatch, head_trains: bool = True) -> Array:
        new = -target_losses(cfg, params, rollouts.batch, head_trains)
        old = rollouts.old_logprobs
        if old is None:
            old = jax.lax.stop_gradient(new)
        ratio = jnp.exp(new - old)
        advantage = rollouts.advantage[:, None]
        loss = -jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - clip, 1 + clip) * advantage)
        if kl_weight:
            log_ratio = rollouts.reference_logprobs - new
            loss = loss + kl_weight * (jnp.exp(log_ratio) - log_ratio - 1)
        mask = rollouts.batch.mask
        means = jnp.where(mask, loss, 0.0).sum(1) / jnp.maximum(mask.sum(1), 1)  # of each completion
        return means.sum()

    return Objective(summed, _count_rows)


def _count_rows(rollouts: PolicyBatch) -> Array:
    return jnp.asarray(rollouts.batch.mask.shape[0])


Reward = Callable[[str, Any], float]  # (completion, right answer or None) -> 0 to 1

TASKS = {
    "length": "length:N, an answer of N words",
    "regex": "regex:PATTERN, an answer in which the pattern is found",
    "exact": "exact, an answer that is the row's own",
    "sum": "sum, an answer that ends with the right number",
    "yes-no": "yes-no, an answer that begins with Yes or No",
}
MAX_WORDS = 1000  # that a task of a length may ask for
LONGEST = 4000  # characters of a completion that a pattern is searched in


def make_reward(task: str) -> Reward:
    """Makes the reward of `length:12`, `regex:PATTERN`, `exact`, `sum` or `yes-no`. Raises
    UserError for anything else."""
    name, _, rest = task.partition(":")
    if name == "length" and rest.isdecimal() and 1 <= int(rest) <= MAX_WORDS:
        return length_reward(int(rest))
    if name == "regex" and rest:
        return regex_reward(rest)
    if task == "exact":
        return exact_reward
    if task == "sum":
        return sum_reward
    if task == "yes-no":
        return regex_reward(r"^(Yes|No)\b")
    if name in TASKS:
        limits = ""
        if name == "length":
            limits = f" from 1 to {MAX_WORDS}"
        raise UserError(f"The task {task!r} should be {TASKS[name]}{limits}.")
    there_are = "; ".join([*TASKS.values(), "FILE.py:FUNCTION"])
    raise UserError(f"There is no task {task!r}; there are {there_are}.{did_you_mean(name, [*TASKS])}")


def length_reward(words: int) -> Reward:
    """Rewards a completion of so many words with 1, and another with the share that the shorter
    number is of the longer."""

    def reward(completion: str, _: Any) -> float:
        count = len(completion.split())
        return min(count, words) / max(count, words)

    return reward


def exact_reward(completion: str, right: Any) -> float:
    """Rewards a completion with 1 if it is the right answer but for space around it, else 0."""
    return float(isinstance(right, str) and completion.strip() == right.strip())


def regex_reward(pattern: str) -> Reward:
    """Rewards a completion with 1 if the pattern is found in its first LONGEST characters; `^...$`
    asks for all of it.

    A pattern such as `(a+)+$` may take exponentially long, so callers bound its time. Raises
    UserError for what is no pattern.
    """
    try:
        expression = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"{pattern!r} is not a regular expression: {error}.") from error

    def reward(completion: str, right: Any) -> float:
        return float(expression.search(completion[:LONGEST]) is not None)

    return reward


def sum_reward(completion: str, right: int | None) -> float:
    """Rewards a completion with 1 if its last integer is the right one, else 0. Commas between
    thousands are skipped."""
    text = re.sub(r"(?<=\d),(?=\d{3})", "", completion[-LONGEST:])
    integers = re.findall(r"(?:(?<!\w)-)?\d+", text)  # a dash after a word or a number is no sign
    if not integers or right is None:
        return 0.0
    return float(int(integers[-1]) == right)
