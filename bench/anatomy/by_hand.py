"""Measures the memory of the NumPy model while it runs: what Python holds after each half of a block, forward and backward."""

import contextlib
import tracemalloc
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np

from bench.anatomy.memory import KINDS
from bench.cli import Json
from engine.by_hand import block, layers, model
from engine.by_hand.tree import leaves, to_numpy
from engine.model.config import ModelConfig


def by_hand_memory(cfg: ModelConfig, params: Any, tokens: np.ndarray) -> list[Json]:
    """Trains and infers on tokens (B, T + 1) int; returns a row of each, as of a compiled program.

    The sum is what `tracemalloc` sees, and the weights. Residuals and gradients are the arrays in the named tuples and in
    the gradients so far, and the rest is temporary. A block's residuals are dropped when the next block's are taken up.
    """
    params, (inputs, targets) = to_numpy(params), (tokens[:, :-1], tokens[:, 1:])
    weights = sum(leaf.nbytes for leaf in leaves(params))
    rows = []
    for name, run in (("training", _train), ("inference", _infer)):
        points: list[dict[str, int]] = []
        tracemalloc.start()
        with contextlib.ExitStack() as stack:
            backward = run(stack, points, cfg, params, inputs, targets)
        tracemalloc.stop()
        points = [point | {"parameters": weights} for point in points]
        top = max(points, key=lambda point: sum(point.values()))
        rows.append({
            "program": name, "work": f"{inputs.shape[0]} sequences of {inputs.shape[1]} tokens, float32", "peak": top,
            "positions": len(points), "drawn_positions": [*range(len(points))], "backward": backward, "update": None,
            "start_bytes": weights, "peak_bytes": sum(top.values()),
            "bytes": {kind: [point[kind] for point in points] for kind in KINDS},
        })  # fmt: skip
    return rows


def _point(residuals: int = 0, gradients: int = 0) -> dict[str, int]:
    """Returns the bytes held now by kind, weights apart."""
    rest = max(0, tracemalloc.get_traced_memory()[0] - residuals - gradients)
    return dict.fromkeys(KINDS, 0) | {"residuals": residuals, "gradients": gradients, "temporaries": rest}


def held_bytes(fields: Any) -> int:
    """Returns the bytes of all arrays inside; those that share memory count once."""
    owners: dict[int, int] = {}

    def add(value: Any) -> None:
        if isinstance(value, np.ndarray):
            owner = value if value.base is None else value.base
            owners[id(owner)] = owner.nbytes
        elif value is not None:
            for each in value.values() if isinstance(value, dict) else value:
                add(each)

    add(fields)
    return sum(owners.values())


def _watch(stack: contextlib.ExitStack, name: str, after: Callable[[Any], None]) -> None:
    """Calls `after` with each result of a function of `block.py`."""
    function = getattr(block, name)

    def watched(*args: Any) -> Any:
        result = function(*args)
        after(result)
        return result

    stack.enter_context(mock.patch.object(block, name, watched))


def _train(stack: contextlib.ExitStack, points: Any, cfg: ModelConfig, params: Any, inputs: Any, targets: Any) -> int:
    tuples: list[Any] = []
    gradients: list[Any] = []
    note = lambda: points.append(_point(held_bytes(tuples), held_bytes(gradients)))

    def after_forward(result: Any) -> None:
        tuples.append(result[1])
        note()

    for name in ("attention_with_residuals", "feed_forward_with_residuals"):
        _watch(stack, name, after_forward)
    logits, residuals = model.forward_with_residuals(cfg, params, inputs)
    note()

    def after_feed_forward(result: Any) -> None:  # which has taken the last block's tuples in place of those before
        del tuples[2 * len(residuals.blocks) :]
        gradients.append(result[1])
        note()

    def after_attention(result: Any) -> None:
        gradients.append(result[1])
        note()
        residuals.blocks.pop()

    _watch(stack, "feed_forward_backward", after_feed_forward)
    _watch(stack, "attention_backward", after_attention)
    dlogits = layers.cross_entropy_backward(logits, targets, np.ones(targets.shape, bool))
    del logits
    model.backward(cfg, params, residuals, dlogits)
    return 2 * cfg.layers + 1


def _infer(stack: contextlib.ExitStack, points: Any, cfg: ModelConfig, params: Any, inputs: Any, _: Any) -> None:
    for name in ("attention", "feed_forward"):
        _watch(stack, name, lambda result: points.append(_point()))
    model.forward(cfg, params, inputs)
