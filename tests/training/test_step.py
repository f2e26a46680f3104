"""One step of training: what it learns, what it refuses, what it never touches, and that it does so to the bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import equations, lively_params, positions_of, tiny_config, tokens_of

from engine.model.paths import first_match, leaf_paths, merge, split
from engine.model.transformer import init_params
from engine.storage.digest import digest
from engine.text.batch import Batch
from engine.training import step as module
from engine.training.optimizer import OptimizerConfig, make_optimizer
from engine.training.step import init_state, loss_and_gradient, train_step

differentiate = jax.jit(loss_and_gradient, static_argnums=(0, 4))

B, T = 4, 7
HALF = jnp.float32(0.5)
ADAMW = OptimizerConfig(learning_rate=0.02, weight_decay=0.3)
MUON = OptimizerConfig(kind="muon", learning_rate=0.01, matrix_learning_rate=0.05, schedule="wsd")


def partition(params, *rules: str):
    return split(params, first_match([(rule, True) for rule in rules], params))


def batch_of(seed: int) -> Batch:
    """A batch whose rows do not count equally many targets."""
    mask = np.random.default_rng(seed).random((B, T)) < np.array([[1.0], [0.8], [0.4], [0.2]])
    segments = np.repeat([[0, 0, 0, 1, 1, 1, 1]], B, axis=0).astype(np.int32)
    return Batch(tokens_of(seed, B, T), tokens_of(seed + 1, B, T), mask, positions_of(B, T), segments)


def copied(tree):
    """Returns copies: a step donates its arguments."""
    return jax.tree.map(jnp.array, tree)


def trained(cfg, tx, params, steps: int, frozen=None, first: int = 0):
    """(state, metrics) after some steps, on batches of their own."""
    state = init_state(tx, copied(params))
    for seed in range(first, first + steps):
        state, metrics = train_step(cfg, tx, state, frozen or {}, batch_of(seed), HALF)
    return state, metrics


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


def test_a_step_is_its_gradient_given_to_the_optimizer(cfg, params):
    """Three times over, so that what the optimizer remembers counts as well."""
    tx = make_optimizer(ADAMW)
    update = jax.jit(lambda gradient, state, params: tx.update(gradient, state, params, progress=HALF))
    expected, opt_state = params, tx.init(params)
    for seed in range(3):
        updates, opt_state = update(differentiate(cfg, expected, {}, batch_of(seed), 1)[1], opt_state, expected)
        expected = optax.apply_updates(expected, updates)
    state, _ = trained(cfg, tx, params, 3)
    # A gradient near 0 moves AdamW's weight by its sign alone, so a few may differ by what one step is worth.
    far = [np.abs(a - b) > 1e-4 for a, b in zip(jax.tree.leaves(state.trainable), jax.tree.leaves(expected), strict=True)]
    assert sum(leaf.sum() for leaf in far) <= 2
    moments = zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(opt_state), strict=True)
    assert all(np.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in moments)


@pytest.mark.parametrize(("packed", "microbatches"), [(True, 4), (False, 2)])
def test_accumulation_is_one_big_batch(cfg, params, packed, microbatches):
    """Also when the parts count different numbers of targets: the mean is of the whole."""
    batch = batch_of(0) if packed else batch_of(0)._replace(segments=np.zeros((B, T), np.int32))
    one_batch = differentiate(cfg, params, {}, batch, 1)
    parts = differentiate(cfg, params, {}, batch if packed else batch._replace(segments=None), microbatches)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), parts, one_batch)


def test_running_the_forward_pass_again_changes_no_number(cfg, params):
    again = differentiate(dataclasses.replace(cfg, remat="full"), params, {}, batch_of(0), 1)
    expected = differentiate(cfg, params, {}, batch_of(0), 1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), again, expected)


def test_masked_targets_do_not_reach_the_weights(cfg, params):
    tx, batch = make_optimizer(ADAMW), batch_of(0)
    other = np.where(batch.mask, batch.targets, (batch.targets + 1) % 41).astype(np.int32)
    assert (other != batch.targets).any()
    states = [
        train_step(cfg, tx, init_state(tx, copied(params)), {}, batch._replace(targets=targets), HALF)[0]
        for targets in (batch.targets, other)
    ]
    assert digest(states[0]) == digest(states[1])


def test_the_same_run_twice_has_the_same_bits(cfg, params):
    runs = [digest(trained(cfg, make_optimizer(ADAMW), params, 6)[0]) for _ in range(2)]
    assert runs[0] == runs[1]
    assert digest(trained(cfg, make_optimizer(ADAMW), params, 6, first=1)[0]) != runs[0]


def test_the_state_is_donated_and_nothing_else(cfg, params):
    trainable, frozen = partition(params, "head")
    tx = make_optimizer(ADAMW)
    state, frozen, batch = init_state(tx, copied(trainable)), copied(frozen), jax.tree.map(jnp.array, batch_of(0))
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

    The frozen leaf `poison` spoils the gradient of a loss that is fine: as NaN, the slope of sqrt(0 x^2), or as numbers
    whose squares no float32 holds, on which clipping alone would make a step of nothing.
    """
    true_loss = module.summed_loss

    def with_poison(cfg, params, batch):
        params = dict(params)
        root, steep = params.pop("poison")
        x = params["head"].sum()
        return true_loss(cfg, params, batch) + jnp.sqrt(root * x**2) + steep * (x - jax.lax.stop_gradient(x))

    objective = module.Objective(with_poison, lambda batch: batch.mask.sum())
    adamw = make_optimizer(ADAMW)

    def update(gradient, state, params=None, *, progress, dtype):
        updates, state = adamw.update(gradient, state, params, progress=jnp.where(progress > 1, 0.5, progress))
        bad = jnp.where(progress > 2, jnp.inf, jnp.where(progress > 1, jnp.nan, 0.0))
        updates["blocks"]["1"]["down"] = updates["blocks"]["1"]["down"].at[3, 5].add(bad)
        return updates, state

    tx = optax.GradientTransformationExtraArgs(adamw.init, update)
    trainable, frozen = partition(params, r"blocks/.*", "head", "norm")

    def run(state, at: str, seed: int = 0):
        progress = {"update NaN": 1.5, "update Inf": 2.5}.get(at, 0.5)
        beside = frozen | {"poison": jnp.array([at != "gradient NaN", 1e25 * (at == "gradient huge")], jnp.float32)}
        if at.startswith("loss"):
            value = jnp.nan if at == "loss NaN" else jnp.inf
            beside["embed"] = frozen["embed"].at[batch_of(seed).tokens[0, 0], 2].set(value)
        return train_step(cfg, tx, state, beside, batch_of(seed), jnp.float32(progress), 1, objective)

    return run, init_state(tx, copied(trainable))


