"""FLOPs by formula: every matrix product of the model, forward and backward, from its config alone.

- A multiply and its add are 2 operations. Only matrix products count: all else is a few percent, which `jaxpr.py` counts in
  the program.
- The embedding lookup costs 0, the unembedding 2 V D, whether or not the two share a table.
- Attention is `full` (each query meets all T keys, as in "12 L D T"), `causal` (half of that), or the size of the query
  blocks of `model/backward.py`, each against the keys up to its own end (full where the size does not divide T).
- Backward is what reverse-mode differentiation needs: dW = xᵀ g where the weight trains, dX = g Wᵀ above the lowest
  parameter that trains. "6 N" is the case where all train (Kaplan et al., 2001.08361, section 2.1).
"""

import dataclasses
import operator
import re
from collections.abc import Iterable
from typing import Any, Literal

from engine.counting.params import leaf_shapes
from engine.counting.trainable_paths import NONE_TRAINABLE, TrainablePaths, all_trainable, lowest_gradient, target_shapes
from engine.errors import UserError, did_you_mean
from engine.model.config import JOINED, MATRICES, ModelConfig

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
    """FLOPs by component: the block matrices and `attention` (whose backward is all `dx`), `head`, and `lora`."""

    parts: dict[str, PassFlops]

    @property
    def by_pass(self) -> PassFlops:
        """The sum of the parts."""
        return sum(self.parts.values(), PassFlops())

    @property
    def total(self) -> int:
        return self.by_pass.total

    def __mul__(self, times: int) -> "Flops":
        return Flops({name: part * times for name, part in self.parts.items()})


def train_flops(cfg: ModelConfig, tokens: int, **options: Any) -> Flops:
    """Returns the sum of `flops_by_layer`; arguments and errors as there.

    With `attention="full", remat="none"` a token takes the 6 N + 12 L D T of MFU (PaLM, 2204.02311, appendix B), whatever a
    program skips or repeats: N is `count_params(cfg).matmul`, D heads x head_dim.
    """
    return add_layers(flops_by_layer(cfg, tokens, **options))


def add_layers(layers: Iterable[Flops]) -> Flops:
    """Returns the sum of the parts of layers; one that no layer has is 0."""
    parts = dict.fromkeys((*MATRICES, "attention", "head", "lora"), PassFlops())
    for layer in layers:
        parts |= {name: parts[name] + part for name, part in layer.parts.items()}
    return Flops(parts)


def flops_by_layer(
    cfg: ModelConfig, tokens: int, *, attention: Attention, rows: int = 1, trainable: TrainablePaths | None = None,
    remat: Literal["none", "block", "full"] | None = None, loss_chunk: int | None = None, as_run: bool = False,
) -> list[Flops]:  # fmt: skip
    """Returns the FLOPs of a training step **per token** (or for `rows` tokens) of sequences of `tokens`: of each block from
    the bottom up, and last of the head.

    By default everything trains and `remat` is the config's: `block` repeats the forward pass of each block that has a
    backward pass, except products whose result no gradient reads: its last, `down`, and `up` where that alone trains; `full`
    repeats all of it once anything trains. `loss_chunk`: the columns of the logits that exist at once; each chunk is computed
    again going back, the last one padded.

    `as_run` counts this engine's program, which merges a LoRA pair into a base smaller than its inputs and outputs, at R
    operations a weight and none a row (`model/weights/lora.py`), in place of multiplying beside it; lets a matrix
    take the norm's gain, so that the lowest gain needs no gradient of its input; and with `cfg.scan` runs one program for
    all blocks, so that frozen ones save nothing. Raises UserError when a path of `trainable` is not in the model.
    """
    trainable = all_trainable(cfg) if trainable is None else trainable
    for paths, known in ((trainable.weights, leaf_shapes(cfg)), (trainable.adapted, target_shapes(cfg))):
        if unknown := sorted(paths - known.keys()):
            raise UserError(f"The model has no parameter {unknown[0]!r}.{did_you_mean(unknown[0], list(known))}")
    if scan := as_run and cfg.scan:
        spread = lambda paths: frozenset(
            re.sub(r"^blocks/\d+/", f"blocks/{layer}/", path) for path in paths for layer in range(cfg.layers)
        )
        trainable = TrainablePaths(spread(trainable.weights), spread(trainable.adapted), trainable.rank)
    live = "embed" in trainable.weights or (scan and lowest_gradient(cfg, trainable) == 0)
    counter = _Counter(cfg, trainable, rows, as_run, live)
    square = 2 * rows * cfg.heads * cfg.head_dim * twice_mean_keys(tokens, attention)
    remat = remat or cfg.remat
    tallies = [counter.block(f"blocks/{layer}/", square, remat == "block") for layer in range(cfg.layers)]
    tallies.append(counter.head(loss_chunk))
    if counter.live and remat == "full":
        again = lambda tally: {name: part + PassFlops(recompute=part.forward) for name, part in tally.items()}
        tallies = list(map(again, tallies))
    return list(map(Flops, tallies))


