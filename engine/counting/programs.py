"""Operations of this engine's own programs, a whole call at a time: what the walker must find in them, to the last one.

`flops` says what a model needs; a program may do more. On a CPU this engine pads a product with a single row to two
(`model/leaves.py`, `model/backward.py`), scales a few weights instead of many tokens with a norm's gain, and computes
causal attention in blocks; anywhere it folds LoRA into the base for many rows, and looks at all of a cache, masked or not.
`cpu` says which program is meant; by default, the one for the backend that JAX computes on.
"""

from collections.abc import Collection

from engine.counting.flops import Flops, Remat, decode_flops, forward_flops, pass_flops, prefill_flops
from engine.counting.trainable import TrainablePaths
from engine.model.backend import on_cpu
from engine.model.backward import QUERY_BLOCK
from engine.model.config import ModelConfig


def gradient_program(
    cfg: ModelConfig,
    batch: int,
    tokens: int,
    *,
    trainable: TrainablePaths | None = None,
    remat: Remat | None = None,
    microbatches: int = 1,
    loss_chunk: int | None = None,
    cpu: bool | None = None,
) -> Flops:
    """A loss and its gradient over `batch` sequences of `tokens`, all microbatches together; arguments as `train_flops`.

    The optimizer is not in it: see `muon_flops`.
    """
    cpu = on_cpu() if cpu is None else cpu
    one = pass_flops(
        cfg,
        tokens,
        batch * tokens // microbatches,
        attention=QUERY_BLOCK if cpu else "full",
        trainable=trainable,
        remat=remat,
        gains="fewer" if cpu else "tokens",
        loss_chunk=loss_chunk,
        merges_lora=True,
        scan=cfg.scan,
    )
    return one * microbatches


def score_program(cfg: ModelConfig, batch: int, tokens: int, *, cpu: bool | None = None) -> Flops:
    """Evaluation of `batch` sequences of `tokens`: forward only, logits at every position."""
    cpu = on_cpu() if cpu is None else cpu
    return forward_flops(cfg, tokens, attention=QUERY_BLOCK if cpu else "full") * (batch * tokens)


def prefill_program(cfg: ModelConfig, slots: int, tokens: int, capacity: int) -> Flops:
    """One chunk of `tokens` (above 1) for each of `slots` prompts, against a cache of `capacity` places.

    Logits are made at each prompt's last position; a lone prompt's are made twice.
    """
    parts = prefill_flops(cfg, tokens, attention="full", cached=capacity - tokens).parts
    return Flops(parts | {"head": parts["head"] * (2 if slots == 1 else 1)}) * slots


def decode_program(
    cfg: ModelConfig, slots: int, capacity: int, *, two_digits: Collection[str] = (), cpu: bool | None = None
) -> Flops:
    """One token for each of `slots`, against a cache of `capacity` places.

    A lone slot's products with weights are made twice. So are those of `two_digits` (names of matrices, such as "down"),
    whose input is multiplied digit by digit (`model/int8.py`), and on a CPU all attention in which each key head has but
    one query head, whatever the slots: there each row has a matrix of its own.
    """
    cpu = on_cpu() if cpu is None else cpu
    parts = decode_flops(cfg, capacity).parts
    queries = 2 if cpu and cfg.groups == 1 else 1
    rows = 2 if slots == 1 else 1
    made = lambda name: queries if name == "attention" else rows * (2 if name in two_digits else 1)
    return Flops({name: part * made(name) for name, part in parts.items()}) * slots
