"""The whole model: tokens to logits, to the loss, back to every weight's gradient; and greedy generation."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy import ndarray

from engine.by_hand import block, layers
from engine.errors import UserError
from engine.model.config import ModelConfig

Params = dict[str, Any]  # nested, of NumPy arrays


class Residuals(NamedTuple):
    """The arrays that a forward pass saves for its backward pass; they grow with every block."""

    tokens: ndarray  # (B, T)   the embedding rows that get a derivative
    tables: block.PositionTables  # RoPE's backward, for dq and dk
    blocks: list[tuple[block.AttentionResiduals, block.SwigluResiduals]]  # L of them
    x: ndarray  # (B, T, D)   the last norm's dx and dgain
    h: ndarray  # (B, T, D)   dweight of the head


def forward(
    cfg: ModelConfig,
    params: Any,
    tokens: ndarray,
    positions: ndarray | None = None,
    segments: ndarray | None = None,
) -> ndarray:
    """tokens (B, T) int -> logits (B, T, V), in the weights' dtype. Saves no residuals.

    positions (B, T): by default 0 .. T - 1 in each row. segments (B, T): tokens of different ones
    do not see each other. Raises UserError for weights that are not plain arrays of one float
    dtype, or tokens outside the vocabulary.
    """
    params = to_numpy(params)
    tables = _tables(cfg, params, tokens, positions, segments)
    x = layers.lookup(params["embed"], tokens)
    for i in range(cfg.layers):
        x = block.attention(cfg, params["blocks"][str(i)], x, tables)
        x = block.feed_forward(cfg, params["blocks"][str(i)], x)
    return layers.project(layers.rms_norm(x, params["norm"], cfg.eps), _head(cfg, params))


def forward_with_residuals(
    cfg: ModelConfig,
    params: Any,
    tokens: ndarray,
    positions: ndarray | None = None,
    segments: ndarray | None = None,
) -> tuple[ndarray, Residuals]:
    """Returns `forward`'s logits, and the residuals for `backward`."""
    params = to_numpy(params)
    tables = _tables(cfg, params, tokens, positions, segments)
    x = layers.lookup(params["embed"], tokens)
    blocks = []
    for i in range(cfg.layers):
        x, of_attention = block.attention_with_residuals(cfg, params["blocks"][str(i)], x, tables)
        x, of_swiglu = block.feed_forward_with_residuals(cfg, params["blocks"][str(i)], x)
        blocks.append((of_attention, of_swiglu))
    h = layers.rms_norm(x, params["norm"], cfg.eps)
    return layers.project(h, _head(cfg, params)), Residuals(tokens, tables, blocks, x, h)


def backward(cfg: ModelConfig, params: Any, residuals: Residuals, dlogits: ndarray) -> Params:
    """dlogits (B, T, V) -> the loss's derivative by every weight, a tree like params: the forward
    pass in reverse.
    """
    params = to_numpy(params)
    dx, dhead = layers.project_backward(dlogits, residuals.h, _head(cfg, params))
    dx, dnorm = layers.rms_norm_backward(dx, residuals.x, params["norm"], cfg.eps)
    dblocks: Params = {}
    for i in reversed(range(cfg.layers)):
        w = params["blocks"][str(i)]
        of_attention, of_swiglu = residuals.blocks[i]
        dx, dswiglu = block.feed_forward_backward(cfg, w, of_swiglu, dx)
        dx, dattention = block.attention_backward(cfg, w, of_attention, dx, residuals.tables)
        dblocks[str(i)] = dattention | dswiglu
    dembed = layers.lookup_backward(dx, residuals.tokens, cfg.vocab)
    if not cfg.tied:
        return {"embed": dembed, "blocks": dblocks, "norm": dnorm, "head": dhead}
    # The loss depends on one table at both ends, so its derivative is the sum of the two.
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
    """tokens, targets (B, T) int, mask (B, T) bool -> mean nats over the targets whose mask is
    True. Forward alone.
    """
    return layers.cross_entropy(forward(cfg, params, tokens, positions, segments), targets, mask)


def loss_and_gradient(
    cfg: ModelConfig,
    params: Any,
    tokens: ndarray,
    targets: ndarray,
    mask: ndarray,
    positions: ndarray | None = None,
    segments: ndarray | None = None,
) -> tuple[float, Params]:
    """Returns `loss`, and its derivative by every weight, a tree like params. Raises UserError as
    `forward` does.
    """
    logits, residuals = forward_with_residuals(cfg, params, tokens, positions, segments)
    value = layers.cross_entropy(logits, targets, mask)
    return value, backward(cfg, params, residuals, layers.cross_entropy_backward(logits, targets, mask))


