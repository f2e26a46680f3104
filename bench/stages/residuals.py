"""Finds what a block of the NumPy model keeps for its backward pass, and why.

The reason is the comment of each field of the named tuples of engine/by_hand, the line is the one
of the backward pass that reads it, shape and bytes are those of a run. What needs it is found by
experiment: the backward pass reads NaN in its place, and each derivative that then is NaN needed
it.
"""

import inspect
import math
import re
from typing import Any

import numpy as np

from bench.cli import Json
from engine.by_hand import block, layers
from engine.by_hand.model import to_numpy
from engine.model.config import LoraConfig, ModelConfig

HALVES: dict[str, tuple[Any, Any, Any]] = {
    "attention": (block.AttentionResiduals, block.attention_with_residuals, block.attention_backward),
    "feed-forward": (block.SwigluResiduals, block.feed_forward_with_residuals, block.feed_forward_backward),
}
# of the block, which gradient checkpointing keeps, and computes the rest again
INPUT = "attention", "x"
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
    rows = _run(cfg, weights, tokens)
    # NaN spreads as well from three tokens
    for row, few in zip(rows, _run(cfg, weights, tokens[:1, :3])):
        row["needed_for"] = few["needed_for"]
        row["kept_by"] = _ways(cfg, row)
    # The block's input is kept in every way.
    kept = {way: sum(row["bytes"] for row in rows if way in row["kept_by"]) for way in rows[0]["kept_by"]}
    return {"rows": rows, "kept": kept}


def field_reasons(source: str) -> dict[str, tuple[str, str]]:
    """Returns name -> (shape in axis letters, reason) from a named tuple's source. Raises
    ValueError for a field without.
    """
    names = re.findall(r"^    (\w+): ", source, re.M)
    found = {}
    for match in filter(None, map(_FIELD.match, source.splitlines())):
        found[match[1]] = match[2], " ".join(match[3].split())
    unexplained = [name for name in names if name not in found]
    if unexplained:
        raise ValueError(f"{unexplained[0]} does not say its shape and which derivative needs it.")
    return found


def _run(cfg: ModelConfig, weights: Any, tokens: np.ndarray) -> list[Json]:
    T = tokens.shape[1]
    x = layers.lookup(weights["embed"], tokens)
    w = weights["blocks"]["0"]
    cos, sin = layers.rope_tables(cfg, np.arange(T)[None], x.dtype)
    tables = block.PositionTables(cos, sin, layers.causal_mask(None, T))
    rows = []
    for half, (kind, forward, backward) in HALVES.items():
        with_tables: Any = (tables,) if half == "attention" else ()
        reasons = field_reasons(inspect.getsource(kind))
        reading = inspect.getsource(backward).splitlines()
        x, residuals = forward(cfg, w, x, *with_tables)
        for name in kind._fields:
            value = getattr(residuals, name)
            if value is None:
                continue
            needed_for: list[str] = []
            if T <= 3:
                absent = residuals._replace(**{name: np.full_like(value, math.nan)})
                dx, d = backward(cfg, w, absent, np.ones_like(x), *with_tables)
                needed_for = [of for of, array in (("dx", dx), *d.items()) if np.isnan(array).any()]
            rows.append(
                {
                    "half": half,
                    "name": name,
                    "axes": reasons[name][0],
                    "reason": reasons[name][1],
                    "shape": list(value.shape),
                    "bytes": value.nbytes,
                    "lines": [
                        line.strip() for line in reading if re.search(rf" = .*residuals\.{name}\b", line)
                    ],
                    "needed_for": needed_for,
                }
            )
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
