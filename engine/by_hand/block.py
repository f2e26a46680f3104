"""A block's two halves, attention and SwiGLU: each forward alone, forward with residuals, and backward.

Both forwards compute the same bits. Forward alone, all that inference runs, frees every intermediate as soon as the next
line has read it. In training each half keeps one of the tuples below for the backward pass, which starts at the last block.

A half adds to the stream it reads, y = x + f(x), so backward adds too: dx = dy + (what comes back through f).
"""

from typing import NamedTuple

import numpy as np
from numpy import ndarray

from engine.by_hand.layers import (
    attention_weights,
    attention_weights_backward,
    bias_backward,
    group_heads,
    project,
    project_backward,
    rms_norm,
    rms_norm_backward,
    rope,
    rope_backward,
    swiglu,
    swiglu_backward,
    ungroup_heads,
    weighted_values,
    weighted_values_backward,
)
from engine.model.config import ModelConfig

Weights = dict[str, ndarray]  # of one block


class PositionTables(NamedTuple):
    """RoPE's tables and the causal mask, the same in all blocks."""

    cos: ndarray  # (B, T, 1, H / 2)
    sin: ndarray
    mask: ndarray  # (1 or B, 1, 1, T, T)


class AttentionResiduals(NamedTuple):
    """The arrays that attention saves for its backward pass, each with the derivative that needs it."""

    x: ndarray  # (B, T, D)         the norm's dx and dgain
    h: ndarray  # (B, T, D)         dweight of qkv, whose input it was
    raw: ndarray | None  # (B, T, N + 2 K, H)   dx and dgain of the norms of q and k, if any; v lies in the same array
    q: ndarray  # (B, K, G T, H)    dk, which is a sum of queries
    k: ndarray  # (B, K, T, H)      dq, which is a sum of keys
    v: ndarray  # (B, K, T, H)      the derivative by the attention weights that it was mixed with
    weights: ndarray  # (B, K, G T, T)   the softmax's ds, and dv; the largest of all where T is large
    mixed: ndarray  # (B, T, N H)   dweight of out, whose input it was


class SwigluResiduals(NamedTuple):
    """The arrays that the feed-forward half saves for its backward pass, each with the derivative that needs it."""

    x: ndarray  # (B, T, D)       the norm's dx and dgain
    h: ndarray  # (B, T, D)       dweight of gate_up, whose input it was
    gate: ndarray  # (B, T, F)    dup, which it was multiplied with, and the slope of silu
    up: ndarray  # (B, T, F)      dgate, which it was multiplied with
    hidden: ndarray  # (B, T, F)  dweight of down, whose input it was


def attention(cfg: ModelConfig, w: Weights, x: ndarray, tables: PositionTables) -> ndarray:
    """Adds attention to the residual stream: x (B, T, D) -> (B, T, D)."""
    q, k, v = _rotate(cfg, w, _project_heads(cfg, w, rms_norm(x, w["attn_norm"], cfg.eps)), tables)
    mixed = weighted_values(attention_weights(q, k, tables.mask), v)
    return x + project(merge_heads(ungroup_heads(mixed, x.shape[1])), w["out"])


def attention_with_residuals(
    cfg: ModelConfig, w: Weights, x: ndarray, tables: PositionTables
) -> tuple[ndarray, AttentionResiduals]:
    """Returns `attention`'s result, and the residuals for `attention_backward`."""
    h = rms_norm(x, w["attn_norm"], cfg.eps)
    raw = _project_heads(cfg, w, h)
    q, k, v = _rotate(cfg, w, raw, tables)
    weights = attention_weights(q, k, tables.mask)
    mixed = merge_heads(ungroup_heads(weighted_values(weights, v), x.shape[1]))
    return x + project(mixed, w["out"]), AttentionResiduals(x, h, raw if cfg.qk_norm else None, q, k, v, weights, mixed)


