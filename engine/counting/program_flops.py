"""FLOPs of this engine's jitted programs by formula, on JAX's backend: exactly what `jaxpr.py` must count in them.

A program may do more than its model needs (`flops.py`). On a CPU it pads a product with one row to two
(`model/weights/matmul.py`, `model/backward.py`) and computes causal attention in blocks; on any backend it merges LoRA into
the base for many rows and attends to a whole cache, masked or not.
"""

from collections.abc import Collection

from engine.counting.flops import Attention, Flops, decode_flops, forward_flops, prefill_flops, train_flops
from engine.counting.trainable_paths import TrainablePaths
from engine.model import ops
from engine.model.backward import QUERY_BLOCK
from engine.model.config import ModelConfig


def _attention() -> Attention:
    return QUERY_BLOCK if ops.on_cpu() else "full"


def gradient_program_flops(
    cfg: ModelConfig, batch: int, tokens: int, *, trainable: TrainablePaths | None = None, loss_chunk: int | None = None
) -> Flops:
    """Returns the FLOPs of a loss and its gradient over `batch` sequences of `tokens`; arguments as of `train_flops`."""
    return train_flops(
        cfg, tokens, rows=batch * tokens, attention=_attention(), trainable=trainable, loss_chunk=loss_chunk, as_run=True
    )


def score_program_flops(cfg: ModelConfig, batch: int, tokens: int) -> Flops:
    """Returns the FLOPs of evaluating `batch` sequences of `tokens`: logits at every position."""
    return forward_flops(cfg, tokens, attention=_attention()) * (batch * tokens)


def prefill_program_flops(cfg: ModelConfig, slots: int, tokens: int, capacity: int) -> Flops:
    """Returns the FLOPs of prefilling `tokens` (above 1) of each of `slots` prompts, with a cache of `capacity` places.

    Logits are computed at each prompt's last position; a lone prompt's twice.
    """
    parts = prefill_flops(cfg, tokens, attention="full", cached=capacity - tokens).parts
    return Flops(parts | {"head": parts["head"] * (2 if slots == 1 else 1)}) * slots


def decode_program_flops(cfg: ModelConfig, slots: int, capacity: int, *, int16_activations: Collection[str] = ()) -> Flops:
    """Returns the FLOPs of decoding one token for each of `slots`, with a cache of `capacity` places.

    Computed twice: a lone slot's products with weights; those with `int16_activations` (matrices such as "down"), multiplied
    as two int8 digits (`model/weights/int8.py`); and on a CPU attention with one query head a key head, as one row.
    """
    parts = decode_flops(cfg, capacity).parts
    queries = 2 if ops.on_cpu() and cfg.groups == 1 else 1
    rows = 2 if slots == 1 else 1
    times = lambda name: queries if name == "attention" else rows * (2 if name in int16_activations else 1)
    return Flops({name: part * times(name) for name, part in parts.items()}) * slots
