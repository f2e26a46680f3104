"""Operations of this engine's own programs, a whole call at a time: what the walker must find in them, to the last one.

`flops` says what a model needs; a program may do more. On a CPU this engine pads a product with a single row to two
(`model/weights/matmul.py`, `model/backward.py`) and computes causal attention in blocks; anywhere it merges LoRA into the
base for many rows, and looks at all of a cache, masked or not. The programs are those of the backend that JAX computes on.
"""

from collections.abc import Collection

from engine.counting.flops import Attention, Flops, decode_flops, forward_flops, prefill_flops, train_flops
from engine.counting.trainable_paths import TrainablePaths
from engine.model import backend
from engine.model.backward import QUERY_BLOCK
from engine.model.config import ModelConfig


def _attention() -> Attention:
    return QUERY_BLOCK if backend.on_cpu() else "full"


def gradient_program(
    cfg: ModelConfig, batch: int, tokens: int, *, trainable: TrainablePaths | None = None, loss_chunk: int | None = None
) -> Flops:
    """A loss and its gradient over `batch` sequences of `tokens`, without the optimizer; arguments as `train_flops`."""
    return train_flops(
        cfg, tokens, rows=batch * tokens, attention=_attention(), trainable=trainable, loss_chunk=loss_chunk, as_run=True
    )


def score_program(cfg: ModelConfig, batch: int, tokens: int) -> Flops:
    """Evaluation of `batch` sequences of `tokens`: forward only, logits at every position."""
    return forward_flops(cfg, tokens, attention=_attention()) * (batch * tokens)


def prefill_program(cfg: ModelConfig, slots: int, tokens: int, capacity: int) -> Flops:
    """One chunk of `tokens` (above 1) for each of `slots` prompts, against a cache of `capacity` places.

    Logits are made at each prompt's last position; a lone prompt's are made twice.
    """
    parts = prefill_flops(cfg, tokens, attention="full", cached=capacity - tokens).parts
    return Flops(parts | {"head": parts["head"] * (2 if slots == 1 else 1)}) * slots


def decode_program(cfg: ModelConfig, slots: int, capacity: int, *, int16_activations: Collection[str] = ()) -> Flops:
    """One token for each of `slots`, against a cache of `capacity` places.

    A lone slot's products with weights are made twice. So are those of `int16_activations` (names of matrices, such as "down"),
    whose input is multiplied digit by digit (`model/weights/int8.py`), and on a CPU all attention in which each key head
    has but one query head, whatever the slots: there each row has a matrix of its own.
    """
    parts = decode_flops(cfg, capacity).parts
    queries = 2 if backend.on_cpu() and cfg.groups == 1 else 1
    rows = 2 if slots == 1 else 1
    times = lambda name: queries if name == "attention" else rows * (2 if name in int16_activations else 1)
    return Flops({name: part * times(name) for name, part in parts.items()}) * slots
