"""Each layer's backward is the slope that finite differences find, for every input and weight of it."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import B, T, tiny_config, tokens_of

from engine.by_hand import layers
from engine.model.config import RopeScaling

D, F, V, N, K, H = 20, 28, 41, 6, 3, 4
SEEDS = st.integers(0, 2**32 - 1)
EPS = 0.1  # large enough to be felt


def assert_slope(forward: Callable, arguments: Sequence[np.ndarray], gradients: Callable) -> None:
    """`gradients(dy)` for a random dy against central differences along a random direction, one argument at a time."""
    rng = np.random.default_rng(99)
    dy = rng.standard_normal(np.shape(forward(*arguments)))
    slopes = gradients(dy)
    assert len(slopes) == len(arguments)
    for place, (argument, gradient) in enumerate(zip(arguments, slopes)):
        assert gradient.shape == argument.shape
        along = rng.standard_normal(argument.shape)
        step = 1e-5
        ends = []
        for sign in (1, -1):
            moved = [a + sign * step * along if i == place else a for i, a in enumerate(arguments)]
            ends.append(np.sum(dy * forward(*moved)))
        slope = (ends[0] - ends[1]) / (2 * step)
        scale = np.linalg.norm(gradient) * np.linalg.norm(along)
        assert scale > 0
        assert abs(slope - np.sum(gradient * along)) < 1e-7 * scale, f"argument {place}"


def normal(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) for shape in shapes]


@given(SEEDS)
def test_lookup(seed):
    (embed,) = normal(seed, (V, D))
    tokens = tokens_of(seed, B, T, vocab=5)  # some come twice, most never
    assert_slope(lambda e: layers.lookup(e, tokens), [embed], lambda dy: [layers.lookup_backward(dy, tokens, V)])


@given(SEEDS)
def test_project(seed):
    x, w = normal(seed, (B, T, D), (D, F))
    assert_slope(layers.project, [x, w], lambda dy: layers.project_backward(dy, x, w))


@given(SEEDS)
@pytest.mark.parametrize("shape", [(B, T, D), (B, T, N, H)])
def test_rms_norm(shape, seed):
    x, gain = normal(seed, shape, shape[-1:])
    forward = lambda x, gain: layers.rms_norm(x, gain, EPS)
    assert_slope(forward, [x, gain], lambda dy: layers.rms_norm_backward(dy, x, gain, EPS))


@given(SEEDS)
@pytest.mark.parametrize("scaling", [None, RopeScaling(4.0, 1.0, 4.0, 64)])
def test_rope(scaling, seed):
    cfg = tiny_config(rope_scaling=scaling, rope_theta=100.0)
    tables = layers.rope_tables(cfg, tokens_of(seed, B, T), np.dtype("float64"))
    (x,) = normal(seed, (B, T, N, H))
    assert_slope(lambda x: layers.rope(x, *tables), [x], lambda dy: [layers.rope_backward(dy, *tables)])
    np.testing.assert_allclose(np.linalg.norm(layers.rope(x, *tables), axis=-1), np.linalg.norm(x, axis=-1))


@given(SEEDS)
def test_heads_are_only_moved(seed):
    q, k = normal(seed, (B, T, N, H), (B, T, K, H))
    np.testing.assert_array_equal(layers.ungroup_heads(layers.group_heads(q, K), T), q)
    np.testing.assert_array_equal(layers.group_heads(k, K), k.transpose(0, 2, 1, 3))
    rows = layers.group_heads(q, K).reshape(B, K, N // K, T, H)
    for n in range(N):
        np.testing.assert_array_equal(rows[:, n // (N // K), n % (N // K)], q[:, :, n])  # head n reads key head n // G


SEGMENTS = np.array([[0, 0, 0, 1, 1, 1, 1], [2, 2, 5, 5, 5, 6, 6]])


@given(SEEDS)
@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["one text a row", "packed"])
def test_attention(segments, seed):
    q, k, v = normal(seed, (B, K, N // K * T, H), (B, K, T, H), (B, K, T, H))
    mask = layers.causal_mask(segments, T)
    p = layers.attention_weights(q, k, mask)
    np.testing.assert_allclose(p.sum(-1), 1)
    assert np.array_equal(p.reshape(B, K, -1, T, T) > 0, np.broadcast_to(mask, (B, K, N // K, T, T)))
    backward = lambda dp: layers.attention_weights_backward(dp, p, q, k)
    assert_slope(lambda q, k: layers.attention_weights(q, k, mask), [q, k], backward)
    assert_slope(layers.weighted_values, [p, v], lambda dy: layers.weighted_values_backward(dy, p, v))


@given(SEEDS)
def test_swiglu(seed):
    gate, up = normal(seed, (B, T, F), (B, T, F))
    assert_slope(layers.swiglu, [3 * gate, up], lambda dy: layers.swiglu_backward(dy, 3 * gate, up))


def test_swiglu_far_out():
    """No overflow where a sigmoid is 0 or 1."""
    gate = np.array([-1e4, -800.0, 0.0, 800.0, 1e4])
    with np.errstate(all="raise"):
        np.testing.assert_array_equal(layers.swiglu(gate, np.ones(5)), [0, 0, 0, 800, 1e4])
        np.testing.assert_array_equal(layers.swiglu_backward(np.ones(5), gate, np.ones(5))[0], [0, 0, 0.5, 1, 1])


@given(SEEDS, st.floats(0.1, 0.9))
def test_cross_entropy(seed, share):
    (logits,) = normal(seed, (B, T, V))
    logits *= 5
    targets, mask = tokens_of(seed, B, T), np.random.default_rng(seed).random((B, T)) < share
    mask[0, 0] = True
    slope = layers.cross_entropy_backward(logits, targets, mask)
    assert_slope(lambda z: np.array(layers.cross_entropy(z, targets, mask)), [logits], lambda dy: [dy * slope])
    assert not slope[~mask].any()
    np.testing.assert_allclose(slope.sum(-1), 0, atol=1e-15)
    other = np.where(mask, targets, -1)  # what does not count may be anything
    assert layers.cross_entropy(logits, other, mask) == layers.cross_entropy(logits, targets, mask)
    np.testing.assert_array_equal(layers.cross_entropy_backward(logits, other, mask), slope)


def test_no_target_counts():
    logits, targets, mask = np.ones((B, T, V)), np.zeros((B, T), int), np.zeros((B, T), bool)
    assert layers.cross_entropy(logits, targets, mask) == 0
    assert not layers.cross_entropy_backward(logits, targets, mask).any()


def test_large_logits_do_not_overflow():
    logits, targets = np.full((1, 2, 3), 5000.0), np.array([[0, 2]])
    logits[0, 1, 2] = 9000
    np.testing.assert_allclose(layers.cross_entropy(logits, targets, np.ones((1, 2), bool)), np.log(3) / 2)


def test_the_comparison_sees_a_wrong_slope():
    x, w = normal(0, (B, T, D), (D, F))
    wrong = lambda dy: (layers.project_backward(dy, x, w)[0], 1.00001 * layers.project_backward(dy, x, w)[1])
    with pytest.raises(AssertionError, match="argument 1"):
        assert_slope(layers.project, [x, w], wrong)
