"""Attention for training, and over cached keys, by the platform that a program is compiled for.

A fused kernel (`ops.py`) takes the shapes it can; elsewhere causal attention goes in blocks of
queries. `layers.py` has both functions as on paper.
"""

import jax
import jax.numpy as jnp
from jax import Array

from engine.mesh import layout
from engine.model import layers
from engine.model.attention_in_blocks import causal_attention_in_blocks
from engine.model.config import ModelConfig
from engine.model.ops import ops, platform


def attention(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """As `layers.attention`, for cached keys: forward only."""
    kernel = ops().fused_prefill
    if kernel and q.shape[1] > 1:  # a lone token reads each key once: plain products do as well
        fused = layout.attend_by_head(kernel, q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), mask)
        if fused is not None:
            return fused
    has_lone_row = q.shape[1] * q.shape[2] == k.shape[1]  # one query for each key head
    if not (has_lone_row and ops().pads_lone_row):
        return layers.attention(q, k, v, mask)
    two_queries = jnp.concatenate([q, q], axis=1)
    two_masks = jnp.concatenate([mask, mask], axis=1)
    return layers.attention(two_queries, k, v, two_masks)[:, :1]


def causal_attention(q: Array, k: Array, v: Array, segments: Array | None) -> Array:
    """As `layers.causal_attention`, by a kernel where there is one."""
    kernel = ops().fused_attention
    if kernel:
        fused = layout.attend_by_head(kernel, q, k, v, segments)
        if fused is not None:
            return fused
    return causal_attention_in_blocks(q, k, v, segments)


def has_fused_attention(cfg: ModelConfig, tokens: int) -> bool:
    """Returns whether a fused kernel computes a model's attention over texts of `tokens` on JAX's
    platform.
    """
    kernel = ops().fused_attention
    if kernel is None:
        return False
    q = jax.ShapeDtypeStruct((1, tokens, cfg.heads, cfg.head_dim), cfg.dtype)
    k = jax.ShapeDtypeStruct((1, tokens, cfg.kv_heads, cfg.head_dim), cfg.dtype)
    return jax.eval_shape(lambda q, k: kernel(q, k, k, None), q, k) is not None


def attention_path(cfg: ModelConfig, tokens: int) -> str:
    """Returns in words what computes attention over texts of `tokens`. Paths agree within rounding, and
    each with itself to the bit.
    """
    if not has_fused_attention(cfg, tokens):
        return "by XLA"
    if platform() == "cpu":
        return "in C"
    return "by a fused kernel"