@pytest.mark.parametrize("at", ["loss NaN", "loss Inf", "gradient NaN", "gradient huge", "update NaN", "update Inf"])
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


def products(jaxpr) -> int:
    """Matrix products in a program, loops and calls included."""
    return sum(equation.primitive.name == "dot_general" for equation in equations(jaxpr))


@pytest.mark.parametrize("rules", [["head"], [r"blocks/1/.*", r"blocks/0/qkv"]], ids=["head", "some"])
def test_frozen_is_frozen_to_the_bit_under_decay_clipping_and_momentum(cfg, params, rules):
    trainable, frozen = partition(params, *rules)
    before = digest(frozen)
    state, _ = trained(cfg, make_optimizer(ADAMW), trainable, 8, frozen)
    assert digest(frozen) == before
    assert set(leaf_paths(state.trainable)) == set(leaf_paths(trainable))
    for path, leaf in leaf_paths(state.trainable).items():
        assert (np.asarray(leaf) != leaf_paths(trainable)[path]).any(), f"{path} learned nothing"
    merged = leaf_paths(merge(state.trainable, frozen))
    assert all(merged[path] is leaf for path, leaf in leaf_paths(frozen).items())


def test_frozen_is_not_differentiated(cfg, params):
    """The head alone needs one product more than reading the text: not a gradient thrown away, but none made."""

    def needed(rules: list[str]) -> int:
        from jax.interpreters import partial_eval

        trainable, frozen = partition(params, *rules)
        jaxpr = jax.make_jaxpr(lambda trainable: loss_and_gradient(cfg, trainable, frozen, batch_of(0)))(trainable).jaxpr
        return products(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])

    forward = jax.make_jaxpr(lambda: module.summed_loss(cfg, params, batch_of(0)))().jaxpr
    head, top, all_ = needed(["head"]), needed([r"blocks/1/.*"]), needed([".*"])
    assert head == products(forward) + 1
    assert head < top < all_
    _, gradient = jax.eval_shape(lambda: loss_and_gradient(cfg, *partition(params, "norm", "head"), batch_of(0)))
    assert set(gradient) == {"norm", "head"}


@pytest.mark.parametrize(("optimizer", "dtype"), [(ADAMW, "float32"), (MUON, "bfloat16")], ids=["adamw", "muon"])
def test_training_learns_a_text_that_repeats_itself(optimizer, dtype):
    cfg = tiny_config(dtype=dtype)
    text = np.tile(tokens_of(5, 5), 4)[: T + 5]
    rows = np.stack([text[start : start + T + 1] for start in range(B)])
    batch = Batch(rows[:, :-1], rows[:, 1:], np.ones((B, T), bool), positions_of(B, T), np.zeros((B, T), np.int32))
    tx = make_optimizer(optimizer)
    state = init_state(tx, jax.jit(init_params, static_argnums=0)(cfg, jax.random.key(0)))
    losses = []
    for step in range(60):
        state, metrics = train_step(cfg, tx, state, {}, batch, jnp.float32(step / 60))
        losses.append(float(metrics.loss))
    assert abs(losses[0] - np.log(41)) < 1e-3
    assert losses[-1] < 0.3
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.trainable)), "master weights"


def test_a_whole_run_leaves_the_weights_it_began_with_alone(cfg):
    """`copied` above is needed: the step donates its state. No other array is touched."""
    params = lively_params(cfg, 1)
    before = digest(params)
    trained(cfg, make_optimizer(ADAMW), params, 2)
    assert digest(params) == before