@dataclasses.dataclass
class _Counter:
    cfg: ModelConfig
    trainable: TrainablePaths
    rows: int
    as_run: bool
    live: bool  # something below trains, so the gradient must reach here
    tally: dict[str, PassFlops] = dataclasses.field(default_factory=dict)  # of this layer so far

    def add(self, name: str, flops: PassFlops) -> None:
        self.tally[name] = self.tally.get(name, PassFlops()) + flops

    def multiply(self, path: str, inputs: int, columns: int, name: str = "") -> bool:
        """Counts a product with the matrix at `path`; returns whether it trains."""
        name = name or path.rpartition("/")[2]
        size, trains = 2 * self.rows * inputs * columns, path in self.trainable.weights
        self.add(name, PassFlops(forward=size, dx=size * self.live, dw=size * trains))
        adapted = path in self.trainable.adapted
        if adapted:
            # da needs g bᵀ even where no gradient goes further down.
            down, up = (2 * self.rows * self.trainable.rank * side for side in (inputs, columns))
            pairs = PassFlops(forward=down + up, dx=up + down * self.live, dw=down + up)
            if self.is_merged(inputs, columns):
                # The backward pass computes x a for db, and merges again the weight that dX goes through.
                merge = 2 * inputs * self.trainable.rank * columns
                pairs = PassFlops(forward=merge, recompute=merge * self.live, dx=up, dw=2 * down + up)
            self.add("lora", pairs)
        return trains or adapted

    def is_merged(self, inputs: int, columns: int) -> bool:
        return self.as_run and self.rows * (inputs + columns) > inputs * columns

    def norm_and_multiply(self, prefix: str, gain: str, names: tuple[str, ...]) -> bool:
        """Counts the products of one norm's result; returns whether the gradient of that is needed.

        A gain that trains needs it, but where its own is found in that of the matrices (`norm_and_project`).
        """
        weights, shapes = self.trainable.weights, self.cfg.matrices
        converts = self.as_run and self.cfg.dtype != "float32"
        folded = converts and all(prefix + name in weights and self.rows > shapes[name][1] for name in names)
        self.live |= prefix + gain in weights and not folded
        needs_dx = self.live
        trained = [self.multiply(prefix + name, *shapes[name]) for name in names]
        self.live |= any(trained)
        return needs_dx

    def block(self, prefix: str, square: int, remat: bool) -> dict[str, PassFlops]:
        cfg, weights = self.cfg, self.trainable.weights
        self.tally = {}
        below = self.live or prefix + "attn_norm" in weights
        self.norm_and_multiply(prefix, "attn_norm", JOINED["qkv"])
        trains = lambda name: below or bool({prefix + name, f"{prefix}{name}_bias"} & (weights | self.trainable.adapted))
        values = trains("v")
        queries, keys = (trains(name) or f"{prefix}{name}_norm" in weights for name in "qk")
        self.live |= queries or keys or values
        # Each half of the forward: dV, dP (on which dQ and dK depend), dQ, dK.
        self.add("attention", PassFlops(square, dx=square // 2 * sum((values, queries or keys, queries, keys))))
        self.live |= self.multiply(prefix + "out", *cfg.matrices["out"])
        reads_up = self.norm_and_multiply(prefix, "mlp_norm", JOINED["gate_up"])
        reads_up |= self.as_run or not {prefix + "gate", prefix + "down"}.isdisjoint(weights | self.trainable.adapted)
        self.live |= self.multiply(prefix + "down", *cfg.matrices["down"])
        if not (remat and self.live):
            return self.tally
        unread = {"lora": 0}
        for name in ("down", "up")[: 2 - reads_up]:
            inputs, columns = cfg.matrices[name]
            unread[name] = 2 * self.rows * inputs * columns
            if prefix + name in self.trainable.adapted:
                rows = inputs if self.is_merged(inputs, columns) else self.rows
                unread["lora"] += 2 * rows * self.trainable.rank * columns
        for name, part in self.tally.items():
            self.tally[name] += PassFlops(recompute=part.forward - unread.get(name, 0))
        return self.tally

    def head(self, loss_chunk: int | None) -> dict[str, PassFlops]:
        columns = self.cfg.vocab if loss_chunk is None else -(-self.cfg.vocab // loss_chunk) * loss_chunk
        self.tally = {}
        self.live |= "norm" in self.trainable.weights
        self.live |= self.multiply("embed" if self.cfg.tied else "head", self.cfg.width, columns, "head")
        if loss_chunk and self.live:
            self.add("head", PassFlops(recompute=self.tally["head"].forward))
        return self.tally


def twice_mean_keys(tokens: int, attention: Attention) -> int:
    """Returns twice the mean number of keys a query meets, an integer: T if causal, 2 T if full, T + block if in blocks."""
    if attention == "causal":
        return tokens
    return tokens + (tokens if attention == "full" or tokens % attention else attention)


def forward_flops(cfg: ModelConfig, tokens: int, *, attention: Attention) -> Flops:
    """Returns the FLOPs **per token** of evaluating sequences of `tokens`: logits at every position."""
    return train_flops(cfg, tokens, attention=attention, trainable=NONE_TRAINABLE, remat="none")


def prefill_flops(cfg: ModelConfig, tokens: int, *, attention: Attention, cached: int = 0) -> Flops:
    """Returns the FLOPs to prefill **a whole prompt** of `tokens` after `cached` others; logits at the last position only.

    A program that attends to all S places of a cache, masked or not, is `attention="full", cached=S - tokens`.
    """
    token = forward_flops(cfg, 1, attention="full").parts
    parts = {name: PassFlops(part.forward * tokens) for name, part in token.items()}
    pairs_twice = tokens * (2 * cached + twice_mean_keys(tokens, attention))
    parts["attention"] = PassFlops(2 * cfg.layers * cfg.heads * cfg.head_dim * pairs_twice)
    return Flops(parts | {"head": token["head"]})


def decode_flops(cfg: ModelConfig, length: int) -> Flops:
    """Returns the FLOPs to decode **one token** that attends to `length` positions, its own included."""
    return forward_flops(cfg, length, attention="full")


NEARLY_SQUARE = 1.5  # long over short side: below, Muon steps the matrix itself, which costs as little and is more exact


def muon_flops(cfg: ModelConfig) -> int:
    """Returns the FLOPs of Muon's products in **a step**: Newton-Schulz iterations on each matrix of a block.

    On a nearly square one there are four of its Gram matrix, of that squared, and of both times it; on a wide one nine of
    Gram matrices, after the first and before the last.
    """
    total = 0
    for name in MATRICES:
        short, long = sorted(leaf_shapes(cfg)[f"blocks/0/{name}"])
        times, squares = (4, 4) if long < NEARLY_SQUARE * short else (1, 9)
        total += times * 4 * short * short * long + squares * 2 * short**3
    return cfg.layers * total
