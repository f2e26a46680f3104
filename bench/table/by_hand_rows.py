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
    """Returns the rows of a batch, forward alone, and forward and backward: NumPy computes whole attention squares, and every
    gradient."""
    B, T = batch.tokens.shape
    plain = dataclasses.replace(cfg, dtype="float32", remat="none")
    weights = arrays(params)
    tokens, targets, mask = (np.asarray(part) for part in (batch.tokens, batch.targets, batch.mask))
    forward_pass = lambda: forward(plain, weights, tokens)
    backward_pass = lambda: loss_and_gradient(plain, weights, tokens, targets, mask)[0]
    inference = inference_memory(plain, B, 0, tokens=T, every_logit=True)
    training = training_memory(plain, B, T)
    return [
        Row(
            "by hand: forward", "by hand", forward_pass, lambda: weights, tokens=B * T,
            formula=forward_flops(plain, T, attention="full") * (B * T), peak_bytes=_peak(forward_pass, inference.params),
            memory={"params": inference.params, "activations": inference.working + inference.logits},
            moved=forward_bytes(plain, B, T).total, dtype="float32",
        ),
        Row(
            "by hand: forward and backward", "by hand", backward_pass, lambda: weights, tokens=B * T,
            formula=train_flops(plain, T, attention="full") * (B * T), peak_bytes=_peak(backward_pass, inference.params),
            memory={
                "params": training.params, "gradients": training.gradients,
                "activations": training.passes - training.gradients,
            },
            moved=train_bytes(plain, B, T).total, dtype="float32",
        ),
    ]  # fmt: skip


def _peak(call: Callable[[], Any], weights: int) -> int:
    """Returns the most bytes NumPy holds during a call, weights included."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1] + weights
    finally:
        tracemalloc.stop()
