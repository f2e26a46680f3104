"""FLOPs of this engine's jitted serving programs: exactly what `jaxpr.py` must count, on JAX's platform.

A program may do more than its model needs. It computes causal attention in blocks (a fused kernel's
work is near that), merges LoRA into the base for many rows, and attends to a whole cache, masked or
not; on a CPU it pads a product with one row to two (`model/ops.py`).
"""

from collections.abc import Collection

from engine.counting.flops import Flops, forward_flops, prefill_flops
from engine.model.config import ModelConfig


def prefill_program_flops(cfg: ModelConfig, slots: int, tokens: int, capacity: int) -> Flops:
    """Returns the FLOPs of prefilling `tokens` (above 1) of each of `slots` prompts, with a cache
    of `capacity` places.

    Logits are computed at each prompt's last position; on a CPU a lone prompt's twice.
    """
    parts = prefill_flops(cfg, tokens, attention="full", cached=capacity - tokens).parts
    return Flops(parts | {"head": parts["head"] * _times(slots)}) * slots


def decode_program_flops(
    cfg: ModelConfig, slots: int, capacity: int, *, int16_activations: Collection[str] = ()
) -> Flops:
    """Returns the FLOPs of decoding one token for each of `slots`, with a cache of `capacity`
    places.

    Computed twice: products with weights with `int16_activations` (matrices such as "down"),
    multiplied as two int8 digits (`model/weights/int8.py`); and on a CPU those of a lone slot, and
    attention with one query head a key head, as one row.
    """
    parts = forward_flops(cfg, capacity, attention="full").parts
    parts_as_computed = {}
    for name, part in parts.items():
        rows = cfg.groups if name == "attention" else slots
        times = _times(rows)
        if name in int16_activations:
            times *= 2
        parts_as_computed[name] = part * times
    return Flops(parts_as_computed) * slots


def _times(rows: int) -> int:
    """Returns how often a product with `rows` rows is computed."""
    from engine.model.ops import ops  # loads JAX too

    if rows == 1 and ops().pads_lone_row:
        return 2
    return 1
