"""Finds what a block of the NumPy model keeps for its backward pass, and why.

The reason is the comment of each field of the named tuples of engine/by_hand, the line is the one
of the backward pass that reads it, shape and bytes are those of a run. What needs it is found by
experiment: the backward pass reads NaN in its place, and each derivative that then is NaN needed
it.
"""

import inspect
import math
import re
from typing import Any, NamedTuple

import numpy as np

from bench.machine import Json
from engine.by_hand import block, layers
from engine.by_hand.model import to_numpy
from engine.model.config import LoraConfig, ModelConfig

HALVES: dict[str, tuple[Any, Any, Any]] = {
    "attention": (block.AttentionResiduals, block.attention_with_residuals, block.attention_backward),
    "feed-forward": (block.SwigluResiduals, block.feed_forward_with_residuals, block.feed_forward_backward),
}
# of the block, which gradient checkpointing keeps, and computes the rest again
INPUT = ("attention", "x")
FROZEN = {
    "LoRA on q and v": LoraConfig(targets=("q", "v")),
    "LoRA on every matrix": LoraConfig(),
    "frozen": None,
}
_FIELD = re.compile(r"\s+(\w+): .*#\s*(\([^)]*\))\s+(\S.*)")


def block_residuals(cfg: ModelConfig, params: Any, tokens: np.ndarray) -> Json:
    """Returns what block 0 keeps for tokens (B, T) int: "rows", one for each array, and "kept", the
    bytes by way of training.

    `needed_for`: "dx", and the weights whose derivatives need it. `kept_by`: the ways of training
    under which it is kept. Under "frozen" and LoRA the block's own weights are frozen and a block
    below trains. Raises ValueError for a field without a reason.
    """
    weights = to_numpy(params)
    rows = _kept_rows(cfg, weights, tokens)
    # NaN spreads as well from three tokens
    needs = _needed_for(cfg, weights, tokens[:1, :3])
    for row in rows:
        row["needed_for"] = needs[row["half"], row["name"]]
        row["kept_by"] = _ways(cfg, row)
    bytes_by_way = {}
    for way in rows[0]["kept_by"]:  # of the block's input, which is kept in every way
        bytes_by_way[way] = sum(row["bytes"] for row in rows if way in row["kept_by"])
    return {"rows": rows, "kept": bytes_by_way}


def field_reasons(source: str) -> dict[str, tuple[str, str]]:
    """Returns name -> (shape in axis letters, reason) from a named tuple's source. Raises
    ValueError for a field without.
    """
    names = re.findall(r"^    (\w+): ", source, re.M)
    reasons = {}
    for line in source.splitlines():
        match = _FIELD.match(line)
        if match:
            name, shape, reason = match.groups()
            reasons[name] = (shape, " ".join(reason.split()))
    unexplained = [name for name in names if name not in reasons]
    if unexplained:
        raise ValueError(f"{unexplained[0]} does not say its shape and which derivative needs it.")
    return reasons


class _Half(NamedTuple):
    """A half of block 0, run forward."""

    residuals: Any
    output: np.ndarray  # (B, T, D)
    tables: tuple[block.PositionTables, ...]  # that its passes take besides; none of feed-forward


def _run_forward(cfg: ModelConfig, weights: Any, tokens: np.ndarray) -> dict[str, _Half]:
    """Returns the halves of block 0 by name, after its forward pass over tokens (B, T)."""
    T = tokens.shape[1]
    x = layers.lookup(weights["embed"], tokens)
    cos, sin = layers.rope_tables(cfg, np.arange(T)[None], x.dtype)
    positions = block.PositionTables(cos, sin, layers.causal_mask(None, T))
    halves = {}
    for half, (_, forward, _) in HALVES.items():
        tables = (positions,) if half == "attention" else ()
        x, residuals = forward(cfg, weights["blocks"]["0"], x, *tables)
        halves[half] = _Half(residuals, x, tables)
    return halves


def _needed_for(cfg: ModelConfig, weights: Any, tokens: np.ndarray) -> dict[tuple[str, str], list[str]]:
    """Returns (half, name) -> the derivatives that become NaN when the backward pass reads NaN in
    place of that array: "dx", and the names of weights.
    """
    needs = {}
    for half, run in _run_forward(cfg, weights, tokens).items():
        _, _, backward = HALVES[half]
        for name, value in run.residuals._asdict().items():
            if value is None:
                continue
            absent = run.residuals._replace(**{name: np.full_like(value, math.nan)})
            dx, d = backward(cfg, weights["blocks"]["0"], absent, np.ones_like(run.output), *run.tables)
            derivatives = {"dx": dx, **d}
            needs[half, name] = [of for of, array in derivatives.items() if np.isnan(array).any()]
    return needs


def _kept_rows(cfg: ModelConfig, weights: Any, tokens: np.ndarray) -> list[Json]:
    """Returns a row for each array that the halves keep for tokens (B, T), without what needs it."""
    rows = []
    for half, run in _run_forward(cfg, weights, tokens).items():
        kind, _, backward = HALVES[half]
        reasons = field_reasons(inspect.getsource(kind))
        reading = inspect.getsource(backward).splitlines()
        for name, value in run.residuals._asdict().items():
            if value is None:
                continue
            shape, reason = reasons[name]
            reads = re.compile(rf" = .*residuals\.{name}\b")
            rows.append(
                {
                    "half": half,
                    "name": name,
                    "axes": shape,
                    "reason": reason,
                    "shape": list(value.shape),
                    "bytes": value.nbytes,
                    "lines": [line.strip() for line in reading if reads.search(line)],
                }
            )
    return rows


def _ways(cfg: ModelConfig, row: Json) -> list[str]:
    """Returns the ways of training in which a row's array is kept."""
    ways = ["all weights"]
    for way, adapter in FROZEN.items():
        derivatives = {"dx"}
        if adapter:
            # A pair's gradient reads the matrix's input, as the matrix's own would.
            derivatives.update(adapter.adapted_matrices)
        if derivatives.intersection(row["needed_for"]):
            ways.append(way)
    if (row["half"], row["name"]) == INPUT:
        ways.append("gradient checkpointing")
    return ways
