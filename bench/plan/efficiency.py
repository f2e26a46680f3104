"""The share of its peak that a device gives to a training run, as a distribution that comes from published runs.

A ridge regression of the logarithm of that share on chip, one node or several, parameters, whether activations are computed
again, and the year. What a source states as its MFU is never read: shares come from tokens, parameters and hours. The interval
is what holds runs that are left out: the quantile of the residuals that each run has when it is left out (the jackknife). The
two penalties were chosen among three pairs by those same residuals.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from bench.plan.formulas import Numbers, efficiency
from bench.plan.published import chip, clean_runs, rows, utilisation

LEVEL = 0.85  # of the left-out runs that an interval holds
SLOPE_PENALTY, CHIP_PENALTY = 0.3, 0.5  # the fewer runs a chip has, the nearer it stays to all


class Efficiency(NamedTuple):
    """What `formulas.efficiency` takes of a device; `spread`: of the logarithm, each way; `origin`: in words."""

    base: float
    node: float
    size: float
    repeated: float
    spread: float
    origin: str

    def of(self, row: Any) -> float:
        """Returns the share that is predicted for a run."""
        return efficiency(self, row.params, row.devices or math.inf, row.recompute)


def predict_efficiency(hardware: str, runs: Sequence[Any] | None = None, year: float = 0) -> Efficiency:
    """Returns a device's efficiency: from runs on its chip, else from benchmarks on it, less what runs fall short of those,
    else from the runs on all other chips. `runs`: by default all clean ones. `year`: by default that of the newest on the
    chip, for what software has gained on newer ones may not hold on it."""
    runs, own = tuple(runs or clean_runs()), chip(hardware)
    weights, left_out = _fit(runs)
    count = lambda table: sum(chip(row.hardware) == own for row in table)
    base = weights["base"] + weights.get(own, 0.0)
    newest = max((run.year for run in runs if chip(run.hardware) == own), default=max(run.year for run in runs))
    base += weights["drift"] * _drift(year or newest)
    spread, origin = spread_of(left_out), f"{len(runs)} published runs, {count(runs)} of them on {own}"
    if own not in weights and count(rows("training_benchmarks")):
        weights, _ = _fit(rows("training_benchmarks"))
        steady = _efficiency(weights["base"], weights, 0, "")
        known = [run for run in runs if chip(run.hardware) in weights]
        below = np.array([math.log(utilisation(run) / steady.of(run)) - weights[chip(run.hardware)] for run in known])
        base, spread = weights["base"] + weights[own] + float(np.median(below)), spread_of(below - np.median(below))
        measured = count(rows("training_benchmarks"))
        benchmarks = "benchmark" if measured == 1 else "benchmarks"
        origin = f"{measured} published {benchmarks} on {own}, and how far below such whole runs stay on other chips"
    elif own not in weights:
        spread = math.hypot(spread, max(abs(weights[chip(run.hardware)]) for run in runs))
        origin = f"{len(runs)} published runs on other chips, for none on {own} was found"
    return _efficiency(base, weights, spread, origin)


def _efficiency(base: float, weights: Numbers, spread: float, origin: str) -> Efficiency:
    return Efficiency(base, weights["node"], weights["size"], weights["repeated"], spread, origin)


def spread_of(residuals: Any) -> float:
    """Returns the size that LEVEL of the residuals do not exceed, corrected for their number."""
    return float(np.quantile(np.abs(residuals), min(1.0, LEVEL * (1 + 1 / len(residuals)))))


def _drift(year: float) -> float:
    return (year - 2023) / 3


@functools.lru_cache(maxsize=256)
def _fit(table: tuple[Any, ...]) -> tuple[Numbers, Any]:
    """Returns the weight of each feature and chip, and what each row is off when it is left out. What drifts is the year of
    a run, and the 8-bit products of a benchmark."""
    chips = sorted({chip(row.hardware) for row in table})
    features = [
        [
            1, 0 < row.devices <= 8, math.log10(row.params / 1e10), row.recompute,
            row.precision != "bfloat16" if hasattr(row, "precision") else _drift(row.year),
            *(chip(row.hardware) == each for each in chips),
        ]
        for row in table
    ]  # fmt: skip
    x, y = np.array(features, float), np.log([utilisation(row) for row in table])
    inverse = np.linalg.inv(x.T @ x + np.diag([0.0, *[SLOPE_PENALTY] * 4, *[CHIP_PENALTY] * len(chips)]))
    weights = inverse @ (x.T @ y)
    left_out = (y - x @ weights) / (1 - np.einsum("ij,jk,ik->i", x, inverse, x))
    return dict(zip(("base", "node", "size", "repeated", "drift", *chips), weights.tolist())), left_out
