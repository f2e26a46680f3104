"""One set of weights runs in both: logits, loss and gradient by hand are those of the Flax model under `jax.grad`."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import by_hand
from engine.by_hand import layers, model
from engine.by_hand.model import leaves, to_numpy, tree_map
from engine.errors import UserError
from engine.inference.decode import prepare_params
from engine.model.transformer import forward
from engine.text.batch import Batch
from engine.training.step import loss_and_gradient
from tests.by_hand.wide import QWEN3, assert_trees_close, batch_of, float64_engine, in_float64, weights
from tests.tiny import FAMILY, B, T, lively_params, positions_of, tiny_config, tokens_of

SEEDS = st.integers(0, 2**32 - 1)
BY_NAME = pytest.mark.parametrize("name", FAMILY)


@functools.partial(jax.jit, static_argnums=0)
def engine(cfg, params, batch):
    """Returns the engine's logits, loss and gradient of a batch."""
    logits, _ = forward(cfg, params, batch.tokens, batch.positions, segments=batch.segments)
    return logits, *loss_and_gradient(cfg, params, {}, batch)


def all_by_hand(cfg, params, batch: Batch):
    tokens, targets, mask, positions, segments = batch
    logits = by_hand.forward(cfg, params, tokens, positions, segments)
    return logits, *by_hand.loss_and_gradient(cfg, params, tokens, targets, mask, positions, segments)


@pytest.mark.law("gradients")
@BY_NAME
@settings(max_examples=6)
@given(seed=SEEDS)
def test_float64(name, seed):
    cfg, batch = FAMILY[name], batch_of(seed)
    params = weights(cfg, seed)
    logits, loss, gradient = all_by_hand(cfg, params, batch)
    assert (logits.dtype, {leaf.dtype for leaf in leaves(gradient)}) == (np.float64, {np.dtype("float64")})
    with float64_engine():
        expected = jax.device_get(engine(in_float64(cfg), params, batch))
    assert expected[0].dtype == np.float64
    np.testing.assert_allclose(logits, expected[0], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(loss, expected[1], rtol=1e-12)
    assert_trees_close(gradient, expected[2], rtol=1e-9)
    assert all(np.abs(leaf).max() > 1e-6 for leaf in leaves(gradient)), "every leaf is felt"


@pytest.mark.parametrize("name", ["qwen3", "qwen2"])
def test_float32(name):
    cfg, batch = FAMILY[name], batch_of(0)
    params = lively_params(cfg)
    logits, loss, gradient = all_by_hand(cfg, params, batch)
    assert (logits.dtype, {leaf.dtype for leaf in leaves(gradient)}) == (np.float32, {np.dtype("float32")})
    expected = engine(cfg, params, batch)
    np.testing.assert_allclose(logits, expected[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(loss, expected[1], rtol=1e-6)
    limits = tree_map(lambda leaf: 1e-5 * np.abs(leaf).max(), to_numpy(expected[2]))
    tree_map(
        lambda a, b, limit: np.testing.assert_allclose(a, b, rtol=0, atol=limit),
        gradient,
        to_numpy(expected[2]),
        limits,
    )


@BY_NAME
def test_forward_alone_is_forward_with_residuals(name):
    cfg = FAMILY[name]
    params, tokens = weights(cfg), tokens_of(0, B, T)
    alone = by_hand.forward(cfg, params, tokens)
    np.testing.assert_array_equal(alone, model.forward_with_residuals(cfg, params, tokens)[0])
    np.testing.assert_array_equal(
        alone, by_hand.forward(cfg, params, tokens, positions_of(B, T), np.zeros((B, T), int))
    )


def test_arguments_are_not_changed():
    params, batch = weights(QWEN3), batch_of(3)
    before = tree_map(np.copy, params)
    _, residuals = model.forward_with_residuals(QWEN3, params, batch.tokens)
    dlogits = np.random.default_rng(0).standard_normal((B, T, 41))
    first, second = (model.backward(QWEN3, params, residuals, dlogits) for _ in range(2))
    tree_map(np.testing.assert_array_equal, first, second)
    tree_map(np.testing.assert_array_equal, params, before)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (np.array([[0, 41]]), ["between 0 and 41", "0 to 40"]),
        (np.array([[-1, 0]]), ["between -1 and 0"]),
        (np.array([1, 2]), ["(B, T)", "(2,)"]),
        (np.array([[0.0]]), ["integers", "float64"]),
    ],
)
def test_tokens_that_are_none(tokens, words):
    with pytest.raises(UserError) as error:
        by_hand.forward(QWEN3, weights(QWEN3), tokens)
    assert all(word in str(error.value) for word in words)


def test_weights_that_are_none():
    tokens, params = tokens_of(0, B, T), weights(QWEN3)
    with pytest.raises(UserError, match="bfloat16 and float32"):
        by_hand.forward(QWEN3, prepare_params(tiny_config(dtype="bfloat16"), lively_params(QWEN3)), tokens)
    with pytest.raises(UserError, match=r"head is a tuple; .* plain arrays"):
        by_hand.forward(QWEN3, params | {"head": (params["head"], 1)}, tokens)


def test_numbers_far_out_do_not_overflow():
    """Of SwiGLU where a sigmoid is 0 or 1, and of the loss at large logits; a batch in which
    nothing counts has no loss.
    """
    gate, ones = np.array([-1e4, -800.0, 0.0, 800.0, 1e4]), np.ones(5)
    logits, targets, mask = np.full((1, 2, 3), 5000.0), np.array([[0, 2]]), np.ones((1, 2), bool)
    logits[0, 1, 2] = 9000
    with np.errstate(all="raise", under="ignore"):
        np.testing.assert_array_equal(layers.swiglu(gate, ones), [0, 0, 0, 800, 1e4])
        np.testing.assert_array_equal(layers.swiglu_backward(ones, gate, ones)[0], [0, 0, 0.5, 1, 1])
        np.testing.assert_allclose(layers.cross_entropy(logits, targets, mask), np.log(3) / 2)
        assert layers.cross_entropy(logits, targets, ~mask) == 0
        assert not layers.cross_entropy_backward(logits, targets, ~mask).any()
