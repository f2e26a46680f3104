"""The rows in plain NumPy: the same transformer with its backward pass written out, float32."""

import dataclasses
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.table.row import Row
from engine.by_hand.model import forward, loss_and_gradient
from engine.by_hand.tree import arrays
from engine.counting.flops import forward_flops, train_flops
from engine.counting.memory import inference_memory, training_memory
from engine.counting.traffic import forward_bytes, train_bytes
from engine.model.config import ModelConfig
from engine.text.batch import Batch


def by_hand_rows(cfg: ModelConfig, params: Any, batch: Batch) -> list[Row]:
    """Forward alone, and forward and backward, of a batch. NumPy computes whole attention squares, and every gradient."""
    B, T = batch.tokens.shape
    plain = dataclasses.replace(cfg, dtype="float32", remat="none")
    weights = arrays(params)
    tokens, targets, mask = (np.asarray(part) for part in (batch.tokens, batch.targets, batch.mask))
    ahead = lambda: forward(plain, weights, tokens)
    both = lambda: loss_and_gradient(plain, weights, tokens, targets, mask)[0]
    held = inference_memory(plain, B, 0, tokens=T, every_logit=True)
    kept = training_memory(plain, B, T)
    return [
        Row(
            "by hand: forward", "by hand", ahead, lambda: weights, tokens=B * T,
            formula=forward_flops(plain, T, attention="full") * (B * T), peak_bytes=_peak(ahead, held.params),
            memory={"params": held.params, "activations": held.working + held.logits},
            moved=forward_bytes(plain, B, T).total, dtype="float32",
        ),
        Row(
            "by hand: forward and backward", "by hand", both, lambda: weights, tokens=B * T,
            formula=train_flops(plain, T, attention="full") * (B * T), peak_bytes=_peak(both, held.params),
            memory={"params": kept.params, "gradients": kept.gradients, "activations": kept.passes - kept.gradients},
            moved=train_bytes(plain, B, T).total, dtype="float32",
        ),
    ]  # fmt: skip


def _peak(call: Callable[[], Any], weights: int) -> int:
    """The most bytes NumPy holds during a call, weights included."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1] + weights
    finally:
        tracemalloc.stop()
