"""The layers without parameters, as on paper: the readable reference, and the forward pass of `backward.py`.

Elementwise work and softmax are float32: bfloat16 arithmetic is emulated on a CPU, and loses bits
everywhere.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from engine.model.config import ModelConfig, YarnScaling

# a score that softmax turns into 0; finite, so that a row without any key gives numbers and not NaN
MASKED = -1e30


def dot32(
    left: Array, right: Array
) -> Array:  # no partial: that would keep the float32 of the module's import
    return jnp.dot(left, right, preferred_element_type=jnp.float32)


def einsum32(equation: str, *operands: Array) -> Array:
    return jnp.einsum(equation, *operands, preferred_element_type=jnp.float32)


def matmul(x: Array, w: Array, dtype: DTypeLike) -> Array:
    """x (M, D), w (D, F) -> (M, F) in `dtype`; multiplied in x's dtype."""
    return jnp.dot(x, w.astype(x.dtype), preferred_element_type=dtype)


def matmul_rows(x: Array, w: Array, dtype: DTypeLike) -> Array:
    """x (M, D), w (V, D) -> x w^T (M, V) in `dtype`: a tied head."""
    return jnp.einsum("md,vd->mv", x, w.astype(x.dtype), preferred_element_type=dtype)


def lookup(embed: Array, tokens: Array) -> Array:
    """embed (V, D), tokens (...) -> (..., D)."""
    return embed[tokens]


def rms_norm(x: Array, gain: Array | None, eps: float, dtype: DTypeLike) -> Array:
    """x (..., D), gain (..., D) or None for 1 -> gain * x / rms(x) in `dtype` (Zhang & Sennrich
    2019, equation 4).
    """
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    if gain is not None:
        x = x * gain.astype(jnp.float32)
    return x.astype(dtype)


def rope_frequencies(cfg: ModelConfig) -> Array:
    """Returns the angle per position of each of the H / 2 pairs, float32 (Su et al. 2021, equation
    15; scaled as Llama 3.1 or YaRN does).
    """
    half = cfg.head_dim // 2
    pairs = jnp.arange(half, dtype=jnp.float32)
    frequencies = cfg.rope_theta ** (-pairs / half)
    scaling = cfg.rope_scaling
    if scaling is None:
        return frequencies
    # Slow pairs turn `factor` times slower, fast ones stay, those between are blended.
    if isinstance(scaling, YarnScaling):
        first, last = scaling.blended_pairs(cfg.head_dim, cfg.rope_theta)
        blend = (last - pairs) / (last - first)
    else:
        turns = scaling.original_context * frequencies / (2 * math.pi)
        blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = jnp.clip(blend, 0.0, 1.0)
    return frequencies * (blend + (1 - blend) / scaling.factor)


def rope_tables(cfg: ModelConfig, positions: Array) -> tuple[Array, Array]:
    """positions (B, T) int32 -> cos, sin (B, T, H / 2) float32."""
    angles = positions[..., None].astype(jnp.float32) * rope_frequencies(cfg)
    cos = jnp.cos(angles)
    sin = jnp.sin(angles)
    if isinstance(cfg.rope_scaling, YarnScaling):
        cos = cos * cfg.rope_scaling.attention_factor
        sin = sin * cfg.rope_scaling.attention_factor
    return cos, sin


def rope(x: Array, cos: Array, sin: Array, scale: float, dtype: DTypeLike) -> Array:
    """x (B, T, N, H), cos and sin (B, T, H / 2) -> scale * x rotated by its position, in `dtype`.

    Pairs are (i, i + H / 2), as in Hugging Face's files. `backward.py` computes the same in another
    shape, ten times as fast.
    """
    first, second = jnp.split(x.astype(jnp.float32) * scale, 2, axis=-1)
    cos = cos[:, :, None]
    sin = sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(dtype)


def attention(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """q (B, T, N, H) scaled by H ** -0.5, k and v (B, K, S, H), mask (B, T, S) True where a query
    may attend -> (B, T, N * H) in v's dtype. Query head n reads key head n // G.
    """
    grouped = group_heads(q, k.shape[1])
    B, K, G, T, H = grouped.shape
    scores = einsum32("bkrh,bksh->bkrs", grouped.reshape(B, K, G * T, H), k)
    weights = jax.nn.softmax(jnp.where(jnp.tile(mask, (1, G, 1))[:, None], scores, MASKED), axis=-1)
    out = einsum32("bkrs,bksh->bkrh", weights.astype(v.dtype), v)
    return join_heads(out.reshape(grouped.shape)).astype(v.dtype)


def group_heads(x: Array, K: int) -> Array:
    """x (B, T, N, H) -> (B, K, G, T, H): the heads of each key head together."""
    B, T, N, H = x.shape
    return x.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)


def join_heads(x: Array) -> Array:
    """x (B, K, G, T, H) -> (B, T, N * H)."""
    B, K, G, T, H = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G * H)


def causal_attention(q: Array, k: Array, v: Array, segments: Array | None) -> Array:
    """q (B, T, N, H) scaled by H ** -0.5, k and v (B, T, K, H), segments (B, T) or None
    -> (B, T, N * H).
    """
    k = k.transpose(0, 2, 1, 3)
    v = v.transpose(0, 2, 1, 3)
    return attention(q, k, v, causal_mask(q.shape[1], segments))


def causal_mask(T: int, segments: Array | None = None) -> Array:
    """(1, T, T) or, with segments (B, T), (B, T, T): a query attends to itself and back, inside its
    segment.
    """
    causal = jnp.tril(jnp.ones((1, T, T), bool))
    if segments is None:
        return causal
    return causal & (segments[:, :, None] == segments[:, None, :])


def swiglu(gate: Array, up: Array, dtype: DTypeLike) -> Array:
    """gate, up (..., F) -> (..., F) in `dtype`: silu(gate) * up (Shazeer 2020, equation 6)."""
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(dtype)
