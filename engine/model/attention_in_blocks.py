"""Causal attention in blocks of queries, each against the keys up to its own end, with its backward pass by hand.

Keys after a block are never multiplied, and the softmax weights are kept for the backward pass in
the compute dtype, B N T T / 2 numbers. Scores are key-major (S, T): then every product of both
passes reads its operands along the last axis, and only arrays of head width are transposed.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from engine.model import layers
from engine.model.ops import transpose

QUERY_BLOCK = 128  # queries


@jax.custom_vjp
def causal_attention_in_blocks(q: Array, k: Array, v: Array, segments: Array | None) -> Array:
    """As `layers.causal_attention`."""
    return _causal_attention_forward(q, k, v, segments)[0]


def _query_blocks(T: int) -> list[tuple[int, int]]:
    """Returns the first query of each block, and the one behind its last."""
    size = T
    if T % QUERY_BLOCK == 0:
        size = QUERY_BLOCK
    return [(start, start + size) for start in range(0, T, size)]


def _rows(x: Array, start: int, end: int) -> Array:
    """Returns queries start..end of x (B, K, G, T, H), heads of a group side by side: (B, K, G * block,
    H).
    """
    B, K, G, _, H = x.shape
    return x[:, :, :, start:end].reshape(B, K, G * (end - start), H)


def _block_mask(start: int, end: int, G: int, segments: Array | None) -> Array:
    """Returns the causal mask of one block, key-major, (1 or B, 1, S=end, G * block)."""
    mask = jnp.arange(end)[:, None] <= jnp.arange(start, end)[None]
    if segments is None:
        return jnp.tile(mask, (1, G))[None, None]
    in_same_segment = segments[:, :end, None] == segments[:, None, start:end]
    return jnp.tile(mask[None] & in_same_segment, (1, 1, G))[:, None]


def _causal_attention_forward(q: Array, k: Array, v: Array, segments: Array | None):
    B, T, N, H = q.shape
    K = k.shape[2]
    q = layers.group_heads(q, K)
    k = k.transpose(0, 2, 1, 3)
    v = v.transpose(0, 2, 1, 3)
    v_transposed = transpose(v)
    weights = []
    out = []
    for start, end in _query_blocks(T):
        scores = layers.einsum32("bksh,bkrh->bksr", k[:, :, :end], _rows(q, start, end))
        mask = _block_mask(start, end, N // K, segments)
        p = jax.nn.softmax(jnp.where(mask, scores, layers.MASKED), axis=-2).astype(v.dtype)
        o = jnp.einsum("bkhs,bksr->bkhr", v_transposed[..., :end], p, preferred_element_type=v.dtype)
        weights.append(p)
        out.append(o.reshape(B, K, H, N // K, end - start))
    o = transpose(jnp.concatenate(out, axis=-1).transpose(0, 1, 3, 2, 4))  # (B, K, G, T, H)
    return layers.join_heads(o), (q, k, v, segments, weights, o)


def _causal_attention_backward(residuals: Any, g: Array):
    """Returns the gradients of q, k and v, and None for the segments.

    With P the weights and o = P v:

        dv = P^T g
        dP = g v^T
        dS = P (dP - sum(o g))
        dq = dS k
        dk = dS^T q
    """
    q, k, v, _, weights, o = residuals
    B, K, G, T, H = q.shape
    g = layers.group_heads(g.reshape(B, T, K * G, H), K)
    delta = jnp.sum(o.astype(jnp.float32) * g.astype(jnp.float32), axis=-1)  # (B, K, G, T)
    k_transposed = transpose(k)
    dq_blocks: list[Array] = []
    dk = dv = jnp.zeros(k.shape, jnp.float32)
    for p, (start, end) in zip(weights, _query_blocks(T)):
        g_rows = _rows(g, start, end)
        dp = layers.einsum32("bksh,bkrh->bksr", v[:, :, :end], g_rows)
        ds = p.astype(jnp.float32) * (dp - delta[..., start:end].reshape(B, K, 1, -1))
        ds = ds.astype(p.dtype)
        dq_block = jnp.einsum("bkhs,bksr->bkhr", k_transposed[..., :end], ds, preferred_element_type=q.dtype)
        dq_blocks.append(dq_block.reshape(B, K, H, G, end - start))
        dk_block = layers.einsum32("bksr,bkrh->bksh", ds, _rows(q, start, end))
        dv_block = layers.einsum32("bksr,bkrh->bksh", p, g_rows)
        rest = ((0, 0), (0, 0), (0, T - end), (0, 0))
        dk = dk + jnp.pad(dk_block, rest)
        dv = dv + jnp.pad(dv_block, rest)
    dq = transpose(jnp.concatenate(dq_blocks, axis=-1).transpose(0, 1, 3, 2, 4))
    dq = dq.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)
    return dq, dk.astype(k.dtype).transpose(0, 2, 1, 3), dv.astype(v.dtype).transpose(0, 2, 1, 3), None


causal_attention_in_blocks.defvjp(_causal_attention_forward, _causal_attention_backward)
