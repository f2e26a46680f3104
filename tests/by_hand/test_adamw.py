"""AdamW by hand is optax's, and ten steps of training by hand are ten steps of the engine's."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import by_hand
from engine.by_hand import adamw
from engine.by_hand.model import leaves, tree_map
from engine.training.optimizer import OptimizerConfig, make_optimizer, make_schedule
from engine.training.step import init_state, train_step
from tests.by_hand.wide import QWEN2, QWEN3, assert_trees_close, batch_of, float64_engine, in_float64, weights

# Clipping that bites and that does not; with decay and without; other means than the usual.
SETTINGS = [
    adamw.AdamWConfig(learning_rate=0.02, weight_decay=0.3),
    adamw.AdamWConfig(learning_rate=0.1, beta1=0.5, beta2=0.999, weight_decay=0.0, clip=float("inf")),
    adamw.AdamWConfig(learning_rate=0.01, beta1=0.0, weight_decay=2.0, clip=50.0),
]


def zero_moments(params) -> adamw.Moments:
    return adamw.Moments(
        np.zeros((), np.int32), tree_map(np.zeros_like, params), tree_map(np.zeros_like, params)
    )


def optimizer(by_hand: adamw.AdamWConfig, **more) -> OptimizerConfig:
    return OptimizerConfig(**{k: v for k, v in by_hand._asdict().items() if k != "eps"}, **more)


@functools.partial(jax.jit, static_argnums=0)
def optax_steps(cfg: OptimizerConfig, params, gradients, progress):
    tx = make_optimizer(cfg)
    state = tx.init(params)
    for gradient in gradients:
        updates, state = tx.update(gradient, state, params, progress=progress)
        params = jax.tree.map(lambda p, u: p + u, params, updates)
    return params


@settings(max_examples=15)
@given(
    st.sampled_from(SETTINGS),
    st.integers(0, 2**32 - 1),
    st.sampled_from([1e-3, 1.0, 30.0]),
    st.floats(0.05, 0.95),
)
def test_adamw(chosen, seed, scale, progress):
    params, rng = weights(QWEN2), np.random.default_rng(seed)
    gradients = [tree_map(lambda p: scale * rng.standard_normal(p.shape), params) for _ in range(3)]
    with float64_engine():
        factor = float(make_schedule(optimizer(chosen))(np.float64(progress)))
        expected = jax.device_get(optax_steps(optimizer(chosen), params, gradients, np.float64(progress)))
    moments = zero_moments(params)
    actual = params
    for gradient in gradients:
        actual, moments = adamw.step(chosen, actual, gradient, moments, factor)
    assert_trees_close(actual, expected, rtol=1e-9)
    assert int(moments.taken) == 3
    tree_map(np.testing.assert_array_equal, params, weights(QWEN2))  # what was given stays as it was


def test_adamw_keeps_float32():
    params = weights(QWEN3, dtype="float32")
    actual, moments = adamw.step(adamw.AdamWConfig(), params, params, zero_moments(params), np.float64(0.5))
    assert {leaf.dtype.name for tree in (actual, moments.first, moments.second) for leaf in leaves(tree)} == {
        "float32"
    }


FACTOR = 0.5  # of the cosine, half way and without a warm-up


def ten_steps_by_hand(cfg, params):
    """(losses, params): the batches go round, so that the losses fall."""
    moments, losses = zero_moments(params), []
    for step in range(10):
        tokens, targets, mask, positions, segments = batch_of(step % 3, 4)
        loss, gradient = by_hand.loss_and_gradient(cfg, params, tokens, targets, mask, positions, segments)
        params, moments = adamw.step(SETTINGS[0], params, gradient, moments, FACTOR)
        losses.append(loss)
    return losses, params


def ten_steps_by_jax(cfg, params, progress):
    tx = make_optimizer(optimizer(SETTINGS[0], warmup=0.0))
    state, losses = init_state(tx, jax.tree.map(jax.numpy.array, params)), []
    for step in range(10):
        state, metrics = train_step(cfg, tx, state, {}, batch_of(step % 3, 4), progress)
        losses.append(float(metrics.loss))
    return losses, jax.device_get(state.trainable)


@pytest.mark.law("gradients")
def test_ten_steps():
    losses, params = ten_steps_by_hand(QWEN3, weights(QWEN3))
    with float64_engine():
        expected, after = ten_steps_by_jax(in_float64(QWEN3), weights(QWEN3), np.float64(0.5))
    np.testing.assert_allclose(losses, expected, rtol=1e-9)
    assert_trees_close(params, after, rtol=1e-6)  # a weight whose gradient is nearly 0 moves by its sign
    assert losses[9] < losses[0] - 0.5
