"""Memory traffic by formula: the bytes that a step must read and write, the numerator of MBU.

Every product reads its weights once; a block's values are written and read once going forward, and read once going back
where they were kept. Copies, masks and what does not fit a fused loop are left out, so most programs move more; one whose
data fits the processor's cache moves less.
"""

import dataclasses

from engine.counting.flops import train_flops
from engine.counting.memory import FLOAT32, dtype_bytes, inference_memory, training_memory
from engine.counting.trainable_paths import TrainablePaths, lowest_gradient
from engine.model.config import MATRICES, ModelConfig


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes moved by one step or call, by component."""

    weights: int  # and in training their conversion to the compute type
    activations: int
    logits: int
    cache: int = 0
    gradients: int = 0
    optimizer: int = 0

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


def train_bytes(cfg: ModelConfig, batch: int, tokens: int, *, trainable: TrainablePaths | None = None) -> Traffic:
    """Predicts the bytes moved by **a step** of AdamW on `batch` sequences of `tokens`; by default everything trains.

    AdamW reads gradient, weight and two moments and writes the last three, in float32: 28 bytes a trainable parameter.
    Weights are read once forward, and above the lowest trainable parameter once for dX and once for remat.
    """
    memory = training_memory(cfg, batch, tokens, trainable=trainable)
    parts = train_flops(cfg, 1, attention="full", trainable=trainable).parts
    read = sum(parts[name].forward + parts[name].recompute + parts[name].dx for name in (*MATRICES, "head", "lora")) // 2
    width = dtype_bytes(cfg)
    converted = memory.copies // width * (FLOAT32 + width)  # trainable matrices, read in one type and written in the other
    block = training_memory(cfg, batch, tokens).block
    reached = cfg.layers - (lowest_gradient(cfg, trainable) if trainable else 0)
    again = {"none": 0, "block": reached, "full": cfg.layers if reached else 0}[cfg.remat]
    return Traffic(
        weights=width * read + converted,
        activations=block * (2 * (cfg.layers + again) + reached),
        logits=2 * memory.logits,
        gradients=memory.gradients,
        optimizer=3 * memory.gradients + 2 * memory.optimizer,
    )


def inference_bytes(
    cfg: ModelConfig, slots: int, length: int, *, tokens: int = 1, int8: bool = False, every_logit: bool = False
) -> Traffic:
    """Predicts the bytes moved by **a call** on `tokens` of each of `slots` requests, which share one reading of the weights.

    Arguments as of `inference_memory`: a decoding step has one token, and evaluation no cache but every logit.
    """
    memory = inference_memory(cfg, slots, length, tokens=tokens, int8=int8, every_logit=every_logit)
    width = dtype_bytes(cfg)
    # Rows of a lookup table, which is never int8.
    unread = 0 if cfg.tied else max(0, cfg.vocab - slots * tokens) * cfg.width * width
    row = 2 * cfg.layers * cfg.kv_heads * cfg.head_dim * width  # one token's keys and values
    return Traffic(
        weights=memory.params - unread,
        activations=2 * cfg.layers * memory.activations,
        logits=2 * memory.logits,
        cache=memory.cache + (row * slots * tokens if length else 0),
    )
