"""The loss: what it is, what it ignores, and that making it in chunks changes nothing but the memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval as pe

from engine.model import chunked_loss
from engine.model import loss as module
from engine.model.chunked_loss import chunked_losses
from engine.model.loss import summed_loss, token_losses
from engine.model.transformer import hidden_states, logits_of
from engine.model.weights.int8 import quantize_matrix
from engine.text.batch import Batch
from engine.training.step import NEXT_TOKEN, loss_and_gradient
from tests.tiny import B, T, equations, lively_params, positions_of, tiny_config, tokens_of

V = 41
loss_of = jax.jit(jax.value_and_grad(summed_loss, argnums=1), static_argnums=0)
MASK = np.array([[1, 1, 0, 1, 0, 1, 1], [0, 1, 1, 1, 1, 1, 0]], bool)


def batch_of(mask=MASK) -> Batch:
    return Batch(tokens_of(0, B, T), tokens_of(1, B, T), mask, positions_of(B, T), None)


def test_the_loss_is_the_mean_negative_log_probability_of_what_counts():
    logits, targets = (
        3 * np.random.default_rng(0).standard_normal((B, T, V)).astype(np.float32),
        tokens_of(1, B, T),
    )
    probability = np.exp(logits.astype(float)) / np.exp(logits.astype(float)).sum(-1, keepdims=True)
    nats = -np.log(np.take_along_axis(probability, targets[..., None], -1)[..., 0])
    np.testing.assert_allclose(token_losses(logits, targets), nats, rtol=1e-5)


@pytest.mark.parametrize("junk", [0, 40, -1, 10**6], ids=["first", "last", "below", "beyond"])
def test_masked_targets_do_not_matter_to_the_bit(cfg, params, junk):
    other = np.where(MASK, tokens_of(1, B, T), junk).astype(np.int32)
    actual, expected = (
        loss_of(cfg, params, batch_of()._replace(targets=other)),
        loss_of(cfg, params, batch_of()),
    )
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_a_batch_in_which_nothing_counts_has_no_loss_and_no_slope(cfg, params):
    nothing = np.zeros((B, T), bool)
    value, slope = loss_of(cfg, params, batch_of(nothing))
    assert float(value) == 0
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(slope))


@pytest.mark.parametrize(
    "limit", [pytest.param(module.LOGITS_LIMIT, marks=pytest.mark.whole), 0], ids=["whole", "in chunks"]
)
def test_a_row_with_a_weight_has_its_loss_and_gradient_times_the_weight(cfg, params, limit, monkeypatch):
    """And the mean is over the tokens that count, however much they weigh: half the weight is half
    the gradient.
    """
    monkeypatch.setattr(module, "LOGITS_LIMIT", limit)
    weights, first = np.array([[2.0], [0.25]], np.float32), np.array([[True], [False]])
    rows, times = (
        (MASK & first, MASK & ~first),
        lambda loss, weight: jax.tree.map(lambda leaf: weight * leaf, loss),
    )
    weighted_loss = jax.jit(jax.value_and_grad(summed_loss, 1), static_argnums=0)
    # to the bit: times a power of two nothing is rounded
    for row, weight in zip(rows, weights[:, 0]):
        expected = times(weighted_loss(cfg, params, batch_of(1.0 * row)), weight)
        jax.tree.map(
            np.testing.assert_array_equal, weighted_loss(cfg, params, batch_of(row * weights)), expected
        )
    # Together up to the rounding of sums over all tokens, whose terms are as large as a matrix's
    # largest numbers.
    close = lambda one, other: np.testing.assert_allclose(
        one, other, rtol=1e-5, atol=1e-6 * max(1, np.abs(other).max())
    )
    expected = jax.tree.map(
        np.add, *(times(loss_of(cfg, params, batch_of(row)), w) for row, w in zip(rows, weights[:, 0]))
    )
    jax.tree.map(close, weighted_loss(cfg, params, batch_of(MASK * weights)), expected)
    assert NEXT_TOKEN.count(batch_of(MASK * weights)) == MASK.sum()
    close(loss_and_gradient(cfg, params, {}, batch_of(MASK * weights))[0], expected[0] / MASK.sum())


@pytest.mark.law("layout equivalence")
@pytest.mark.parametrize(("tied", "chunk"), [(False, 7), (True, 41), (False, 64)])
def test_in_chunks_is_the_whole_with_gradients(tied, chunk, monkeypatch):
    cfg = tiny_config(tied=tied)
    params = lively_params(cfg)
    expected = loss_of(cfg, params, batch_of())
    monkeypatch.setattr(module, "LOGITS_LIMIT", 0)
    monkeypatch.setattr(module, "CHUNK", chunk)
    jaxpr = str(jax.make_jaxpr(functools.partial(summed_loss, cfg))(params, batch_of()))
    assert " scan[" in jaxpr, "it went the other way"
    chunked = jax.jit(jax.value_and_grad(lambda params: summed_loss(cfg, params, batch_of())))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), chunked, expected)


def test_in_chunks_bfloat16_logits_are_float32_too():
    cfg = tiny_config(dtype="bfloat16")
    params = lively_params(cfg)
    hidden, _ = hidden_states(cfg, params, tokens_of(0, B, T), positions_of(B, T))
    # Logits of tens, where bfloat16 would be off by a tenth; gains of 1, so that it does not matter
    # what they scale.
    params = params | {"head": 40 * params["head"], "norm": jnp.ones_like(params["norm"])}
    targets = tokens_of(1, B, T)
    expected = token_losses(logits_of(cfg, params, hidden), targets)
    assert expected.max() > 20
    np.testing.assert_allclose(chunked_losses(cfg, params, hidden, targets, 7), expected, atol=1e-3)


def array_sizes(jaxpr, dtype=None) -> list[int]:
    """Elements of each array (of a type) that a program makes, loops and calls included."""
    arrays = [variable.aval for equation in equations(jaxpr) for variable in equation.outvars]
    return [array.size for array in arrays if dtype in (None, array.dtype)]


def test_chunks_never_hold_all_logits(cfg, params):
    """Neither forward nor backward: that is what they are for."""
    rows, chunk = 13, 7
    hidden, targets = np.ones((rows, T, 20), np.float32), tokens_of(1, rows, T)

    def in_chunks(params, hidden):
        return chunked_losses(cfg, params, hidden, targets, chunk).sum()

    def at_once(params, hidden):
        return token_losses(hidden @ params["head"], targets).sum()

    differentiated = [
        jax.make_jaxpr(jax.grad(f, argnums=(0, 1)))(params, hidden).jaxpr for f in (in_chunks, at_once)
    ]
    assert max(array_sizes(differentiated[0])) < rows * T * V <= max(array_sizes(differentiated[1]))


@pytest.mark.parametrize(
    "kind",
    ["untied", pytest.param("tied", marks=pytest.mark.whole), pytest.param("int8", marks=pytest.mark.whole)],
)
def test_a_frozen_head_makes_its_logits_a_few_rows_at_a_time_and_nothing_else_changes(kind, monkeypatch):
    """The values, the gradient of what lies below, and of the head itself, should somebody ask for
    it.
    """
    cfg = tiny_config(tied=kind == "tied")
    params = lively_params(cfg)
    name = "embed" if cfg.tied else "head"
    params[name] = (
        quantize_matrix(params[name], "full") if kind == "int8" else params[name].astype(jnp.bfloat16)
    )
    trained = {"blocks": params["blocks"], "norm": params["norm"]} | (
        {} if kind == "int8" else {name: params[name]}
    )
    slopes = jax.jit(
        jax.value_and_grad(lambda trained: summed_loss(cfg, params | trained, batch_of(), head_trains=False))
    )
    expected = slopes(trained)
    monkeypatch.setattr(module, "ROWS_LIMIT", 4 * 3 * V)  # three rows, and two at the end
    monkeypatch.setattr(chunked_loss, "COLUMNS", 16)  # twice sixteen, and nine at the end
    jax.clear_caches()
    below = lambda blocks: summed_loss(cfg, params | {"blocks": blocks}, batch_of(), head_trains=False)
    traced = jax.make_jaxpr(jax.grad(below))(params["blocks"]).jaxpr
    program, _ = pe.dce_jaxpr(traced, [True] * len(traced.outvars))
    assert B * T * V not in array_sizes(program), "all logits exist at once"
    assert 3 * (16 if kind == "int8" else V) in array_sizes(program)
    if kind == "int8":
        assert 20 * V not in array_sizes(program, jnp.float32), "all of the head is wide at once"
    actual = slopes(trained)
    for leaf, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        # the head itself: each part's share of its gradient is
        rounded = leaf.dtype == jnp.bfloat16
        np.testing.assert_allclose(
            leaf, theirs, rtol=2e-2 if rounded else 1e-4, atol=0.05 if rounded else 1e-4
        )
