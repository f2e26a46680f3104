"""Floating-point operations by formula: each matrix product of the model, forward and backward, from its config alone.

Conventions, the same for every function here:

- A multiply and its add are 2 operations. Only matrix products count; norms, RoPE, softmax, activations and the
  optimizer are a few percent and are left to a counter that reads the program.
- The embedding lookup costs 0, the unembedding 2 V D, whether or not the two share a table.
- Attention is `full` (each token meets all T keys: the square that a plain einsum computes, and the square inside
  "12 L D T"), `causal` (half the square: what the answer needs), or a number: blocks of so many queries, each against
  the keys up to its own end, as `model/backward.py` computes it (the whole square where the number does not divide T).
  The caller says which; there is no default.
- Backward is what reverse-mode differentiation really needs: dW = xᵀ g where the weight learns, dX = g Wᵀ only above
  the lowest thing that learns. "6 N" is the case where everything does (Kaplan et al., 2001.08361, section 2.1).
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from engine.errors import UserError, nearest
from engine.model.config import ModelConfig

Attention = Literal["causal", "full"] | int
Remat = Literal["none", "block"]
Gains = Literal["tokens", "weights"]

MATRICES = ("qkv", "out", "gate_up", "down")  # of a block, in the order of the forward pass


def leaf_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter, bottom first. A tied model has no `head`: its table is `embed`."""
    query = cfg.heads * cfg.head_dim
    block: dict[str, tuple[int, ...]] = {"attn_norm": (cfg.width,), "qkv": (cfg.width, cfg.qkv_width)}
    if cfg.qkv_bias:
        block["qkv_bias"] = (cfg.qkv_width,)
    if cfg.qk_norm:
        block |= {"q_norm": (cfg.head_dim,), "k_norm": (cfg.head_dim,)}
    block |= {"out": (query, cfg.width), "mlp_norm": (cfg.width,)}
    block |= {"gate_up": (cfg.width, 2 * cfg.ff), "down": (cfg.ff, cfg.width)}
    shapes: dict[str, tuple[int, ...]] = {"embed": (cfg.vocab, cfg.width)}
    shapes |= {f"blocks/{layer}/{name}": shape for layer in range(cfg.layers) for name, shape in block.items()}
    shapes["norm"] = (cfg.width,)
    if not cfg.tied:
        shapes["head"] = (cfg.width, cfg.vocab)
    return shapes


@dataclasses.dataclass(frozen=True)
class ParamCount:
    """How many numbers a model holds, by component, all layers together."""

    embed: int
    qkv: int
    out: int
    gate_up: int
    down: int
    head: int  # 0 when the head is the embedding table
    norms: int
    biases: int
    tied: bool

    @property
    def total(self) -> int:
        """Every parameter, each once."""
        return self.matmul + self.norms + self.biases + (0 if self.tied else self.embed)

    @property
    def blocks(self) -> int:
        """The matrices of all blocks."""
        return self.qkv + self.out + self.gate_up + self.down

    @property
    def matmul(self) -> int:
        """The N of "6 N": weights that meet each token in a product. All block matrices and the unembedding (the tied
        table counts here, once); not the lookup, the norms or the biases."""
        return self.blocks + (self.embed if self.tied else self.head)


def count_params(cfg: ModelConfig) -> ParamCount:
    """The parameters of a model, by component."""
    sizes = dict.fromkeys(("embed", *MATRICES, "head", "norms", "biases"), 0)
    for path, shape in leaf_shapes(cfg).items():
        name = path.rpartition("/")[2]
        kind = name if name in sizes else "biases" if name.endswith("bias") else "norms"
        sizes[kind] += shape[0] * shape[1] if len(shape) == 2 else shape[0]
    return ParamCount(**sizes, tied=cfg.tied)


@dataclasses.dataclass(frozen=True)
class Trained:
    """What learns: `weights` are paths of leaves that change, `adapted` of matrices with a LoRA pair of `rank`."""

    weights: frozenset[str]
    adapted: frozenset[str] = frozenset()
    rank: int = 0


NOTHING = Trained(frozenset())


def everything(cfg: ModelConfig) -> Trained:
    """Pre-training and full fine-tuning."""
    return Trained(frozenset(leaf_shapes(cfg)))


def bottom_frozen(cfg: ModelConfig, blocks: int) -> Trained:
    """The embedding and the lowest `blocks` blocks stay; all above learns. With 0, nothing is frozen.

    A tied table belongs to the bottom, so it stays as well. Raises UserError when there are not so many blocks.
    """
    _check_blocks(cfg, blocks)
    if blocks == 0:
        return everything(cfg)
    kept = ("embed", *(f"blocks/{layer}/" for layer in range(blocks)))
    return Trained(frozenset(path for path in leaf_shapes(cfg) if not path.startswith(kept)))


