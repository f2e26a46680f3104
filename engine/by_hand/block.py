"""A block's two halves, attention and SwiGLU: each forward alone, forward with residuals, and backward.

Both forwards compute the same bits. Forward alone, all that inference runs, frees every
intermediate as soon as the next line has read it. In training each half keeps one of the tuples
below for the backward pass, which starts at the last block.

A half adds to the stream it reads, y = x + f(x), so backward adds too: dx = dy + (what comes back
through f).
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

BlockWeights = dict[str, ndarray]  # of one block


class PositionTables(NamedTuple):
    """RoPE's tables and the causal mask, the same in all blocks."""

    cos: ndarray  # (B, T, 1, H / 2)
    sin: ndarray
    mask: ndarray  # (1 or B, 1, 1, T, T)


class AttentionResiduals(NamedTuple):
    """The arrays that attention saves for its backward pass, each with the derivative that needs it."""

    x: ndarray  # (B, T, D)         the norm's dx and dgain
    h: ndarray  # (B, T, D)         dweight of q, k and v, whose input it was
    raw_q: ndarray | None  # (B, T, N, H)   dx and dgain of the norm of q, if there is one
    raw_k: ndarray | None  # (B, T, K, H)   dx and dgain of the norm of k, if there is one
    q: ndarray  # (B, K, G T, H)    dk, which is a sum of queries
    k: ndarray  # (B, K, T, H)      dq, which is a sum of keys
    v: ndarray  # (B, K, T, H)      the derivative by the attention weights that it was mixed with
    weights: ndarray  # (B, K, G T, T)   the softmax's ds, and dv; the largest of all where T is large
    mixed: ndarray  # (B, T, N H)   dweight of out, whose input it was


class SwigluResiduals(NamedTuple):
    """The arrays that the feed-forward half saves for its backward pass, each with the derivative
    that needs it.
    """

    x: ndarray  # (B, T, D)       the norm's dx and dgain
    h: ndarray  # (B, T, D)       dweight of gate and up, whose input it was
    gate: ndarray  # (B, T, F)    dup, which it was multiplied with, and the slope of silu
    up: ndarray  # (B, T, F)      dgate, which it was multiplied with
    hidden: ndarray  # (B, T, F)  dweight of down, whose input it was


def attention(cfg: ModelConfig, w: BlockWeights, x: ndarray, tables: PositionTables) -> ndarray:
    """Adds attention to the residual stream: x (B, T, D) -> (B, T, D)."""
    q, k, v = _rotate(cfg, w, _project_heads(cfg, w, rms_norm(x, w["attn_norm"], cfg.eps)), tables)
    mixed = weighted_values(attention_weights(q, k, tables.mask), v)
    return x + project(merge_heads(ungroup_heads(mixed, x.shape[1])), w["out"])


def attention_with_residuals(
    cfg: ModelConfig, w: BlockWeights, x: ndarray, tables: PositionTables
) -> tuple[ndarray, AttentionResiduals]:
    h = rms_norm(x, w["attn_norm"], cfg.eps)
    raw = _project_heads(cfg, w, h)
    q, k, v = _rotate(cfg, w, raw, tables)
    weights = attention_weights(q, k, tables.mask)
    mixed = merge_heads(ungroup_heads(weighted_values(weights, v), x.shape[1]))
    raw_q, raw_k = raw[:2] if cfg.qk_norm else (None, None)
    return x + project(mixed, w["out"]), AttentionResiduals(x, h, raw_q, raw_k, q, k, v, weights, mixed)


