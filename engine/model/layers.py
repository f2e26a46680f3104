"""The math without parameters, as one would write it on paper: the readable reference, and the path on GPU and TPU.

Elementwise work and softmax are float32, whatever the products are computed in: on a CPU bfloat16 arithmetic is
emulated, and everywhere it loses bits that cost nothing to keep.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from engine.model.config import ModelConfig, RopeScaling

MASKED = -1e30  # a score no softmax sees; finite, so that a row without any key gives numbers and not NaN


def unit_norm(x: Array, eps: float, dtype: DTypeLike) -> Array:
    """x (..., D) -> x / rms(x) in `dtype` (Zhang & Sennrich 2019, equation 4). The gain belongs to whoever reads it."""
    x = x.astype(jnp.float32)
    return (x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)).astype(dtype)


def rope_frequencies(cfg: ModelConfig) -> Array:
    """Angle per position for each of the H / 2 pairs, float32 (Su et al. 2021, equation 15; scaled as Llama 3.1 does)."""
    half = cfg.head_dim // 2
    frequencies = cfg.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    return frequencies if cfg.rope_scaling is None else _stretch(frequencies, cfg.rope_scaling)


def _stretch(frequencies: Array, scaling: RopeScaling) -> Array:
    """Slow pairs turn `factor` times slower, fast ones stay, those between are blended."""
    turns = scaling.original_context * frequencies / (2 * math.pi)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = jnp.clip(blend, 0.0, 1.0)
    return frequencies * (blend + (1 - blend) / scaling.factor)


def rope_tables(cfg: ModelConfig, positions: Array) -> tuple[Array, Array]:
    """positions (B, T) int32 -> cos, sin (B, T, H / 2) float32."""
    angles = positions[..., None].astype(jnp.float32) * rope_frequencies(cfg)
    return jnp.cos(angles), jnp.sin(angles)


def rope(x: Array, gain: Array, cos: Array, sin: Array, dtype: DTypeLike) -> Array:
    """x (B, T, N, H), gain (N, H), cos and sin (B, T, H / 2) -> gain * x turned by its position, in `dtype`.

    Pairs are (i, i + H / 2), as in Hugging Face's files.
    """
    first, second = jnp.split(x.astype(jnp.float32) * gain, 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(dtype)


def attention(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """q (B, T, N, H), k and v (B, K, S, H), mask (B, T, S) True where a query may look -> (B, T, N * H) in v's dtype.

    q arrives already scaled by H ** -0.5. Query head n reads key head n // G.
    """
    B, T, N, H = q.shape
    K = k.shape[1]
    G = N // K
    rows = q.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    scores = jnp.einsum("bkrh,bksh->bkrs", rows, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(jnp.tile(mask, (1, G, 1))[:, None], scores, MASKED), axis=-1)
    out = jnp.einsum("bkrs,bksh->bkrh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N * H).astype(v.dtype)


def causal_mask(T: int, segments: Array | None = None) -> Array:
    """(1, T, T) or, with segments (B, T), (B, T, T): a query may look at itself and back, inside its own segment."""
    causal = jnp.tril(jnp.ones((1, T, T), bool))
    return causal if segments is None else causal & (segments[:, :, None] == segments[:, None, :])


def swiglu(gate: Array, up: Array, dtype: DTypeLike) -> Array:
    """gate, up (..., F) -> (..., F) in `dtype`: silu(gate) * up (Shazeer 2020, equation 6)."""
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(dtype)
