"""The rows of the by-hand transformer in NumPy, float32."""

import dataclasses
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.table.row import Row
from engine.by_hand.model import forward, loss_and_gradient
from engine.by_hand.tree import to_numpy
from engine.counting.flops import Flops, forward_flops, train_flops
from engine.counting.memory import inference_memory, training_memory
from engine.counting.traffic import Traffic, inference_bytes, train_bytes
from engine.model.config import ModelConfig
from engine.text.batch import Batch


def by_hand_rows(cfg: ModelConfig, params: Any, batch: Batch) -> list[Row]:
    """Returns the rows of a batch: forward alone, to logits, and loss and backward with every gradient.

    Attention is `full`.
    """
    B, T = batch.tokens.shape
    plain = dataclasses.replace(cfg, dtype="float32", remat="none")
    weights = to_numpy(params)
    tokens, targets, mask = (np.asarray(part) for part in (batch.tokens, batch.targets, batch.mask))
    inference, training = inference_memory(plain, B, 0, tokens=T, every_logit=True), training_memory(plain, B, T)

    def row(name: str, call: Callable[[], Any], formula: Flops, traffic: Traffic, **memory: int) -> Row:
        return Row(
            f"by hand: {name}", "by hand", call, lambda: weights, tokens=B * T, formula=formula * (B * T),
            peak_bytes=_peak(call, inference.params), memory=memory, traffic=traffic.total, dtype="float32",
        )  # fmt: skip

    return [
        row(
            "forward", lambda: forward(plain, weights, tokens),
            forward_flops(plain, T, attention="full"), inference_bytes(plain, B, 0, tokens=T, every_logit=True),
            params=inference.params, activations=inference.activations + inference.logits,
        ),
        row(
            "forward and backward", lambda: loss_and_gradient(plain, weights, tokens, targets, mask)[0],
            train_flops(plain, T, attention="full"), train_bytes(plain, B, T),
            params=training.params, gradients=training.gradients, activations=training.gradient_peak - training.gradients,
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
