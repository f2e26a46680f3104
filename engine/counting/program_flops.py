"""FLOPs of this engine's jitted programs by formula, on JAX's platform: exactly what `jaxpr.py` must count in them.

A program may do more than its model needs (`flops.py`). It computes causal attention in blocks (a fused kernel's work is
near that), merges LoRA into the base for many rows, and attends to a whole cache, masked or not; on a CPU it pads a product
with one row to two (`model/ops.py`).
"""

from collections.abc import Collection

from engine.counting.flops import Flops, decode_flops, flops_by_layer, forward_flops, prefill_flops
from engine.counting.trainable_paths import TrainablePaths
from engine.model.attention import QUERY_BLOCK
from engine.model.config import ModelConfig
from engine.model.ops import ops


def gradient_layer_flops(
    cfg: ModelConfig, batch: int, tokens: int, *, trainable: TrainablePaths | None = None, loss_chunk: int | None = None
) -> list[Flops]:
    """Returns the FLOPs of a loss and its gradient over `batch` sequences of `tokens`, for each block from the bottom up, and
    last for the head. Arguments as of `flops_by_layer`."""
    return flops_by_layer(
        cfg, tokens, rows=batch * tokens, attention=QUERY_BLOCK, trainable=trainable, loss_chunk=loss_chunk, as_run=True
    )


def score_program_flops(cfg: ModelConfig, batch: int, tokens: int) -> Flops:
    """Returns the FLOPs of evaluating `batch` sequences of `tokens`: logits at every position."""
    return forward_flops(cfg, tokens, attention=QUERY_BLOCK) * (batch * tokens)


def prefill_program_flops(cfg: ModelConfig, slots: int, tokens: int, capacity: int) -> Flops:
    """Returns the FLOPs of prefilling `tokens` (above 1) of each of `slots` prompts, with a cache of `capacity` places.

    Logits are computed at each prompt's last position; on a CPU a lone prompt's twice.
    """
    parts = prefill_flops(cfg, tokens, attention="full", cached=capacity - tokens).parts
    return Flops(parts | {"head": parts["head"] * _times(slots)}) * slots


def decode_program_flops(cfg: ModelConfig, slots: int, capacity: int, *, int16_activations: Collection[str] = ()) -> Flops:
    """Returns the FLOPs of decoding one token for each of `slots`, with a cache of `capacity` places.

    Computed twice: products with weights with `int16_activations` (matrices such as "down"), multiplied as two int8 digits
    (`model/weights/int8.py`); and on a CPU those of a lone slot, and attention with one query head a key head, as one row.
    """
    parts = decode_flops(cfg, capacity).parts
    times = lambda name: _times(cfg.groups) if name == "attention" else _times(slots) * (2 if name in int16_activations else 1)
    return Flops({name: part * times(name) for name, part in parts.items()}) * slots


def _times(rows: int) -> int:
    """Returns how often a product with `rows` rows is computed."""
    return 2 if rows == 1 and ops().pads_lone_row else 1
