"""Measures the NumPy model: what Python holds after each half of a block, what a block keeps for backward, and why.

The reason is the comment of each field of the named tuples of engine/by_hand, the line is the one of the backward pass that
reads it, shape and bytes are those of a run. What needs it is found by experiment: the backward pass reads NaN in its place,
and each derivative that then is NaN needed it.
"""

import contextlib
import inspect
import math
import re
import tracemalloc
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np

from bench.anatomy.memory import KINDS
from bench.cli import Json
from engine.by_hand import block, layers, model
from engine.by_hand.tree import leaves, to_numpy
from engine.model.config import LoraConfig, ModelConfig

HALVES: dict[str, tuple[Any, Any, Any]] = {
    "attention": (block.AttentionResiduals, block.attention_with_residuals, block.attention_backward),
    "feed-forward": (block.SwigluResiduals, block.feed_forward_with_residuals, block.feed_forward_backward),
}
INPUT = "attention", "x"  # of the block, which gradient checkpointing keeps, and computes the rest again
FROZEN = {"LoRA on q and v": LoraConfig(targets=("q", "v")), "LoRA on every matrix": LoraConfig(), "frozen": None}
_FIELD = re.compile(r"\s+(\w+): .*#\s*(\([^)]*\))\s+(\S.*)")


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


def block_residuals(cfg: ModelConfig, params: Any, tokens: np.ndarray) -> Json:
    """Returns what block 0 keeps for tokens (B, T) int: "rows", one for each array, and "kept", the bytes by way of training.

    `needed_for`: "dx", and the weights whose derivatives need it. `kept_by`: the ways of training under which it is kept.
    Under "frozen" and LoRA the block's own weights are frozen and a block below trains. Raises ValueError for a field
    without a reason.
    """
    weights = to_numpy(params)
    rows = _run(cfg, weights, tokens)
    for row, few in zip(rows, _run(cfg, weights, tokens[:1, :3])):  # NaN spreads as well from three tokens
        row["needed_for"] = few["needed_for"]
        row["kept_by"] = _ways(cfg, row)
    # The block's input is kept in every way.
    kept = {way: sum(row["bytes"] for row in rows if way in row["kept_by"]) for way in rows[0]["kept_by"]}
    return {"rows": rows, "kept": kept}


def field_reasons(source: str) -> dict[str, tuple[str, str]]:
    """Returns name -> (shape in axis letters, reason) from a named tuple's source. Raises ValueError for a field without."""
    names = re.findall(r"^    (\w+): ", source, re.M)
    found = {match[1]: (match[2], " ".join(match[3].split())) for line in source.splitlines() if (match := _FIELD.match(line))}
    if unexplained := [name for name in names if name not in found]:
        raise ValueError(f"{unexplained[0]} does not say its shape and which derivative needs it.")
    return found


def _run(cfg: ModelConfig, weights: Any, tokens: np.ndarray) -> list[Json]:
    T = tokens.shape[1]
    x, w = layers.lookup(weights["embed"], tokens), weights["blocks"]["0"]
    cos, sin = layers.rope_tables(cfg, np.arange(T)[None], x.dtype)
    tables = block.PositionTables(cos, sin, layers.causal_mask(None, T))
    rows = []
    for half, (kind, forward, backward) in HALVES.items():
        with_tables: Any = (tables,) if half == "attention" else ()
        reasons = field_reasons(inspect.getsource(kind))
        reading = inspect.getsource(backward).splitlines()
        x, residuals = forward(cfg, w, x, *with_tables)
        for name in kind._fields:
            if (value := getattr(residuals, name)) is None:
                continue
            needed_for: list[str] = []
            if T <= 3:
                absent = residuals._replace(**{name: np.full_like(value, math.nan)})
                dx, d = backward(cfg, w, absent, np.ones_like(x), *with_tables)
                needed_for = [of for of, array in (("dx", dx), *d.items()) if np.isnan(array).any()]
            rows.append({
                "half": half, "name": name, "axes": reasons[name][0], "reason": reasons[name][1],
                "shape": list(value.shape), "bytes": value.nbytes,
                "lines": [line.strip() for line in reading if re.search(rf" = .*residuals\.{name}\b", line)],
                "needed_for": needed_for,
            })  # fmt: skip
    return rows


def _ways(cfg: ModelConfig, row: Json) -> list[str]:
    """Returns the ways of training in which a row's array is kept."""
    kept = ["all weights"]
    for way, adapter in FROZEN.items():
        adapted = adapter.adapted_matrices if adapter else ()
        # A pair's gradient reads the matrix's input, as the matrix's own would.
        if {"dx", *adapted} & {*row["needed_for"]}:
            kept.append(way)
    return kept + ["gradient checkpointing"] * ((row["half"], row["name"]) == INPUT)