def attention_backward(
    cfg: ModelConfig, w: BlockWeights, residuals: AttentionResiduals, dy: ndarray, tables: PositionTables
) -> tuple[ndarray, BlockWeights]:
    """dy (B, T, D) -> dx (B, T, D), and the derivatives by this half's weights: the forward lines
    in reverse.
    """
    T = dy.shape[1]
    d: BlockWeights = {}
    dmixed, d["out"] = project_backward(dy, residuals.mixed, w["out"])
    dmixed = group_heads(dmixed.reshape(*dy.shape[:2], cfg.heads, cfg.head_dim), cfg.kv_heads)
    dweights, dv = weighted_values_backward(dmixed, residuals.weights, residuals.v)
    dq, dk = attention_weights_backward(dweights, residuals.weights, residuals.q, residuals.k)
    dq = ungroup_heads(dq, T)
    dk = ungroup_heads(dk, T)
    dv = ungroup_heads(dv, T)
    dq = rope_backward(dq, tables.cos, tables.sin)
    dk = rope_backward(dk, tables.cos, tables.sin)
    if residuals.raw_q is not None and residuals.raw_k is not None:
        dq, d["q_norm"] = rms_norm_backward(dq, residuals.raw_q, w["q_norm"], cfg.eps)
        dk, d["k_norm"] = rms_norm_backward(dk, residuals.raw_k, w["k_norm"], cfg.eps)
    dh = np.zeros_like(residuals.h)
    for name, dheads in (("q", dq), ("k", dk), ("v", dv)):
        dproduct = merge_heads(dheads)
        if cfg.qkv_bias:
            d[f"{name}_bias"] = bias_backward(dproduct)
        dpart, d[name] = project_backward(dproduct, residuals.h, w[name])
        dh += dpart
    dx, d["attn_norm"] = rms_norm_backward(dh, residuals.x, w["attn_norm"], cfg.eps)
    return dy + dx, d


def feed_forward(cfg: ModelConfig, w: BlockWeights, x: ndarray) -> ndarray:
    """Adds the SwiGLU half to the residual stream: x (B, T, D) -> (B, T, D)."""
    h = rms_norm(x, w["mlp_norm"], cfg.eps)
    return x + project(swiglu(project(h, w["gate"]), project(h, w["up"])), w["down"])


def feed_forward_with_residuals(
    cfg: ModelConfig, w: BlockWeights, x: ndarray
) -> tuple[ndarray, SwigluResiduals]:
    h = rms_norm(x, w["mlp_norm"], cfg.eps)
    gate = project(h, w["gate"])
    up = project(h, w["up"])
    hidden = swiglu(gate, up)
    return x + project(hidden, w["down"]), SwigluResiduals(x, h, gate, up, hidden)


def feed_forward_backward(
    cfg: ModelConfig, w: BlockWeights, residuals: SwigluResiduals, dy: ndarray
) -> tuple[ndarray, BlockWeights]:
    """dy (B, T, D) -> dx (B, T, D), and the derivatives by this half's weights."""
    d: BlockWeights = {}
    dhidden, d["down"] = project_backward(dy, residuals.hidden, w["down"])
    dgate, dup = swiglu_backward(dhidden, residuals.gate, residuals.up)
    dh, d["gate"] = project_backward(dgate, residuals.h, w["gate"])
    dpart, d["up"] = project_backward(dup, residuals.h, w["up"])
    dh += dpart
    dx, d["mlp_norm"] = rms_norm_backward(dh, residuals.x, w["mlp_norm"], cfg.eps)
    return dy + dx, d


def merge_heads(heads: ndarray) -> ndarray:
    """(B, T, heads, H) -> (B, T, heads H)."""
    return heads.reshape(*heads.shape[:2], -1)


def _project_heads(cfg: ModelConfig, w: BlockWeights, h: ndarray) -> tuple[ndarray, ...]:
    """h (B, T, D) -> q (B, T, N, H), k and v (B, T, K, H)."""
    heads = []
    for name in "qkv":
        product = project(h, w[name])
        if cfg.qkv_bias:
            product = product + w[f"{name}_bias"]
        heads.append(product.reshape(*product.shape[:2], -1, cfg.head_dim))
    return tuple(heads)


def _rotate(
    cfg: ModelConfig, w: BlockWeights, heads: tuple[ndarray, ...], tables: PositionTables
) -> list[ndarray]:
    """q (B, T, N, H), k and v (B, T, K, H) -> (B, K, G T, H) and (B, K, T, H): q and k normed and rotated."""
    q, k, v = heads
    if cfg.qk_norm:
        q = rms_norm(q, w["q_norm"], cfg.eps)
        k = rms_norm(k, w["k_norm"], cfg.eps)
    q = rope(q, tables.cos, tables.sin)
    k = rope(k, tables.cos, tables.sin)
    return [group_heads(x, cfg.kv_heads) for x in (q, k, v)]
