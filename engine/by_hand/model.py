"""From tokens to logits, to the loss, and back to a gradient for every weight."""

from typing import Any, NamedTuple

import numpy as np
from numpy import ndarray

from engine.by_hand.block import (
    AttentionResiduals,
    Place,
    SwigluResiduals,
    attention,
    attention_and_keep,
    attention_backward,
    feed_forward,
    feed_forward_and_keep,
    feed_forward_backward,
)
from engine.by_hand.layers import (
    causal_mask,
    cross_entropy,
    cross_entropy_backward,
    lookup,
    lookup_backward,
    project,
    project_backward,
    rms_norm,
    rms_norm_backward,
    rope_tables,
)
from engine.by_hand.tree import Params, arrays
from engine.errors import UserError
from engine.model.config import ModelConfig


class Residuals(NamedTuple):
    """What a whole forward pass keeps for its backward pass, more with every block; forward alone keeps nothing."""

    tokens: ndarray  # (B, T)   which rows of the embedding get a derivative
    place: Place  # the angles by which dq and dk are turned back
    blocks: list[tuple[AttentionResiduals, SwigluResiduals]]  # L of them
    x: ndarray  # (B, T, D)   the last norm's dx and dgain
    h: ndarray  # (B, T, D)   dweight of the head


def forward(
    cfg: ModelConfig, params: Any, tokens: ndarray, positions: ndarray | None = None, segments: ndarray | None = None
) -> ndarray:
    """tokens (B, T) int -> logits (B, T, V), in the weights' dtype. Keeps nothing: what is returned is all that is left.

    positions (B, T): 0 .. T - 1 in each row unless given. segments (B, T): tokens of different ones do not see each other.
    Raises UserError for weights that are not plain arrays of one float dtype, or tokens outside the vocabulary.
    """
    params = arrays(params)
    place = _place(cfg, params, tokens, positions, segments)
    x = lookup(params["embed"], tokens)
    for i in range(cfg.layers):
        x = attention(cfg, params["blocks"][str(i)], x, place)
        x = feed_forward(cfg, params["blocks"][str(i)], x)
    return project(rms_norm(x, params["norm"], cfg.eps), _head(cfg, params))


def forward_and_keep(
    cfg: ModelConfig, params: Any, tokens: ndarray, positions: ndarray | None = None, segments: ndarray | None = None
) -> tuple[ndarray, Residuals]:
    """The same logits, and all that `backward` needs."""
    params = arrays(params)
    place = _place(cfg, params, tokens, positions, segments)
    x = lookup(params["embed"], tokens)
    blocks = []
    for i in range(cfg.layers):
        x, attention_kept = attention_and_keep(cfg, params["blocks"][str(i)], x, place)
        x, swiglu_kept = feed_forward_and_keep(cfg, params["blocks"][str(i)], x)
        blocks.append((attention_kept, swiglu_kept))
    h = rms_norm(x, params["norm"], cfg.eps)
    return project(h, _head(cfg, params)), Residuals(tokens, place, blocks, x, h)


def backward(cfg: ModelConfig, params: Any, kept: Residuals, dlogits: ndarray) -> Params:
    """dlogits (B, T, V) -> the loss's derivative by every weight, a tree like params: `forward_and_keep` in reverse."""
    params = arrays(params)
    dx, dhead = project_backward(dlogits, kept.h, _head(cfg, params))
    dx, dnorm = rms_norm_backward(dx, kept.x, params["norm"], cfg.eps)
    dblocks: Params = {}
    for i in reversed(range(cfg.layers)):
        w = params["blocks"][str(i)]
        attention_kept, swiglu_kept = kept.blocks[i]
        dx, dswiglu = feed_forward_backward(cfg, w, swiglu_kept, dx)
        dx, dattention = attention_backward(cfg, w, attention_kept, dx, kept.place)
        dblocks[str(i)] = dattention | dswiglu
    dembed = lookup_backward(dx, kept.tokens, cfg.vocab)
    if not cfg.tied:
        return {"embed": dembed, "blocks": dblocks, "norm": dnorm, "head": dhead}
    # One table that is read at both ends: the loss depends on it twice, so its derivative is the sum of the two.
    return {"embed": dembed + dhead.T, "blocks": dblocks, "norm": dnorm}


def loss(
    cfg: ModelConfig,
    params: Any,
    tokens: ndarray,
    targets: ndarray,
    mask: ndarray,
    positions: ndarray | None = None,
    segments: ndarray | None = None,
) -> float:
    """tokens, targets (B, T) int, mask (B, T) bool -> mean nats over the targets whose mask is True. Forward alone."""
    return cross_entropy(forward(cfg, params, tokens, positions, segments), targets, mask)


def loss_and_gradient(
    cfg: ModelConfig,
    params: Any,
    tokens: ndarray,
    targets: ndarray,
    mask: ndarray,
    positions: ndarray | None = None,
    segments: ndarray | None = None,
) -> tuple[float, Params]:
    """The same loss, and its derivative by every weight, a tree like params. Raises UserError as `forward` does."""
    logits, kept = forward_and_keep(cfg, params, tokens, positions, segments)
    value = cross_entropy(logits, targets, mask)
    return value, backward(cfg, params, kept, cross_entropy_backward(logits, targets, mask))


def residual_count(cfg: ModelConfig, B: int, T: int) -> int:
    """How many numbers forward keeps for backward, by formula: a block's fields in the order of `block.py`, times L."""
    norms = cfg.qkv_width if cfg.qk_norm else 0
    attention = 2 * cfg.width + norms + cfg.qkv_width + cfg.heads * T + cfg.heads * cfg.head_dim
    swiglu = 2 * cfg.width + 3 * cfg.ff
    return B * T * (cfg.layers * (attention + swiglu) + 2 * cfg.width)


def _head(cfg: ModelConfig, params: Params) -> ndarray:
    """(D, V): a matrix of its own, or the embedding's other side."""
    return params["embed"].T if cfg.tied else params["head"]


def _place(cfg: ModelConfig, params: Params, tokens: ndarray, positions: ndarray | None, segments: ndarray | None) -> Place:
    if tokens.ndim != 2 or tokens.dtype.kind not in "iu":
        raise UserError(f"tokens must be whole numbers (B, T), not {tokens.dtype} {tokens.shape}.")
    # NumPy would read a negative token from the table's end, in silence.
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < cfg.vocab:
        raise UserError(
            f"Tokens lie between {tokens.min()} and {tokens.max()}; this model's vocabulary is 0 to {cfg.vocab - 1}."
        )
    T = tokens.shape[1]
    positions = np.arange(T)[None] if positions is None else positions
    return Place(*rope_tables(cfg, positions, params["embed"].dtype), causal_mask(segments, T))
