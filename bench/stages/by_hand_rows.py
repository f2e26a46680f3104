"""The rows of the by-hand transformer in NumPy, float32."""

import dataclasses
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.stages.rows import Row
from engine.by_hand import adamw
from engine.by_hand.model import forward, loss_and_gradient, to_numpy, tree_map
from engine.counting.flops import Flops, forward_flops, train_flops
from engine.counting.memory import Traffic, inference_bytes, inference_memory, train_bytes, training_memory
from engine.model.config import ModelConfig
from engine.text.batch import Batch


def by_hand_rows(cfg: ModelConfig, params: Any, batch: Batch) -> list[Row]:
    """Returns the rows of a batch: forward alone, to logits, and a training step: loss, every gradient, and AdamW.

    Attention is `full`.
    """
    B, T = batch.tokens.shape
    plain = dataclasses.replace(cfg, dtype="float32", remat="none")
    weights = to_numpy(params)
    tokens, targets, mask = (np.asarray(part) for part in (batch.tokens, batch.targets, batch.mask))
    inference, training = inference_memory(plain, B, 0, tokens=T, every_logit=True), training_memory(plain, B, T)
    zeros = [tree_map(np.zeros_like, weights) for _ in range(2)]
    trained, moments = weights, adamw.Moments(np.array(0, np.int32), *zeros)
    optimizer = adamw.AdamWConfig(learning_rate=1e-4)

    def step() -> float:
        nonlocal trained, moments
        loss, gradient = loss_and_gradient(plain, trained, tokens, targets, mask)
        trained, moments = adamw.step(optimizer, trained, gradient, moments)
        return loss

    def row(
        name: str, run: Callable[[], Any], weights: Callable[[], Any], held: int, formula: Flops, traffic: Traffic,
        **memory: int,
    ) -> Row:  # fmt: skip
        return Row(
            f"by hand: {name}", "by hand", run, weights, tokens=B * T, formula=formula * (B * T),
            peak_bytes=_peak(run, held), memory=memory, traffic=traffic.total, dtype="float32",
        )  # fmt: skip

    return [
        row(
            "forward", lambda: forward(plain, weights, tokens), lambda: weights, inference.params,
            forward_flops(plain, T, attention="full"), inference_bytes(plain, B, 0, tokens=T, every_logit=True),
            params=inference.params, activations=inference.activations + inference.logits,
        ),
        row(
            "training step", step, lambda: trained, training.params + training.optimizer,
            train_flops(plain, T, attention="full"), train_bytes(plain, B, T),
            params=training.params, gradients=training.gradients, optimizer=training.optimizer,
            activations=training.total - training.params - training.gradients - training.optimizer,
        ),
    ]  # fmt: skip


def _peak(run: Callable[[], Any], held: int) -> int:
    """Returns the most bytes NumPy holds during a call, with those `held` before it."""
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1] + held
    finally:
        tracemalloc.stop()
