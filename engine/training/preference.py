"""Trains on preferences without a reward model: LOSSES of pairs of answers, or of good and bad ones.

DPO raises the margin log p(chosen) - log p(rejected) above that of a reference model, whose
log-probabilities are computed once, before training. KTO compares each answer alone with the
reference. ORPO and SimPO need none:

    pairs = pairs._replace(reference=pair_logprobs(cfg, base, pairs))
    state, metrics = train_step(cfg, tx, state, frozen, pairs, progress, 1, preference_objective("dpo", beta=0.1))

With adapters the reference is the base itself: there is no second copy of the model.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from engine.mesh import layout
from engine.model.config import ModelConfig
from engine.model.loss import target_losses
from engine.model.transformer import Params
from engine.text.batch import Batch
from engine.text.chat_tokenizer import Example
from engine.text.examples import Pair, RatedPair
from engine.text.packing import example_rows
from engine.training.step import Objective


class Preferences(NamedTuple):
    """B pairs: row i of `answer` is preferred to row i of `other`, (B, T) each; masks count only
    the completions.

    For KTO `answer` is good or bad, and `other` has its prompt with another prompt's answer.
    `reference` (B, 2) float32 nats: the log-probabilities of both by the reference model. `value`
    (B,) float32: the weight of an answer's loss, negative for a bad one, which only KTO reads. A
    row whose masks count nothing, with a value of 0, is padding.
    """

    answer: Batch
    other: Batch
    reference: Any = None
    value: Any = None


def preference_batch(
    pairs: Sequence[Pair | RatedPair], index: Sequence[int], seq: int, logprobs: np.ndarray
) -> Preferences:
    """Returns the batch of the pairs `index` (B,). An index past the last pair makes a row of
    padding.

    `logprobs` (pairs, 2): the log-probabilities of both answers of each pair by the reference.
    """
    answers: list[Example | None] = []
    others: list[Example | None] = []
    values = []
    for at in index:
        if at < len(pairs):
            answers.append(pairs[at].answer)
            others.append(pairs[at].other)
            values.append(pairs[at].value)
        else:
            answers.append(None)
            others.append(None)
            values.append(0)
    reference = logprobs[np.minimum(index, len(pairs) - 1)]
    return Preferences(
        example_rows(answers, seq), example_rows(others, seq), reference, np.array(values, np.float32)
    )


class AnswerLogProbs(NamedTuple):
    """The log-probabilities of B pairs by one model, (B,) float32 nats each, summed over an
    answer's tokens or their mean."""

    chosen: Array
    rejected: Array
    chosen_mean: Array
    rejected_mean: Array


class RatedLogProbs(NamedTuple):
    """The log-probabilities by one model of B `answer`s and of their `other`s, (B,) float32 nats
    each, summed over tokens. The latter are without a gradient.
    """

    answer: Array
    other: Array


def answer_logprobs(
    cfg: ModelConfig, params: Params, pairs: Preferences, head_trains: bool
) -> AnswerLogProbs:
    """Returns both answers' log-probabilities, in one forward pass over all 2 B rows."""

    def join(answer: Array, other: Array) -> Array:
        return layout.join([answer, other], layout.row_groups(len(answer)))

    both = jax.tree.map(join, pairs.answer, pairs.other)
    summed = -target_losses(cfg, params, both, head_trains).sum(-1)
    mean = summed / jnp.maximum(jnp.count_nonzero(both.mask, axis=-1), 1)
    return AnswerLogProbs(*layout.stack_rows(summed, 2), *layout.stack_rows(mean, 2))


@functools.partial(jax.jit, static_argnums=0)
def pair_logprobs(cfg: ModelConfig, params: Params, pairs: Preferences) -> Array:
    """Returns (B, 2) float32 nats: log p(chosen), log p(rejected)."""
    logprobs = answer_logprobs(cfg, params, pairs, head_trains=False)
    return jnp.stack([logprobs.chosen, logprobs.rejected], axis=1)


def _dpo(logprobs: AnswerLogProbs, pairs: Preferences, beta: float) -> Array:
    """-log sigmoid(beta (margin - reference)), ln 2 at the reference
    (Rafailov et al. 2023, 2305.18290, equation 7).
    """
    margin = pairs.reference[:, 0] - pairs.reference[:, 1]
    return -jax.nn.log_sigmoid(beta * (logprobs.chosen - logprobs.rejected - margin))


