"""Preferences: ln 2 at DPO's reference, losses and gradients of the papers' formulas, margins of the answers alone."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.model.transformer import forward
from engine.text.batch import Batch
from engine.training.optimizer import OptimizerConfig, make_optimizer
from engine.training.preference import (
    LOSSES,
    AnswerLogProbs,
    Preferences,
    RatedLogProbs,
    pair_logprobs,
    preference_objective,
)
from engine.training.reinforce import grpo
from engine.training.step import loss_and_gradient
from tests.tiny import assert_near, lively_params, text_batch, tiny_config

B, T = 4, 7
differentiate = jax.jit(loss_and_gradient, static_argnums=(0, 4, 5))


def pairs_of(seed: int, masked: bool = True) -> Preferences:
    rng = np.random.default_rng(seed)

    side = lambda seed: text_batch(seed, B, T, rng.random((B, T)) < 0.6 if masked else None)
    return Preferences(side(seed + 1), side(seed + 2))


def by_the_formula(cfg, params, side: Batch) -> jax.Array:
    """(B,) summed log-probability of the targets that count."""
    table = jax.nn.log_softmax(forward(cfg, params, side.tokens, side.positions)[0])
    picked = jnp.take_along_axis(table, side.targets[..., None], -1)[..., 0]
    return jnp.where(side.mask, picked, 0).sum(-1)


@pytest.mark.law("adapter identity")
def test_at_the_reference_the_loss_is_ln_2():
    """Also in bfloat16, which rounds both alike; of a LoRA test_finetune.py finds it."""
    cfg = tiny_config(dtype="bfloat16")
    params, pairs = lively_params(cfg), pairs_of(0, masked=False)
    pairs = pairs._replace(reference=pair_logprobs(cfg, params, pairs))
    assert np.abs(np.diff(pairs.reference)).max() > 1
    loss, gradient = differentiate(cfg, params, {}, pairs, 1, preference_objective("dpo", 0.1))
    assert abs(float(loss) - np.log(2)) < 1e-6
    assert any(leaf.any() for leaf in jax.tree.leaves(gradient))


def sigmoid(x: jax.Array) -> jax.Array:
    return 1 / (1 + jnp.exp(-x))


def dpo(chosen, rejected, sizes, reference):
    return -jnp.log(sigmoid(0.7 * (chosen - rejected - (reference[:, 0] - reference[:, 1]))))


def orpo(chosen, rejected, sizes, _):
    p, q = (jnp.exp(total / size) for total, size in zip((chosen, rejected), sizes))
    return -jnp.log(p) - 0.7 * jnp.log(sigmoid(jnp.log((p / (1 - p)) / (q / (1 - q)))))


def simpo(chosen, rejected, sizes, _):
    return -jnp.log(sigmoid(0.7 * chosen / sizes[0] - 0.7 * rejected / sizes[1] - 0.35))


@pytest.mark.law("gradients")
@pytest.mark.parametrize(
    "paper",
    [dpo, *(pytest.param(each, marks=pytest.mark.whole) for each in (orpo, simpo))],
    ids=lambda paper: paper.__name__,
)
def test_loss_and_gradient_are_the_papers(cfg, params, paper):
    pairs = pairs_of(0)._replace(reference=np.array([[0.3, 0], [-2, 0], [0, -1], [1.5, -2.5]], np.float32))
    sizes = [side.mask.sum(-1) for side in (pairs.answer, pairs.other)]
    assert not np.array_equal(*sizes)

    def formula(params):
        answers = [by_the_formula(cfg, params, side) for side in (pairs.answer, pairs.other)]
        return paper(*answers, sizes, pairs.reference).mean()

    expected, gradient = jax.jit(jax.value_and_grad(formula))(params)
    objective = preference_objective(paper.__name__, 0.7)
    for microbatches in (1, 2):
        loss, ours = differentiate(cfg, params, {}, pairs, microbatches, objective)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        assert_near(ours, gradient, 1e-4)
    padded = jax.tree.map(lambda leaf: np.concatenate([leaf, np.zeros_like(leaf)]), pairs)
    np.testing.assert_allclose(objective.summed_loss(cfg, params, padded) / B, expected, rtol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_trls(name):
    """trl.json has the last of 20 steps of `python -m bench.peers --of losses`: our
    log-probabilities, and TRL's loss.
    """
    stored = json.loads(Path(__file__).with_name("trl.json").read_text())[name]
    (loss, *_), value = LOSSES[name], {key: jnp.array(numbers) for key, numbers in stored.items()}
    if LOSSES[name].is_rating:
        logprobs = RatedLogProbs(value["chosen"], value["rejected"])
    else:
        logprobs = AnswerLogProbs(*(value[field] for field in AnswerLogProbs._fields))
    pairs = Preferences(*pairs_of(0)[:2], value["reference"], value.get("value"))
    losses = loss(logprobs, pairs, LOSSES[name].beta)
    assert len(losses) == 4
    np.testing.assert_allclose(losses.mean(), stored["loss"], atol=1e-5)


def test_an_answer_that_is_certain_leaves_every_gradient_finite():
    """Rows: chosen, rejected or both of probability 1; padding has no answer, and so the same mean
    of 0.
    """
    means = jnp.array([0.0, -1.0, 0.0, -1e-9]), jnp.array([-1.0, 0.0, 0.0, -1e-38])

    def loss(chosen: jax.Array, rejected: jax.Array) -> jax.Array:
        return (
            LOSSES["orpo"].of_rows(AnswerLogProbs(chosen, rejected, chosen, rejected), pairs_of(0), 0.1).sum()
        )

    value, gradients = jax.value_and_grad(loss, (0, 1))(*means)
    assert all(np.isfinite(x).all() for x in (value, *gradients))
    assert (gradients[0] <= -1).all(), "a certain answer still has its own loss"


@pytest.mark.parametrize("drift", [-2.0, pytest.param(2.0, marks=pytest.mark.whole)])
def test_kto_and_its_gradient_are_the_papers(cfg, params, drift):
    """KL is the mean of the mismatched answers' drift from the reference, at least 0, and no
    gradient goes through it.
    """
    pairs, value = pairs_of(0), np.array([1.0, -1.0, 0.5, -2.0], np.float32)
    own, mismatched = (by_the_formula(cfg, params, side) for side in (pairs.answer, pairs.other))
    reference = np.stack(
        [np.array([0.3, -2.0, 1.0, 4.0]) + own, mismatched - drift + np.array([0.5, -0.5, 1, -1])], 1
    ).astype(np.float32)

    def formula(params):
        ratio = by_the_formula(cfg, params, pairs.answer) - reference[:, 0]
        kl = max(0, drift)
        good, bad = 1 - sigmoid(0.7 * (ratio - kl)), 1 - sigmoid(0.7 * (kl - ratio))
        return jnp.where(value > 0, value * good, -value * bad).mean()

    expected, gradient = jax.jit(jax.value_and_grad(formula))(params)
    ratings, objective = Preferences(*pairs[:2], reference, value), preference_objective("kto", 0.7)
    loss, ours = differentiate(cfg, params, {}, ratings, 1, objective)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert_near(ours, gradient, 1e-4)
    padded = jax.tree.map(lambda leaf: np.concatenate([leaf, np.zeros_like(leaf)]), ratings)
    np.testing.assert_allclose(objective.summed_loss(cfg, params, padded) / B, expected, rtol=1e-5)


def test_one_choice_is_one_object_for_the_compiler():
    assert preference_objective("dpo", 0.25) is preference_objective("dpo", 0.25)
    assert make_optimizer(OptimizerConfig()) is make_optimizer(OptimizerConfig())
    assert grpo(0.1, 0.5) is grpo(0.1, 0.5)
    assert preference_objective("simpo") is not preference_objective("orpo")
