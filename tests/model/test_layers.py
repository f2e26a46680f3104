"""The layers as on paper: against NumPy, and by the properties that their papers claim."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import B, T, positions_of, tiny_config

from engine.model import layers
from engine.model.config import PRESETS, RopeScaling

N, K, H = 6, 3, 4
F32 = jnp.dtype("float32")


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_rms_norm_gives_unit_root_mean_square_times_the_gain():
    x, gain = 7 * normal(0, B, T, 20), normal(1, 20)
    y = np.asarray(layers.rms_norm(x, gain, 1e-5, F32))
    np.testing.assert_allclose(y, gain * x / np.sqrt((x.astype(float) ** 2).mean(-1, keepdims=True) + 1e-5), rtol=1e-5)
    np.testing.assert_allclose(((y / gain) ** 2).mean(-1), 1, rtol=1e-5)
    assert not np.asarray(layers.rms_norm(0 * x, gain, 1e-5, F32)).any()
    assert layers.rms_norm(x, gain, 1e-5, jnp.bfloat16).dtype == jnp.bfloat16


def test_swiglu_is_silu_times_up():
    gate, up = 3 * normal(0, B, T, 28), normal(1, B, T, 28)
    np.testing.assert_allclose(layers.swiglu(gate, up, F32), gate / (1 + np.exp(-gate)) * up, rtol=1e-5, atol=1e-6)


def rotated(x: np.ndarray, scale: np.ndarray, positions: np.ndarray, cfg=None) -> np.ndarray:
    cos, sin = layers.rope_tables(cfg or tiny_config(), jnp.asarray(positions))
    return np.asarray(layers.rope(jnp.asarray(x), jnp.asarray(scale), cos, sin, F32))


def test_rope_rotates_each_pair_as_a_complex_number():
    x, scale = normal(0, B, T, N, H), normal(1, N)
    positions = positions_of(B, T) + np.array([[0], [9]], np.int32)
    angle = positions[..., None] * 10_000.0 ** (-np.arange(H // 2) / (H // 2))  # (B, T, H / 2)
    pairs = (x[..., : H // 2] + 1j * x[..., H // 2 :]) * scale[:, None]
    pairs = pairs * np.exp(1j * angle)[:, :, None]
    np.testing.assert_allclose(rotated(x, scale, positions), np.concatenate([pairs.real, pairs.imag], -1), rtol=1e-4, atol=1e-5)


@given(st.integers(0, 2000), st.integers(0, 2000), st.integers(0, 2000), st.integers(0, 99))
def test_rope_scores_depend_on_the_distance_alone(at, other, shift, seed):
    q, k, ones = normal(seed, 1, 1, N, H), normal(seed + 1, 1, 1, N, H), np.ones(N, np.float32)
    score = lambda p, s: (rotated(q, ones, np.array([[p]])) * rotated(k, ones, np.array([[s]]))).sum(-1)
    np.testing.assert_allclose(score(at, other), score(at + shift, other + shift), atol=5e-3)
    lengths = np.linalg.norm(rotated(q, ones, np.array([[at]])), axis=-1)
    np.testing.assert_allclose(lengths, np.linalg.norm(q, axis=-1), rtol=1e-5)


def test_rope_at_position_zero_is_the_scale_alone():
    x, scale = normal(0, B, T, N, H), normal(1, N)
    np.testing.assert_array_equal(rotated(x, scale, np.zeros((B, T), np.int32)), x * scale[:, None])


def stretched(frequencies: np.ndarray, scaling: RopeScaling) -> list[float]:
    """The three cases of Llama 3.1's stretch, one frequency at a time."""
    out = []
    for frequency in frequencies:
        wavelength = 2 * np.pi / frequency
        if wavelength < scaling.original_context / scaling.high_freq_factor:
            out.append(frequency)
        elif wavelength > scaling.original_context / scaling.low_freq_factor:
            out.append(frequency / scaling.factor)
        else:
            smooth = (scaling.original_context / wavelength - scaling.low_freq_factor) / (
                scaling.high_freq_factor - scaling.low_freq_factor
            )
            out.append((1 - smooth) * frequency / scaling.factor + smooth * frequency)
    return out


@pytest.mark.parametrize(
    "scaling", [PRESETS["llama-3.2-1b"].rope_scaling, RopeScaling(8.0, 1.0, 4.0, 8192), RopeScaling(4.0, 2.0, 3.0, 64)]
)
def test_stretched_frequencies_are_llama_threes(scaling):
    cfg = dataclasses.replace(PRESETS["llama-3.2-1b"], rope_scaling=None)
    plain = 500_000.0 ** (-np.arange(32) / 32)
    np.testing.assert_allclose(layers.rope_frequencies(cfg), plain, rtol=1e-5)
    expected = stretched(plain, scaling)
    np.testing.assert_allclose(layers.rope_frequencies(dataclasses.replace(cfg, rope_scaling=scaling)), expected, rtol=1e-5)
    unchanged = sum(a == b for a, b in zip(plain, expected))
    assert 0 < unchanged < 32, "the case reaches both ends"


def attended(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Attention one query at a time: q (B, T, N, H), k and v (B, K, S, H), mask (B, T, S) -> (B, T, N * H)."""
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(q.shape[:3]):
        head = n // (q.shape[2] // k.shape[1])
        visible = mask[b, t]
        weights = np.exp(k[b, head, visible].astype(float) @ q[b, t, n])
        out[b, t, n] = weights @ v[b, head, visible] / weights.sum()
    return out.reshape(*q.shape[:2], -1)


def test_attention_is_the_formula():
    S = 9
    q, k, v = normal(0, B, T, N, H), normal(1, B, K, S, H), normal(2, B, K, S, H)
    mask = np.random.default_rng(3).random((B, T, S)) < 0.5
    mask[..., 0] = True
    np.testing.assert_allclose(layers.attention(q, k, v, mask), attended(q, k, v, mask), rtol=1e-4, atol=1e-5)


def test_a_query_that_sees_nothing_gives_numbers():
    q, k = normal(0, B, T, N, H), normal(1, B, K, 9, H)
    assert np.isfinite(layers.attention(q, k, k, np.zeros((B, T, 9), bool))).all()


def test_the_causal_mask_looks_back_inside_the_segment():
    segments = np.array([[0, 0, 1, 1, 1], [4, 4, 4, 4, 7]])
    looks = np.asarray(layers.causal_mask(5, segments))
    for b, t, s in np.ndindex(2, 5, 5):
        assert looks[b, t, s] == (s <= t and segments[b, t] == segments[b, s])
    np.testing.assert_array_equal(layers.causal_mask(5), np.tri(5, dtype=bool)[None])