def top_frozen(cfg: ModelConfig, blocks: int) -> Trained:
    """The highest `blocks` blocks, the last norm and the head stay; all below learns. With 0, nothing is frozen.

    A tied table belongs to the bottom, so it learns. Raises UserError when there are not so many blocks.
    """
    _check_blocks(cfg, blocks)
    if blocks == 0:
        return everything(cfg)
    kept = ("norm", "head", *(f"blocks/{layer}/" for layer in range(cfg.layers - blocks, cfg.layers)))
    return Trained(frozenset(path for path in leaf_shapes(cfg) if not path.startswith(kept)))


def head_only(cfg: ModelConfig) -> Trained:
    """Only the unembedding learns. In a tied model that table also feeds the bottom, so the saving is only in dW."""
    return Trained(frozenset({"embed" if cfg.tied else "head"}))


def lora(cfg: ModelConfig, rank: int, matrices: Sequence[str] = MATRICES) -> Trained:
    """A LoRA pair of `rank` on the named matrices of every block; nothing else learns (Hu et al., 2106.09685)."""
    if rank < 1:
        raise UserError(f"A LoRA rank must be at least 1, not {rank}.")
    for name in matrices:
        if name not in MATRICES:
            raise UserError(f"LoRA goes on {', '.join(MATRICES)}; there is no {name!r}.{nearest(name, MATRICES)}")
    paths = frozenset(f"blocks/{layer}/{name}" for layer in range(cfg.layers) for name in matrices)
    return Trained(frozenset(), paths, rank)


def lowest_gradient(cfg: ModelConfig, trained: Trained) -> int:
    """The lowest block that the backward pass enters: those below keep nothing for it. L when it enters none."""
    paths = trained.weights | trained.adapted
    if "embed" in paths:
        return 0
    return min((int(path.split("/")[1]) for path in paths if path.startswith("blocks/")), default=cfg.layers)


def _check_blocks(cfg: ModelConfig, blocks: int) -> None:
    if not 0 <= blocks <= cfg.layers:
        raise UserError(f"Cannot freeze {blocks} blocks: the model has {cfg.layers}; give a number from 0 to that.")


@dataclasses.dataclass(frozen=True)
class Part:
    """Operations of one component. `recompute` is forward work done a second time because of remat."""

    forward: int = 0
    recompute: int = 0
    dx: int = 0
    dw: int = 0

    def __add__(self, other: "Part") -> "Part":
        return Part(self.forward + other.forward, self.recompute + other.recompute, self.dx + other.dx, self.dw + other.dw)


@dataclasses.dataclass(frozen=True)
class Flops:
    """Operations by component: the four block matrices and `attention`, each over all layers, `head`, and `lora`.

    Attention has no weights: its whole backward (dQ, dK, dV and the scores' gradient) is `dx`.
    """

    parts: dict[str, Part]

    @property
    def forward(self) -> int:
        return sum(part.forward for part in self.parts.values())

    @property
    def recompute(self) -> int:
        return sum(part.recompute for part in self.parts.values())

    @property
    def dx(self) -> int:
        return sum(part.dx for part in self.parts.values())

    @property
    def dw(self) -> int:
        return sum(part.dw for part in self.parts.values())

    @property
    def backward(self) -> int:
        """dX, dW and what remat computes again on the way."""
        return self.recompute + self.dx + self.dw

    @property
    def total(self) -> int:
        return self.forward + self.backward


def train_flops(
    cfg: ModelConfig,
    tokens: int,
    *,
    attention: Attention,
    trained: Trained | None = None,
    remat: Remat | None = None,
    gains: Gains = "tokens",
    loss_chunk: int | None = None,
) -> Flops:
    """Operations of a training step **per token**, at sequences of `tokens`.

    `trained` is what learns (default: everything), `remat` defaults to the config's. With `block`, the forward of each
    block that has a backward runs again, except its last product, `down`, whose result no gradient reads. `gains` says
    what a norm's gain scales in the program: the `tokens`, so that its gradient needs dX, or the next product's
    `weights`, so that it comes with dW; it matters only in the lowest block that learns. `loss_chunk` is the columns of
    the vocabulary whose logits exist at once: each chunk is made again on the way back, and the last is filled up.
    Raises UserError when a path of `trained` is not in the model.
    """
    trained = everything(cfg) if trained is None else trained
    _check_paths(cfg, trained)
    walk = _Walk(cfg, trained, remat or cfg.remat, gains, 2 * cfg.heads * cfg.head_dim * keys_twice(tokens, attention))
    for layer in range(cfg.layers):
        walk.block(f"blocks/{layer}/")
    walk.head(loss_chunk)
    return Flops(walk.tally)


