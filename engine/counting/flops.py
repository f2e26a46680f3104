"""FLOPs by formula: every matrix product of the model, forward and backward, from its config alone.

- A multiply and its add are 2 operations. Only matrix products count: all else is a few percent,
  which `jaxpr.py` counts in the program.
- The embedding lookup costs 0, the unembedding 2 V D, whether or not the two share a table.
- Attention is `full` (each query meets all T keys, as in "12 L D T"), `causal` (half of that), or
  the size of the query blocks of `model/attention_in_blocks.py`, each against the keys up to its
  own end (full where the size does not divide T).
- Backward is what reverse-mode differentiation needs: dW = xᵀ g where the weight trains, dX = g Wᵀ
  above the lowest parameter that trains. "6 N" is the case where all train (Kaplan et al.,
  2001.08361, section 2.1).
"""

import dataclasses
import operator
import re
from collections.abc import Collection, Iterable
from typing import Any, Literal

from engine.errors import UserError, did_you_mean
from engine.model.config import JOINED, MATRICES, ModelConfig
from engine.model.shapes import leaf_shapes, target_shapes
from engine.model.trainable import NONE_TRAINABLE, TrainablePaths, all_trainable, lowest_gradient

Attention = Literal["causal", "full"] | int


@dataclasses.dataclass(frozen=True)
class PassFlops:
    """FLOPs of one component by pass; `recompute` is what remat computes a second time."""

    forward: int = 0
    recompute: int = 0
    dx: int = 0
    dw: int = 0

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))

    def __add__(self, other: "PassFlops") -> "PassFlops":
        return PassFlops(*map(operator.add, dataclasses.astuple(self), dataclasses.astuple(other)))

    def __mul__(self, times: int) -> "PassFlops":
        return PassFlops(*(flops * times for flops in dataclasses.astuple(self)))


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs by component: the block matrices and `attention` (whose backward is all `dx`), `head`,
    and `lora`.
    """

    parts: dict[str, PassFlops]

    @property
    def by_pass(self) -> PassFlops:
        return sum(self.parts.values(), PassFlops())

    @property
    def total(self) -> int:
        return self.by_pass.total

    def __mul__(self, times: int) -> "Flops":
        return Flops({name: part * times for name, part in self.parts.items()})


def train_flops(cfg: ModelConfig, tokens: int, **options: Any) -> Flops:
    """Returns the FLOPs of a training step **per token**, whatever a program skips or repeats;
    options as of `flops_by_layer`.

    With `attention="full"` those are the 6 N + 12 L D T of MFU (PaLM, 2204.02311, appendix B): N is
    `count_params(cfg).matmul`, D heads x head_dim.
    """
    plain = dataclasses.replace(cfg, scan=False, remat="none")
    return add_layers(flops_by_layer(plain, tokens, **options))


def add_layers(layers: Iterable[Flops]) -> Flops:
    """Returns the sum of all layers, by component."""
    parts = dict.fromkeys((*MATRICES, "attention", "head", "lora"), PassFlops())
    for layer in layers:
        parts |= {name: parts[name] + part for name, part in layer.parts.items()}
    return Flops(parts)


def flops_by_layer(
    cfg: ModelConfig,
    tokens: int,
    *,
    attention: Attention,
    rows: int = 1,
    trainable: TrainablePaths | None = None,
    loss_chunk: int | None = None,
) -> list[Flops]:
    """Returns the FLOPs of this engine's training step for `rows` tokens of sequences of `tokens`:
    of each block from the bottom up, and last of the head. By default everything trains.

    - `cfg.remat`: `block` repeats the forward pass of each block that has a backward pass, but for
      its last product, `down`.
    - `loss_chunk`: the columns of the logits that exist at once; each chunk is computed again going
      back, the last one padded.
    - More rows than in x out / (in + out), of a base (in, out), have a LoRA pair merged into it, at
      R operations a weight and none a row (`model/weights/matmul.py`). More rows than columns have
      a matrix take the norm's gain, so that the lowest gain needs no gradient of its input.
    - `cfg.scan` runs one program for all blocks, so that frozen ones save nothing.

    Raises UserError when a path of `trainable` is not in the model.
    """
    if trainable is None:
        trainable = all_trainable(cfg)
    _require_paths(trainable.weights, leaf_shapes(cfg))
    _require_paths(trainable.adapted, target_shapes(cfg))
    if cfg.scan:
        weights = _in_every_block(cfg, trainable.weights)
        trainable = TrainablePaths(weights, _in_every_block(cfg, trainable.adapted), trainable.rank)
    embedding_trains = "embed" in trainable.weights
    # A scan runs one program for all blocks: if its backward pass runs at all, the gradient goes
    # through each block to its input, the lowest too.
    scan_trains = cfg.scan and lowest_gradient(cfg, trainable) == 0
    counter = _Counter(cfg, trainable, rows, gradient_reaches_here=embedding_trains or scan_trains)
    # of q k^T and P v: each takes 2 operations for a query and a key, in every number of every head
    attention_flops = 2 * rows * cfg.heads * cfg.head_dim * twice_mean_keys(tokens, attention)
    layers = []
    for layer in range(cfg.layers):  # bottom first: each finds whether something below it trains
        layers.append(Flops(counter.block(f"blocks/{layer}/", attention_flops)))
    layers.append(Flops(counter.head(loss_chunk)))
    return layers


def _require_paths(paths: Collection[str], known: Collection[str]) -> None:
    """Raises UserError when one of the paths is not known."""
    unknown = sorted(set(paths) - set(known))
    if unknown:
        raise UserError(f"The model has no parameter {unknown[0]!r}.{did_you_mean(unknown[0], list(known))}")


def _in_every_block(cfg: ModelConfig, paths: Collection[str]) -> frozenset[str]:
    """Returns the paths, and those of a block also with the number of every other block."""
    all_paths = set()
    for layer in range(cfg.layers):
        for path in paths:
            all_paths.add(re.sub(r"^blocks/\d+/", f"blocks/{layer}/", path))
    return frozenset(all_paths)


@dataclasses.dataclass
class _Counter:
    """Counts a training step from the bottom up, layer after layer."""

    cfg: ModelConfig
    trainable: TrainablePaths
    rows: int
    gradient_reaches_here: bool  # as something below trains; set anew from product to product
    tally: dict[str, PassFlops] = dataclasses.field(default_factory=dict)  # of this layer so far

    def add(self, name: str, flops: PassFlops) -> None:
        self.tally[name] = self.tally.get(name, PassFlops()) + flops

    def multiply(self, path: str, inputs: int, columns: int, name: str = "") -> bool:
        """Counts a product with the matrix at `path`; returns whether it trains."""
        name = name or path.rpartition("/")[2]
        size = 2 * self.rows * inputs * columns
        trains = path in self.trainable.weights
        self.add(name, PassFlops(forward=size, dx=size * self.gradient_reaches_here, dw=size * trains))
        adapted = path in self.trainable.adapted
        if adapted:
            down = 2 * self.rows * self.trainable.rank * inputs  # x a
            up = 2 * self.rows * self.trainable.rank * columns  # its product with b
            # da needs g bᵀ even where no gradient goes further down.
            pairs = PassFlops(forward=down + up, dx=up + down * self.gradient_reaches_here, dw=down + up)
            if self.is_merged(inputs, columns):
                # The backward pass computes x a for db, and merges again the weight that dX goes
                # through.
                merge = 2 * inputs * self.trainable.rank * columns
                pairs = PassFlops(
                    forward=merge,
                    recompute=merge * self.gradient_reaches_here,
                    dx=up,
                    dw=2 * down + up,
                )
            self.add("lora", pairs)
        return trains or adapted

    def is_merged(self, inputs: int, columns: int) -> bool:
        """Returns whether a LoRA pair is merged into its base, as `merged_product.is_merged` on one
        device. That also asks `can_be_merged`, which only bases that multiply integers deny: they
        are served, and never trained on.
        """
        return self.rows * (inputs + columns) > inputs * columns

    def norm_and_multiply(self, prefix: str, gain: str, names: tuple[str, ...]) -> None:
        """Counts the products of one norm's result.

        A gain that trains needs the gradient of the norm's result, unless the matrices take the gain
        with them: then its own gradient follows from theirs (`norm_and_project`).
        """
        weights = self.trainable.weights
        shapes = self.cfg.matrices
        matrices_take_gain = self.cfg.dtype != "float32" and all(
            prefix + name in weights and self.rows > shapes[name][1] for name in names
        )
        self.gradient_reaches_here |= prefix + gain in weights and not matrices_take_gain
        any_trains = False
        for name in names:
            any_trains |= self.multiply(prefix + name, *shapes[name])
        # Only now: the matrices are side by side, and none needs a gradient because another trains.
        self.gradient_reaches_here |= any_trains

    def block(self, prefix: str, attention_flops: int) -> dict[str, PassFlops]:
        """Counts the block whose paths begin with `prefix`. `attention_flops`: of both its products."""
        cfg = self.cfg
        self.tally = {}
        # Taken before the norm's products are counted: if q, k or v train, they set
        # `gradient_reaches_here`, and attention needs only the gradients of those that do.
        below = self.gradient_reaches_here or prefix + "attn_norm" in self.trainable.weights
        self.norm_and_multiply(prefix, "attn_norm", JOINED["qkv"])
        self.attend(prefix, below, attention_flops)
        self.gradient_reaches_here |= self.multiply(prefix + "out", *cfg.matrices["out"])
        self.norm_and_multiply(prefix, "mlp_norm", JOINED["gate_up"])
        self.gradient_reaches_here |= self.multiply(prefix + "down", *cfg.matrices["down"])
        if cfg.remat == "block" and self.gradient_reaches_here:
            self.recompute_block(prefix)
        return self.tally

    def attend(self, prefix: str, below: bool, attention_flops: int) -> None:
        """Counts attention. `below`: whether the norm, or something below the block, trains, as it was
        before the block's products were counted.
        """
        weights = self.trainable.weights

        def trains(name: str) -> bool:
            own = {prefix + name, f"{prefix}{name}_bias"}
            return below or bool(own & (weights | self.trainable.adapted))

        queries = trains("q") or f"{prefix}q_norm" in weights
        keys = trains("k") or f"{prefix}k_norm" in weights
        values = trains("v")
        self.gradient_reaches_here |= queries or keys or values
        # dV, dP (on which dQ and dK depend), dQ and dK: each costs one of the two forward products.
        backward_products = sum((values, queries or keys, queries, keys))
        dx = attention_flops // 2 * backward_products
        self.add("attention", PassFlops(forward=attention_flops, dx=dx))

    def recompute_block(self, prefix: str) -> None:
        """Counts the block's forward pass again, but for the products that end it, which nothing in its
        backward pass reads.
        """
        inputs, columns = self.cfg.matrices["down"]
        unread = {"down": self.tally["down"].forward}
        if prefix + "down" in self.trainable.adapted:
            rows = inputs if self.is_merged(inputs, columns) else self.rows
            unread["lora"] = 2 * rows * self.trainable.rank * columns
        for name, part in self.tally.items():
            self.tally[name] += PassFlops(recompute=part.forward - unread.get(name, 0))

    def head(self, loss_chunk: int | None) -> dict[str, PassFlops]:
        """Counts the head, on `loss_chunk` columns at a time, or all at once."""
        if loss_chunk is None:
            columns = self.cfg.vocab
        else:
            columns = -(-self.cfg.vocab // loss_chunk) * loss_chunk
        self.tally = {}
        self.gradient_reaches_here |= "norm" in self.trainable.weights
        path = "embed" if self.cfg.tied else "head"
        self.gradient_reaches_here |= self.multiply(path, self.cfg.width, columns, "head")
        if loss_chunk and self.gradient_reaches_here:
            self.add("head", PassFlops(recompute=self.tally["head"].forward))
        return self.tally


def twice_mean_keys(tokens: int, attention: Attention) -> int:
    """Returns twice the mean number of keys a query meets, an integer:
    T if causal, 2 T if full, T + block if in blocks.
    """
    if attention == "causal":
        return tokens
    if attention == "full" or tokens % attention:
        return 2 * tokens
    return tokens + attention


def forward_flops(cfg: ModelConfig, tokens: int, *, attention: Attention) -> Flops:
    """Returns the FLOPs **per token** of evaluating sequences of `tokens`: logits at every
    position.

    With `attention="full"` it is what a token costs that is decoded and attends to `tokens`
    positions, its own included.
    """
    return train_flops(cfg, tokens, attention=attention, trainable=NONE_TRAINABLE)


def prefill_flops(cfg: ModelConfig, tokens: int, *, attention: Attention, cached: int = 0) -> Flops:
    """Returns the FLOPs to prefill **a whole prompt** of `tokens` after `cached` others; logits at
    the last position only.

    A program that attends to all S places of a cache, masked or not, is
    `attention="full", cached=S - tokens`.
    """
    token = forward_flops(cfg, 1, attention="full").parts
    parts = {name: PassFlops(part.forward * tokens) for name, part in token.items()}
    pairs_twice = tokens * (2 * cached + twice_mean_keys(tokens, attention))
    parts["attention"] = PassFlops(2 * cfg.layers * cfg.heads * cfg.head_dim * pairs_twice)
    return Flops(parts | {"head": token["head"]})
