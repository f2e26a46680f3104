"""Bytes moved by formula: what a step must read from memory and write to it, each thing as often as the step needs it.

What MBU divides by. Weights are read once by every product with them; a block's values are written once and read once
on the way up, and once more on the way down where they were kept. What else a program stores (copies, masks, what does
not fit a fused loop) is not here, so most programs move more, and one whose data fits the processor's cache moves less.
"""

import dataclasses

from engine.counting.flops import train_flops
from engine.counting.memory import dtype_bytes, inference_memory, training_memory
from engine.counting.params import MATRICES
from engine.counting.trainable_paths import TrainablePaths, lowest_gradient
from engine.model.config import ModelConfig

_FLOAT32 = 4


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes of one step or call, by what they carry."""

    weights: int  # read by products, and in training their conversion to the compute type
    activations: int
    logits: int
    cache: int = 0  # keys and values
    gradients: int = 0
    optimizer: int = 0

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


def train_bytes(cfg: ModelConfig, batch: int, tokens: int, *, trainable: TrainablePaths | None = None) -> Traffic:
    """Bytes of **a step** of AdamW on `batch` sequences of `tokens`; everything trains unless `trainable` says otherwise.

    AdamW reads the gradient, the weight and two moments and writes the last three, in float32: 28 bytes a parameter that
    learns. Weights are read once forward, once for dX where there is one, once more where remat runs the forward again;
    the last two never happen below what learns.
    """
    held = training_memory(cfg, batch, tokens, trainable=trainable)
    parts = train_flops(cfg, 1, attention="full", trainable=trainable).parts
    met = sum(parts[name].forward + parts[name].recompute + parts[name].dx for name in (*MATRICES, "head", "lora")) // 2
    width = dtype_bytes(cfg)
    # held.copies is the matrices that learn, in the compute type: read in float32, written in the other.
    converted = held.copies // width * (_FLOAT32 + width)
    block = training_memory(cfg, batch, tokens).block
    reached = cfg.layers - (lowest_gradient(cfg, trainable) if trainable else 0)
    again = {"none": 0, "block": reached, "full": cfg.layers if reached else 0}[cfg.remat]
    return Traffic(
        weights=width * met + converted,
        activations=block * (2 * (cfg.layers + again) + reached),
        logits=2 * held.logits,
        gradients=held.gradients,
        # Gradient, weight in and out, each moment in and out.
        optimizer=3 * held.gradients + 2 * held.optimizer,
    )


def forward_bytes(cfg: ModelConfig, batch: int, tokens: int) -> Traffic:
    """Bytes of evaluating `batch` sequences of `tokens`: forward only, logits at every position."""
    return prefill_bytes(cfg, batch, tokens, 0, every_logit=True)


def decode_bytes(cfg: ModelConfig, slots: int, length: int, *, int8: bool = False) -> Traffic:
    """Bytes of **a step** that decodes one token for each of `slots`, against a cache of `length` places.

    The weights are read once whatever the slots, which is why they share a step so well.
    """
    return prefill_bytes(cfg, slots, 1, length, int8=int8)


def prefill_bytes(
    cfg: ModelConfig, slots: int, tokens: int, length: int, *, int8: bool = False, every_logit: bool = False
) -> Traffic:
    """Bytes of **a call** that reads `tokens` of each of `slots` prompts, against a cache of `length` places."""
    held = inference_memory(cfg, slots, length, tokens=tokens, int8=int8, every_logit=every_logit)
    unread = (
        0 if cfg.tied else max(0, cfg.vocab - slots * tokens) * cfg.width * dtype_bytes(cfg)
    )  # a lookup table is never int8
    row = 2 * cfg.layers * cfg.kv_heads * cfg.head_dim * dtype_bytes(cfg)  # one token's keys and values
    return Traffic(
        weights=held.params - unread,
        activations=2 * cfg.layers * held.working,
        logits=2 * held.logits,
        cache=held.cache + (row * slots * tokens if length else 0),
    )