def _orpo(logprobs: AnswerLogProbs, _: Preferences, beta: float) -> Array:
    """The chosen answer's loss a token, and beta times that of the odds ratio (Hong et al. 2024,
    2403.07691, equations 6, 7).

    An answer's probability p is the geometric mean of its tokens', and its odds are p / (1 - p).
    Where float32 rounds p to 1, the odds are those of the largest number below 1, and have no
    gradient: otherwise one certain answer would make the gradient of the whole step NaN.
    """

    def log_odds(mean: Array) -> Array:
        below_1 = jnp.minimum(mean, -jnp.finfo(mean.dtype).epsneg)
        return below_1 - jax.nn.log1mexp(-below_1)

    log_odds_ratio = log_odds(logprobs.chosen_mean) - log_odds(logprobs.rejected_mean)
    return -logprobs.chosen_mean - beta * jax.nn.log_sigmoid(log_odds_ratio)


def _simpo(logprobs: AnswerLogProbs, _: Preferences, beta: float) -> Array:
    """-log sigmoid(beta (mean log p(chosen) - mean log p(rejected)) - gamma)
    (Meng et al. 2024, 2405.14734, equation 6).

    gamma is SIMPO_MARGIN times beta, the ratio that the paper found to do well.
    """
    return -jax.nn.log_sigmoid(beta * (logprobs.chosen_mean - logprobs.rejected_mean - SIMPO_MARGIN))


def _kto(logprobs: RatedLogProbs, answers: Preferences, beta: float) -> Array:
    """|value| sigmoid(-/+ beta (log p / reference - KL)), - for a good answer
    (Ethayarajh et al. 2024, 2402.01306, equation 8).

    KL, at least 0, is the mean of the batch's mismatched answers' log p / reference, through which
    no gradient goes.
    """
    log_ratio = logprobs.answer - answers.reference[:, 0]
    mismatched = logprobs.other - answers.reference[:, 1]
    value = answers.value
    counts = value != 0
    kl = jnp.maximum(0, jnp.where(counts, mismatched, 0).sum() / jnp.maximum(counts.sum(), 1))
    return jnp.abs(value) * jax.nn.sigmoid(-beta * jnp.sign(value) * (log_ratio - jax.lax.stop_gradient(kl)))


class PreferenceLoss(NamedTuple):
    """A loss of each row, (B,) float32, by its log-probabilities, the Preferences and beta; and the
    paper's own beta.

    `has_reference`: whether it compares with a reference. `is_rating`: whether it rates single
    answers, as KTO, by RatedLogProbs in place of AnswerLogProbs.
    """

    of_rows: Callable[..., Array]
    beta: float
    has_reference: bool = False
    is_rating: bool = False


SIMPO_MARGIN = 0.5
LOSSES = {
    "dpo": PreferenceLoss(_dpo, 0.1, has_reference=True),
    "kto": PreferenceLoss(_kto, 0.1, has_reference=True, is_rating=True),
    "orpo": PreferenceLoss(_orpo, 0.1),
    "simpo": PreferenceLoss(_simpo, 2.0),
}


@functools.cache
def preference_objective(name: str = "dpo", beta: float | None = None) -> Objective:
    """Returns the objective of one of LOSSES: the summed loss, and the number of rows. A row of
    padding has a loss of 0.

    KTO's KL is estimated by each microbatch for itself. `beta`: None for the loss's own. A larger
    one keeps DPO and KTO nearer to the reference, and gives the odds ratio of ORPO more weight.
    """
    loss = LOSSES[name]
    if beta is None:
        beta = loss.beta

    def summed(cfg: ModelConfig, params: Params, pairs: Preferences, head_trains: bool = True) -> Array:
        if loss.is_rating:
            fixed = jax.lax.stop_gradient(params)
            answer = target_losses(cfg, params, pairs.answer, head_trains)
            other = target_losses(cfg, fixed, pairs.other, head_trains)
            logprobs: RatedLogProbs | AnswerLogProbs = RatedLogProbs(-answer.sum(-1), -other.sum(-1))
        else:
            logprobs = answer_logprobs(cfg, params, pairs, head_trains)
        has_answer = pairs.answer.mask.any(-1)  # False for a row of padding
        return jnp.where(has_answer, loss.of_rows(logprobs, pairs, beta), 0).sum()

    def count(pairs: Preferences) -> Array:
        return jnp.asarray(len(pairs.answer.mask))

    return Objective(summed, count)