def attention_backward(
    cfg: ModelConfig, w: Weights, residuals: AttentionResiduals, dy: ndarray, tables: PositionTables
) -> tuple[ndarray, Weights]:
    """dy (B, T, D) -> dx (B, T, D), and the derivatives by this half's weights: the forward lines in reverse."""
    T = dy.shape[1]
    d: Weights = {}
    dmixed, d["out"] = project_backward(dy, residuals.mixed, w["out"])
    dmixed = group_heads(dmixed.reshape(*dy.shape[:2], cfg.heads, cfg.head_dim), cfg.kv_heads)
    dweights, dv = weighted_values_backward(dmixed, residuals.weights, residuals.v)
    dq, dk = attention_weights_backward(dweights, residuals.weights, residuals.q, residuals.k)
    dq, dk, dv = ungroup_heads(dq, T), ungroup_heads(dk, T), ungroup_heads(dv, T)
    dq, dk = rope_backward(dq, tables.cos, tables.sin), rope_backward(dk, tables.cos, tables.sin)
    if residuals.raw is not None:
        q, k, _ = np.split(residuals.raw, [cfg.heads, cfg.heads + cfg.kv_heads], axis=2)
        dq, d["q_norm"] = rms_norm_backward(dq, q, w["q_norm"], cfg.eps)
        dk, d["k_norm"] = rms_norm_backward(dk, k, w["k_norm"], cfg.eps)
    dqkv = merge_heads(np.concatenate([dq, dk, dv], axis=2))
    if cfg.qkv_bias:
        d["qkv_bias"] = bias_backward(dqkv)
    dh, d["qkv"] = project_backward(dqkv, residuals.h, w["qkv"])
    dx, d["attn_norm"] = rms_norm_backward(dh, residuals.x, w["attn_norm"], cfg.eps)
    return dy + dx, d


def feed_forward(cfg: ModelConfig, w: Weights, x: ndarray) -> ndarray:
    """Adds the SwiGLU half to the residual stream: x (B, T, D) -> (B, T, D)."""
    gate, up = np.split(project(rms_norm(x, w["mlp_norm"], cfg.eps), w["gate_up"]), 2, axis=-1)
    return x + project(swiglu(gate, up), w["down"])


def feed_forward_with_residuals(cfg: ModelConfig, w: Weights, x: ndarray) -> tuple[ndarray, SwigluResiduals]:
    """Returns `feed_forward`'s result, and the residuals for `feed_forward_backward`."""
    h = rms_norm(x, w["mlp_norm"], cfg.eps)
    gate, up = np.split(project(h, w["gate_up"]), 2, axis=-1)
    hidden = swiglu(gate, up)
    return x + project(hidden, w["down"]), SwigluResiduals(x, h, gate, up, hidden)


def feed_forward_backward(cfg: ModelConfig, w: Weights, residuals: SwigluResiduals, dy: ndarray) -> tuple[ndarray, Weights]:
    """dy (B, T, D) -> dx (B, T, D), and the derivatives by this half's weights."""
    d: Weights = {}
    dhidden, d["down"] = project_backward(dy, residuals.hidden, w["down"])
    dgate_up = np.concatenate(swiglu_backward(dhidden, residuals.gate, residuals.up), axis=-1)
    dh, d["gate_up"] = project_backward(dgate_up, residuals.h, w["gate_up"])
    dx, d["mlp_norm"] = rms_norm_backward(dh, residuals.x, w["mlp_norm"], cfg.eps)
    return dy + dx, d


def merge_heads(heads: ndarray) -> ndarray:
    """(B, T, heads, H) -> (B, T, heads H)."""
    return heads.reshape(*heads.shape[:2], -1)


def _project_heads(cfg: ModelConfig, w: Weights, h: ndarray) -> ndarray:
    """h (B, T, D) -> q, k and v as heads (B, T, N + 2 K, H)."""
    qkv = project(h, w["qkv"])
    if cfg.qkv_bias:
        qkv = qkv + w["qkv_bias"]
    return qkv.reshape(*qkv.shape[:2], -1, cfg.head_dim)


def _rotate(cfg: ModelConfig, w: Weights, heads: ndarray, tables: PositionTables) -> list[ndarray]:
    """heads (B, T, N + 2 K, H) -> q (B, K, G T, H), k and v (B, K, T, H): q and k normed and rotated."""
    q, k, v = np.split(heads, [cfg.heads, cfg.heads + cfg.kv_heads], axis=2)
    if cfg.qk_norm:
        q, k = rms_norm(q, w["q_norm"], cfg.eps), rms_norm(k, w["k_norm"], cfg.eps)
    q, k = rope(q, tables.cos, tables.sin), rope(k, tables.cos, tables.sin)
    return [group_heads(x, cfg.kv_heads) for x in (q, k, v)]
