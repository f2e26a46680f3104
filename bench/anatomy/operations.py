"""Counts where the operations of each way of running a model go: per token, by layer, product and pass, by formula."""

from typing import NamedTuple

from bench.anatomy.programs import CAPACITY, CHUNK, LORA, ROWS, B, T
from bench.cli import Json
from engine.counting.flops import Flops, PassFlops, add_layers
from engine.counting.program_flops import decode_program_flops, gradient_layer_flops, prefill_program_flops
from engine.counting.traffic import inference_bytes, train_bytes
from engine.counting.trainable_paths import TrainablePaths, all_trainable, bottom_frozen, head_only, lora_only, top_frozen
from engine.model.config import MATRICES, ModelConfig
from engine.training.loss import CHUNK as LOSS_CHUNK
from engine.training.loss import LOGITS_LIMIT

PRODUCTS = {  # what is shown: the products that it adds up
    "queries, keys, values": ("q", "k", "v"), "attention": ("attention",), "attention's output": ("out",),
    "gate and up": ("gate", "up"), "down": ("down",), "LoRA's pairs": ("lora",), "head": ("head",),
}  # fmt: skip


class Way(NamedTuple):
    """A way of running a model on `tokens` tokens: its FLOPs by layer, the head last, and the bytes that it must move."""

    layers: list[Flops]
    tokens: int
    bytes: int

    @property
    def flops(self) -> int:
        return sum(layer.total for layer in self.layers)


def trainable_ways(cfg: ModelConfig) -> dict[str, TrainablePaths]:
    """Returns the ways of training; half a model needs two layers."""
    half = cfg.layers // 2
    halves = {"bottom half frozen": bottom_frozen(cfg, half), "top half frozen": top_frozen(cfg, half)} if half else {}
    return {"training": all_trainable(cfg), "LoRA": lora_only(cfg, LORA), **halves, "head only": head_only(cfg)}


def count_ways(cfg: ModelConfig) -> dict[str, Way]:
    """Returns name -> Way of the programs of `programs.py`, counted as they run."""
    chunk = LOSS_CHUNK if 4 * B * T * cfg.vocab > LOGITS_LIMIT else None
    ways = {
        name: Way(
            gradient_layer_flops(cfg, B, T, trainable=paths, loss_chunk=chunk), B * T,
            train_bytes(cfg, B, T, trainable=paths).total,
        )
        for name, paths in trainable_ways(cfg).items()
    }  # fmt: skip
    prefill, decode = prefill_program_flops(cfg, ROWS, CHUNK, CAPACITY), decode_program_flops(cfg, ROWS, CAPACITY)
    served = lambda tokens: inference_bytes(cfg, ROWS, CAPACITY, tokens=tokens).total
    ways["prefill"] = Way(_by_layer(cfg, prefill), ROWS * CHUNK, served(CHUNK))
    ways["decode"] = Way(_by_layer(cfg, decode), ROWS, served(1))
    return ways


def _by_layer(cfg: ModelConfig, flops: Flops) -> list[Flops]:
    """Divides what runs forward alone: all blocks do the same."""
    of_block = {name: PassFlops(flops.parts[name].forward // cfg.layers) for name in (*MATRICES, "attention")}
    return [Flops(of_block)] * cfg.layers + [Flops({"head": flops.parts["head"]})]


def operation_rows(cfg: ModelConfig) -> list[Json]:
    """Returns a row for each way: FLOPs a token, [forward, dX, dW], of each layer and of each product over all layers.

    A second forward pass counts as forward.
    """
    rows = []
    for name, way in count_ways(cfg).items():
        passes = lambda part, n=way.tokens: [(part.forward + part.recompute) / n, part.dx / n, part.dw / n]
        parts = add_layers(way.layers).parts
        products = {words: sum((parts[name] for name in names), PassFlops()) for words, names in PRODUCTS.items()}
        rows.append({
            "way": name, "flops_per_token": way.flops / way.tokens,
            "by_layer": [passes(layer.by_pass) for layer in way.layers],
            "by_product": {words: passes(product) for words, product in products.items() if product.total},
        })  # fmt: skip
    return rows