class _Walk:
    """The model from the bottom up. `live`: does anything so far learn? Then a gradient must come back to here."""

    def __init__(self, cfg: ModelConfig, trained: Trained, remat: Remat, gains: Gains, square: int) -> None:
        self.cfg, self.trained, self.remat, self.gains, self.square = cfg, trained, remat, gains, square
        self.tally = dict.fromkeys((*MATRICES, "attention", "head", "lora"), Part())
        self.live = self.learns("embed")

    def learns(self, path: str) -> bool:
        return path in self.trained.weights

    def multiply(self, name: str, rows: int, columns: int, path: str, gain: str = "") -> None:
        """One product with the weight at `path`, after a norm with the gain at `gain`."""
        gained = self.learns(gain)
        size = 2 * rows * columns
        dx = size if self.live or (gained and self.gains == "tokens") else 0
        dw = size if self.learns(path) or (gained and self.gains == "weights") else 0
        self.tally[name] += Part(forward=size, dx=dx, dw=dw)
        adapted = path in self.trained.adapted
        if adapted:
            down, up = 2 * rows * self.trained.rank, 2 * self.trained.rank * columns
            # g bᵀ is needed for da even where no gradient goes further down.
            self.tally["lora"] += Part(forward=down + up, dx=up + (down if dx else 0), dw=down + up)
        self.live = self.live or gained or self.learns(path) or adapted

    def block(self, prefix: str) -> None:
        cfg, before = self.cfg, dict(self.tally)
        query = cfg.heads * cfg.head_dim
        self.multiply("qkv", cfg.width, cfg.qkv_width, prefix + "qkv", prefix + "attn_norm")
        values = self.live or self.learns(prefix + "qkv_bias")
        queries, keys = values or self.learns(prefix + "q_norm"), values or self.learns(prefix + "k_norm")
        self.live = queries or keys
        # Four products, each half of the forward: dV; the probabilities' gradient, on which dQ and dK stand.
        self.tally["attention"] += Part(self.square, dx=self.square // 2 * sum((values, self.live, queries, keys)))
        self.multiply("out", query, cfg.width, prefix + "out")
        self.multiply("gate_up", cfg.width, 2 * cfg.ff, prefix + "gate_up", prefix + "mlp_norm")
        self.multiply("down", cfg.ff, cfg.width, prefix + "down")
        if self.remat == "none" or not self.live:
            return
        unread = {"down": 2 * cfg.ff * cfg.width}
        if prefix + "down" in self.trained.adapted:
            unread["lora"] = 2 * self.trained.rank * cfg.width
        for name, part in before.items():
            again = self.tally[name].forward - part.forward - unread.get(name, 0)
            self.tally[name] += Part(recompute=again)

    def head(self, loss_chunk: int | None) -> None:
        columns = self.cfg.vocab if loss_chunk is None else -(-self.cfg.vocab // loss_chunk) * loss_chunk
        self.multiply("head", self.cfg.width, columns, "embed" if self.cfg.tied else "head", "norm")
        if loss_chunk and self.live:
            self.tally["head"] += Part(recompute=self.tally["head"].forward)


def keys_twice(tokens: int, attention: Attention) -> int:
    """Twice the keys a token meets on average: T + the size of a block of queries, 0 of them for the exact half."""
    if attention == "causal":
        return tokens
    return tokens + (tokens if attention == "full" or tokens % attention else attention)


def _check_paths(cfg: ModelConfig, trained: Trained) -> None:
    known = leaf_shapes(cfg)
    for path in trained.weights | trained.adapted:
        if path not in known:
            raise UserError(f"The model has no parameter {path!r}.{nearest(path, list(known))}")


def forward_flops(cfg: ModelConfig, tokens: int, *, attention: Attention) -> Flops:
    """Operations of evaluation **per token**, at sequences of `tokens`: forward only, logits at every position."""
    return train_flops(cfg, tokens, attention=attention, trained=NOTHING, remat="none")


def prefill_flops(cfg: ModelConfig, tokens: int, *, attention: Attention, cached: int = 0) -> Flops:
    """Operations to read **a whole prompt** of `tokens` (not per token) behind `cached` earlier ones.

    Logits are wanted at the last position only, so the head counts once. A program that looks at all of a cache of S
    places, masked or not, is `attention="full", cached=S - tokens`.
    """
    one = forward_flops(cfg, 1, attention="full").parts
    parts = {name: Part(part.forward * tokens) for name, part in one.items()}
    pairs_twice = tokens * (2 * cached + keys_twice(tokens, attention))
    parts["attention"] = Part(2 * cfg.layers * cfg.heads * cfg.head_dim * pairs_twice)
    return Flops(parts | {"head": one["head"]})


def decode_flops(cfg: ModelConfig, length: int) -> Flops:
    """Operations to decode **one token** that meets `length` cached positions, its own included."""
    return forward_flops(cfg, length, attention="full")


def step_flops(cfg: ModelConfig, batch: int, seq: int) -> int:
    """Model FLOPs of one training step of `batch` sequences of `seq` tokens: batch · seq · (6 N + 12 L D T).

    The numerator of MFU (PaLM, 2204.02311, appendix B). N is `count_params(cfg).matmul`; D stands for heads · head_dim,
    which is the width in most models; attention is the full square whatever the program skips, and remat adds nothing,
    so that two programs for one model are compared by time alone.
    """
    return batch * seq * train_flops(cfg, seq, attention="full", remat="none").total
