"""Attention for training, and over cached keys, by the platform that a program is compiled for.

A fused kernel (`ops.py`) takes the shapes it can. Elsewhere causal attention goes in blocks of queries: keys
after a block are never multiplied, and the softmax weights are kept for the backward pass in the compute dtype, B N T T / 2
numbers. `layers.py` has both functions as on paper.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from engine.mesh import layout
from engine.model import layers
from engine.model.config import ModelConfig
from engine.model.ops import ops, platform, transpose

QUERY_BLOCK = 128  # queries


def attention(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """As `layers.attention`, for cached keys: forward only."""
    kernel = ops().fused_prefill
    if kernel and q.shape[1] > 1:  # a lone token reads each key once: plain products do as well
        fused = layout.attend_by_head(kernel, q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), mask)
        if fused is not None:
            return fused
    lone = q.shape[1] * q.shape[2] == k.shape[1]
    if not (lone and ops().pads_lone_row):
        return layers.attention(q, k, v, mask)
    return layers.attention(jnp.concatenate([q, q], axis=1), k, v, jnp.concatenate([mask, mask], axis=1))[:, :1]


def causal_attention(q: Array, k: Array, v: Array, segments: Array | None) -> Array:
    """As `layers.causal_attention`: q (B, T, N, H) scaled by H ** -0.5, k and v (B, T, K, H), segments (B, T) or None
    -> (B, T, N * H)."""
    kernel = ops().fused_attention
    fused = layout.attend_by_head(kernel, q, k, v, segments) if kernel else None
    return causal_attention_in_blocks(q, k, v, segments) if fused is None else fused


def has_kernel(cfg: ModelConfig, tokens: int) -> bool:
    """Whether a fused kernel computes a model's attention over texts of `tokens`, on JAX's platform."""
    kernel = ops().fused_attention
    if kernel is None:
        return False
    q, k = (jax.ShapeDtypeStruct((1, tokens, heads, cfg.head_dim), cfg.dtype) for heads in (cfg.heads, cfg.kv_heads))
    return jax.eval_shape(lambda q, k: kernel(q, k, k, None), q, k) is not None


def attention_path(cfg: ModelConfig, tokens: int) -> str:
    """Returns what computes it, in words: paths agree within rounding, and each by itself to the bit."""
    if not has_kernel(cfg, tokens):
        return "by XLA"
    return "in C" if platform() == "cpu" else "by a fused kernel"


@jax.custom_vjp
def causal_attention_in_blocks(q: Array, k: Array, v: Array, segments: Array | None) -> Array:
    """As `causal_attention`, in blocks of queries, each against the keys up to its own end.

    Scores are key-major (S, T): then every product of both passes reads its operands along the last axis, and only arrays
    of head width are transposed.
    """
    return _causal_attention_forward(q, k, v, segments)[0]


def _blocks(T: int) -> list[tuple[int, int]]:
    size = QUERY_BLOCK if T % QUERY_BLOCK == 0 else T
    return [(start, start + size) for start in range(0, T, size)]


def _rows(x: Array, start: int, end: int) -> Array:
    """Queries start..end of x (B, K, G, T, H), heads of a group side by side: (B, K, G * block, H)."""
    B, K, G, _, H = x.shape
    return x[:, :, :, start:end].reshape(B, K, G * (end - start), H)


def _block_mask(start: int, end: int, G: int, segments: Array | None) -> Array:
    """(1 or B, 1, S=end, G * block): the causal mask of one block, key-major."""
    mask = jnp.arange(end)[:, None] <= jnp.arange(start, end)[None]
    if segments is None:
        return jnp.tile(mask, (1, G))[None, None]
    same = segments[:, :end, None] == segments[:, None, start:end]
    return jnp.tile(mask[None] & same, (1, 1, G))[:, None]


def _causal_attention_forward(q: Array, k: Array, v: Array, segments: Array | None):
    B, T, N, H = q.shape
    K = k.shape[2]
    q, k, v = layers.group_heads(q, K), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    v_transposed = transpose(v)
    weights, out = [], []
    for start, end in _blocks(T):
        scores = layers.einsum32("bksh,bkrh->bksr", k[:, :, :end], _rows(q, start, end))
        mask = _block_mask(start, end, N // K, segments)
        p = jax.nn.softmax(jnp.where(mask, scores, layers.MASKED), axis=-2).astype(v.dtype)
        o = jnp.einsum("bkhs,bksr->bkhr", v_transposed[..., :end], p, preferred_element_type=v.dtype)
        weights.append(p)
        out.append(o.reshape(B, K, H, N // K, end - start))
    o = transpose(jnp.concatenate(out, axis=-1).transpose(0, 1, 3, 2, 4))  # (B, K, G, T, H)
    return layers.join_heads(o), (q, k, v, segments, weights, o)


def _causal_attention_backward(residuals: Any, g: Array):
    """With P the weights and o = P v: dv = P^T g, dP = g v^T, dS = P (dP - sum(o g)), dq = dS k, dk = dS^T q."""
    q, k, v, _, weights, o = residuals
    B, K, G, T, H = q.shape
    g = layers.group_heads(g.reshape(B, T, K * G, H), K)
    delta = jnp.sum(o.astype(jnp.float32) * g.astype(jnp.float32), axis=-1)  # (B, K, G, T)
    k_transposed = transpose(k)
    dq_blocks: list[Array] = []
    dk = dv = jnp.zeros(k.shape, jnp.float32)
    for p, (start, end) in zip(weights, _blocks(T)):
        g_rows = _rows(g, start, end)
        dp = layers.einsum32("bksh,bkrh->bksr", v[:, :, :end], g_rows)
        ds = p.astype(jnp.float32) * (dp - delta[..., start:end].reshape(B, K, 1, -1))
        ds = ds.astype(p.dtype)
        dq_block = jnp.einsum("bkhs,bksr->bkhr", k_transposed[..., :end], ds, preferred_element_type=q.dtype)
        dq_blocks.append(dq_block.reshape(B, K, H, G, end - start))
        dk_block = layers.einsum32("bksr,bkrh->bksh", ds, _rows(q, start, end))
        dv_block = layers.einsum32("bksr,bkrh->bksh", p, g_rows)
        rest = ((0, 0), (0, 0), (0, T - end), (0, 0))
        dk, dv = dk + jnp.pad(dk_block, rest), dv + jnp.pad(dv_block, rest)
    dq = transpose(jnp.concatenate(dq_blocks, axis=-1).transpose(0, 1, 3, 2, 4))
    dq = dq.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)
    return dq, dk.astype(k.dtype).transpose(0, 2, 1, 3), dv.astype(v.dtype).transpose(0, 2, 1, 3), None


causal_attention_in_blocks.defvjp(_causal_attention_forward, _causal_attention_backward)