def residual_count(cfg: ModelConfig, B: int, T: int) -> int:
    """Returns how many numbers the residuals hold: a block's fields in the order of `block.py`, times L."""
    norms = 0
    if cfg.qk_norm:
        norms = (cfg.heads + cfg.kv_heads) * cfg.head_dim
    attention = 2 * cfg.width + norms + cfg.qkv_width + cfg.heads * T + cfg.heads * cfg.head_dim
    swiglu = 2 * cfg.width + 3 * cfg.ff
    return B * T * (cfg.layers * (attention + swiglu) + 2 * cfg.width)


def _head(cfg: ModelConfig, params: Params) -> ndarray:
    """Returns (D, V): a matrix of its own, or the transposed embedding."""
    if cfg.tied:
        return params["embed"].T
    return params["head"]


def _tables(
    cfg: ModelConfig, params: Params, tokens: ndarray, positions: ndarray | None, segments: ndarray | None
) -> block.PositionTables:
    if tokens.ndim != 2 or tokens.dtype.kind not in "iu":
        raise UserError(f"tokens must be integers (B, T), not {tokens.dtype} {tokens.shape}.")
    # NumPy would look up a negative token at the table's end.
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < cfg.vocab:
        raise UserError(
            f"Tokens lie between {tokens.min()} and {tokens.max()}; "
            f"this model's vocabulary is 0 to {cfg.vocab - 1}."
        )
    T = tokens.shape[1]
    if positions is None:
        positions = np.arange(T)[None]
    cos, sin = layers.rope_tables(cfg, positions, params["embed"].dtype)
    return block.PositionTables(cos, sin, layers.causal_mask(segments, T))


def generate(
    cfg: ModelConfig, params: Any, prompt: Sequence[int], *, max_tokens: int, eos_id: int | None = None
) -> Iterator[int]:
    """Yields the most probable tokens after the prompt until `eos_id`, `max_tokens`, or a full
    context.

    Each token computes the whole text again, of which a KV cache (`inference/decode.py`) spares all
    but the last row. Raises UserError for a prompt that is empty or leaves no room.
    """
    if not 0 < len(prompt) < cfg.context:
        raise UserError(
            f"The prompt has {len(prompt)} tokens; "
            f"from 1 to {cfg.context - 1} fit a context of {cfg.context}."
        )
    text = list(prompt)
    for _ in range(min(max_tokens, cfg.context - len(prompt))):
        token = int(forward(cfg, params, np.array([text]))[0, -1].argmax())
        if token == eos_id:
            return
        yield token
        text.append(token)


def to_numpy(params: Any) -> Params:
    """Returns the tree with NumPy arrays as leaves; arrays in host memory are not copied.

    Raises UserError for a leaf that is not a plain array (an Int8 or a LoRA), or when the leaves
    are not all float32 or all float64.
    """

    def convert(path: str, leaf: Any) -> Any:
        if isinstance(leaf, dict):
            return {name: convert(f"{path}/{name}".removeprefix("/"), value) for name, value in leaf.items()}
        if isinstance(leaf, tuple) or not hasattr(leaf, "dtype"):
            raise UserError(
                f"{path} is a {type(leaf).__name__}; the by-hand model reads plain arrays. "
                "Fold adapters and give weights that are not quantized."
            )
        return np.asarray(leaf)

    tree = convert("", params)
    kinds = sorted({leaf.dtype.name for leaf in leaves(tree)})
    if kinds not in (["float32"], ["float64"]):
        raise UserError(
            "The by-hand model computes in float32 or in float64, "
            f"and these weights are {' and '.join(kinds)}."
        )
    return tree


def tree_map(f: Callable[..., Any], *trees: Any) -> Any:
    """Returns a tree of f(leaf, ...), of leaves at the same path in each tree."""
    if not isinstance(trees[0], dict):
        return f(*trees)
    return {name: tree_map(f, *(tree[name] for tree in trees)) for name in trees[0]}


def leaves(tree: Any) -> list[ndarray]:
    """Returns all arrays of a tree."""
    if not isinstance(tree, dict):
        return [tree]
    arrays = []
    for value in tree.values():
        arrays += leaves(value)
    return arrays
