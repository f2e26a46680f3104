"""One step of training: what it learns, what it refuses, and what it never touches."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from engine.model.paths import leaf_paths, split
from engine.model.transformer import init_params
from engine.storage.digest import digest
from engine.text.batch import Batch
from engine.training import step as module
from engine.training.optimizer import OptimizerConfig, make_optimizer
from engine.training.step import init_state, loss_and_gradient, train_step
from tests.tiny import positions_of, tiny_config, tokens_of

differentiate = jax.jit(loss_and_gradient, static_argnums=(0, 4))

B, T = 4, 7
HALF = jnp.float32(0.5)
ADAMW = OptimizerConfig(learning_rate=0.02, weight_decay=0.3)
MUON = OptimizerConfig(kind="muon", learning_rate=0.01, matrix_learning_rate=0.05, schedule="wsd")


def partition(params, *rules: str):
    return split(params, [path for path in leaf_paths(params) if re.fullmatch("|".join(rules), path)])


def batch_of(seed: int) -> Batch:
    """A batch whose rows do not count equally many targets."""
    mask = np.random.default_rng(seed).random((B, T)) < np.array([[1.0], [0.8], [0.4], [0.2]])
    segments = np.repeat([[0, 0, 0, 1, 1, 1, 1]], B, axis=0).astype(np.int32)
    return Batch(tokens_of(seed, B, T), tokens_of(seed + 1, B, T), mask, positions_of(B, T), segments)


def copied(tree):
    """Returns copies: a step donates its arguments."""
    return jax.tree.map(jnp.array, tree)


def test_a_loss_is_the_mean_over_all_that_counts(cfg, params):
    loss, gradient = differentiate(cfg, params, {}, batch_of(0), 1)
    count = batch_of(0).mask.sum()
    summed = jax.jit(module.summed_loss, static_argnums=0)(cfg, params, batch_of(0))
    np.testing.assert_allclose(loss, summed / count, rtol=1e-6)
    state = init_state(tx := make_optimizer(ADAMW), copied(params))
    assert (state.step.dtype, int(state.step)) == (jnp.int32, 0)
    state, metrics = train_step(cfg, tx, state, {}, batch_of(0), HALF)
    np.testing.assert_allclose(metrics.loss, loss, rtol=1e-6)
    np.testing.assert_allclose(metrics.grad_norm, optax.tree.norm(gradient), rtol=1e-5)
    assert (int(metrics.tokens), int(metrics.refused), int(state.step)) == (count, 0, 1)


@pytest.mark.parametrize("tied", [False, True])
def test_the_trainable_paths_say_whether_the_head_trains(tied):
    """Not its type: a frozen head of a float32 model is float32 too."""
    cfg = tiny_config(tied=tied)
    params = init_params(cfg, jax.random.key(0))
    told = []

    def summed(cfg, params, batch, head_trains):
        told.append(head_trains)
        return module.summed_loss(cfg, params, batch, head_trains)

    objective = module.Objective(summed, lambda batch: batch.mask.sum())
    for rules in ((r"blocks/.*", cfg.head_path), (r"blocks/.*", "norm")):
        trainable, frozen = partition(params, *rules)
        jax.eval_shape(
            lambda *trees: loss_and_gradient(cfg, *trees, batch_of(0), objective=objective), trainable, frozen
        )
    assert told == [True, False]


@pytest.mark.law("layout equivalence")
@pytest.mark.parametrize(("packed", "microbatches", "remat"), [(True, 4, "none"), (False, 2, "block")])
def test_accumulation_and_a_second_forward_pass_change_no_number(cfg, params, packed, microbatches, remat):
    """Also when the parts count different numbers of targets: the mean is of the whole."""
    batch = batch_of(0) if packed else batch_of(0)._replace(segments=np.zeros((B, T), np.int32))
    one_batch = differentiate(cfg, params, {}, batch, 1)
    again = dataclasses.replace(cfg, remat=remat)
    parts = differentiate(again, params, {}, batch if packed else batch._replace(segments=None), microbatches)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), parts, one_batch)


@pytest.mark.law("donation")
def test_the_state_is_donated_and_nothing_else(cfg, params):
    trainable, frozen = partition(params, "head")
    tx = make_optimizer(ADAMW)
    state, frozen, batch = (
        init_state(tx, copied(trainable)),
        copied(frozen),
        jax.tree.map(jnp.array, batch_of(0)),
    )
    after, _ = train_step(cfg, tx, state, frozen, batch, HALF)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.trainable))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((frozen, batch)))
    lowered = train_step.lower(cfg, tx, after, frozen, batch, HALF)
    args = lowered.args_info[0]
    assert all(info.donated for info in jax.tree.leaves(args[0]))
    assert not any(info.donated for info in jax.tree.leaves(args[1:]))
    assert not lowered.compile().as_text().splitlines()[0].count("input_output_alias={}")


# What is not finite, and where it comes in. The step is one program, and only its data differ.


@pytest.fixture
def poisoned(cfg, params):
    """(run, start): run(state, at) takes a step with something not finite at `at`, or a sound one.

    The frozen leaf `poison` spoils the gradient of a loss that is fine: as NaN, the slope of sqrt(0
    x^2), or as numbers whose squares no float32 holds, on which clipping alone would make a step of
    nothing.
    """
    true_loss = module.summed_loss

    def with_poison(cfg, params, batch, head_trains):
        params = dict(params)
        root, steep = params.pop("poison")
        x = params["head"].sum()
        return (
            true_loss(cfg, params, batch, head_trains)
            + jnp.sqrt(root * x**2)
            + steep * (x - jax.lax.stop_gradient(x))
        )

    objective = module.Objective(with_poison, lambda batch: batch.mask.sum())
    adamw = make_optimizer(ADAMW)

    def update(gradient, state, params=None, *, progress, dtype):
        updates, state = adamw.update(
            gradient, state, params, progress=jnp.where(progress > 1, 0.5, progress)
        )
        bad = jnp.where(progress > 2, jnp.inf, jnp.where(progress > 1, jnp.nan, 0.0))
        updates["blocks"]["1"]["down"] = updates["blocks"]["1"]["down"].at[3, 5].add(bad)
        return updates, state

    tx = optax.GradientTransformationExtraArgs(adamw.init, update)
    trainable, frozen = partition(params, r"blocks/.*", "head", "norm")

    def run(state, at: str, seed: int = 0):
        progress = {"update NaN": 1.5, "update Inf": 2.5}.get(at, 0.5)
        beside = frozen | {
            "poison": jnp.array([at != "gradient NaN", 1e25 * (at == "gradient huge")], jnp.float32)
        }
        if at.startswith("loss"):
            value = jnp.nan if at == "loss NaN" else jnp.inf
            beside["embed"] = frozen["embed"].at[batch_of(seed).tokens[0, 0], 2].set(value)
        return train_step(cfg, tx, state, beside, batch_of(seed), jnp.float32(progress), 1, objective)

    return run, init_state(tx, copied(trainable))


@pytest.mark.law("finite steps")
@pytest.mark.parametrize(
    "at", ["loss NaN", "loss Inf", "gradient NaN", "gradient huge", "update NaN", "update Inf"]
)
def test_a_step_that_is_not_finite_changes_nothing_and_never_sneaks_in_later(poisoned, at):
    run, state = poisoned
    state, metrics = run(state, "nowhere", 0)
    assert int(metrics.refused) == 0
    saved, before = copied(state), (digest(state.trainable), digest(state.opt_state))

    for count in range(1, 5):  # K in a row are no different from one
        state, metrics = run(state, at, 1)
        assert int(metrics.refused) == 1
        assert int(state.step) == 1 + count, "it counts as seen"
        assert (digest(state.trainable), digest(state.opt_state)) == before
    assert np.isfinite(metrics.loss) == (not at.startswith("loss"))
    assert np.isfinite(metrics.grad_norm) == at.startswith("update")

    untroubled, _ = run(saved, "nowhere", 2)
    state, metrics = run(state, "nowhere", 2)
    assert int(metrics.refused) == 0
    assert digest((state.trainable, state.opt_state)) == digest((untroubled.trainable, untroubled.opt_state))
    assert digest(state.trainable) != before[0]


@pytest.mark.parametrize(
    ("optimizer", "dtype"), [(ADAMW, "float32"), (MUON, "bfloat16")], ids=["adamw", "muon"]
)
def test_training_learns_a_text_that_repeats_itself(optimizer, dtype):
    cfg = tiny_config(dtype=dtype)
    text = np.tile(tokens_of(5, 5), 4)[: T + 5]
    rows = np.stack([text[start : start + T + 1] for start in range(B)])
    batch = Batch(
        rows[:, :-1], rows[:, 1:], np.ones((B, T), bool), positions_of(B, T), np.zeros((B, T), np.int32)
    )
    tx = make_optimizer(optimizer)
    state = init_state(tx, jax.jit(init_params, static_argnums=0)(cfg, jax.random.key(0)))
    losses = []
    for step in range(60):
        state, metrics = train_step(cfg, tx, state, {}, batch, jnp.float32(step / 60))
        losses.append(float(metrics.loss))
    assert abs(losses[0] - np.log(41)) < 1e-3
    assert losses[-1] < 0.3
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.trainable)), "master weights"
