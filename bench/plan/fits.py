"""What published runs say of a device: the share of its peak that training gets, and a roofline of serving.

The share is a ridge regression of its logarithm on chip, one node or several, parameters, whether
activations are computed again, and the year. What a source states as its MFU is never read: shares
come from tokens, parameters and hours. The interval is what holds runs that are left out: the
quantile of the residuals that each run has when it is left out (the jackknife). The two penalties
were chosen among three pairs by those same residuals. Of serving three numbers are fitted to
published rates: what compute and bandwidth yield, and the start of a layer's kernels.
"""

import csv
import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from bench.plan.hardware import HERE, accelerators, numbers, read_calibration
from engine.counting.accelerators import Accelerator
from engine.planning.formulas import Numbers, efficiency, serving

_TEXT = {"name", "group", "hardware", "precision", "method", "unclean", "source", "note"}
LEVEL = 0.85  # of the left-out runs that an interval holds
SLOPE_PENALTY = 0.3
CHIP_PENALTY = 0.5  # the fewer runs a chip has, the nearer it stays to all
SLOTS = 512  # requests at once, at most: what engines take by default
# What is tried: shares of the peak and of the bandwidth, and seconds to start a layer's kernels.
_TRIED = list(
    itertools.product(np.arange(0.40, 0.86, 0.05), np.arange(0.6, 0.96, 0.05), np.arange(0, 1.3e-4, 1e-5))
)
USES = ("compute_use", "bandwidth_use", "layer_seconds")


@functools.cache
def rows(name: str) -> tuple[Any, ...]:
    """Returns the rows of a file, with an attribute for each column; a number that is not there is
    0.
    """
    with (Path(__file__).parent / "published" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        columns, *table = csv.reader(file)
    row: Any = dataclasses.make_dataclass("Row", columns, eq=False)  # equal to itself alone

    def read(column: str, text: str) -> str | float:
        if column in _TEXT:
            return text
        return float(text or 0)

    return tuple(row(*map(read, columns, texts)) for texts in table)


@functools.cache
def clean_runs() -> tuple[Any, ...]:
    """Returns the training runs that state their device-hours and count."""
    return tuple(run for run in rows("training_runs") if run.device_hours and not run.unclean)


def utilisation(row: Any) -> float:
    """Returns a benchmark's share of peak, or a run's over all device-hours, with 6 N and causal
    attention for each token.
    """
    if hasattr(row, "utilisation"):
        return row.utilisation
    flops = row.tokens * 6 * (row.params + row.layers * row.width * row.context)
    return flops / (row.device_hours * 3600e12 * accelerators()[row.hardware].bf16_tflops)


def chip(hardware: str) -> str:
    """Returns the name of the accelerator whose chip this one has, with another memory."""
    return {"a100-40gb": "a100", "h200": "h100"}.get(hardware, hardware)


class Efficiency(NamedTuple):
    """What `formulas.efficiency` takes of a device; `spread`: of the logarithm, each way; `origin`:
    in words.
    """

    base: float
    node: float
    size: float
    repeated: float
    spread: float
    origin: str

    def of(self, row: Any) -> float:
        return efficiency(self, row.params, row.devices or math.inf, row.recompute)


def predict_efficiency(hardware: str, runs: Sequence[Any] | None = None, year: float = 0) -> Efficiency:
    """Returns a device's efficiency: from runs on its chip, else from benchmarks on it, less what
    runs fall short of those, else from the runs on all other chips. `runs`: by default all clean
    ones. `year`: by default that of the newest on the chip, for what software has gained on newer
    ones may not hold on it.
    """
    runs = tuple(runs or clean_runs())
    own = chip(hardware)
    weights, left_out = _fit(runs)

    def count(table: Sequence[Any]) -> int:
        return sum(chip(row.hardware) == own for row in table)

    base = weights["base"] + weights.get(own, 0.0)
    newest = max(
        (run.year for run in runs if chip(run.hardware) == own), default=max(run.year for run in runs)
    )
    base += weights["drift"] * _drift(year or newest)
    spread = spread_of(left_out)
    origin = f"{len(runs)} published runs, {count(runs)} of them on {own}"
    if own not in weights and count(rows("training_benchmarks")):
        weights, _ = _fit(rows("training_benchmarks"))
        steady = _efficiency(weights["base"], weights, 0, "")
        known = [run for run in runs if chip(run.hardware) in weights]
        below = np.array(
            [math.log(utilisation(run) / steady.of(run)) - weights[chip(run.hardware)] for run in known]
        )
        base = weights["base"] + weights[own] + float(np.median(below))
        spread = spread_of(below - np.median(below))
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
    """Returns the weight of each feature and chip, and what each row is off when it is left out.
    What drifts is the year of a run, and the 8-bit products of a benchmark.
    """
    chips = sorted({chip(row.hardware) for row in table})
    features = []
    for row in table:
        if hasattr(row, "precision"):
            drift = row.precision != "bfloat16"
        else:
            drift = _drift(row.year)
        size = math.log10(row.params / 1e10)
        chosen = [chip(row.hardware) == each for each in chips]
        features.append([1, 0 < row.devices <= 8, size, row.recompute, drift, *chosen])
    x = np.array(features, float)
    y = np.log([utilisation(row) for row in table])
    inverse = np.linalg.inv(x.T @ x + np.diag([0.0, *[SLOPE_PENALTY] * 4, *[CHIP_PENALTY] * len(chips)]))
    weights = inverse @ (x.T @ y)
    left_out = (y - x @ weights) / (1 - np.einsum("ij,jk,ik->i", x, inverse, x))
    return dict(zip(("base", "node", "size", "repeated", "drift", *chips), weights.tolist())), left_out


def efficiency_of(name: str) -> Efficiency:
    """Returns a device's efficiency: of this machine as measured, of others by published runs."""
    if name != HERE:
        return predict_efficiency(name)
    low, middle, high = read_calibration()["shares"]
    spread = max(math.log(high / middle), math.log(middle / low), 0.05)
    return Efficiency(
        math.log(middle), 0, 0, 0, spread, "training steps measured on this machine, slowest to fastest"
    )


class Fit(NamedTuple):
    """The three numbers, and the spread of a rate's logarithm each way."""

    uses: Numbers
    spread: float
    origin: str


@functools.cache
def _errors() -> Any:
    """(settings that are tried, published rates): logarithms of predicted over measured."""
    uses = dict(zip(USES, np.array(_TRIED).T))
    return np.array(
        [np.log(predicted_rate(row, uses) / row.tokens_per_second) for row in rows("serving_runs")]
    ).T


def predicted_rate(row: Any, uses: dict[str, Any]) -> Any:
    """Returns the tokens a second that the formula gives for a published rate's setting; an array
    where `uses` are arrays.
    """
    d = numbers(accelerators()[row.hardware], **uses)
    m = SimpleNamespace(**vars(row), query_width=row.width)
    slots = row.batch or SLOTS
    cached = row.batch == 1  # a lone stream was timed without its prompt
    return serving(m, d, row.weight_bits, row.kv_bits, row.devices, slots, row.prompt, row.answer, cached)[
        "tokens"
    ]


def fit_serving(without: int | None = None) -> Fit:
    """Fits to the published rates but one: the setting of least mean error."""
    if without is None:
        errors = _errors()
    else:
        errors = np.delete(_errors(), without, axis=1)
    best = int(np.abs(errors).mean(axis=1).argmin())
    origin = f"{errors.shape[1]} published rates of TensorRT-LLM and gpt-fast on A100, H100 and H200"
    return Fit(dict(zip(USES, map(float, _TRIED[best]))), spread_of(errors[best]), origin)


def device_numbers(device: Accelerator) -> Any:
    return numbers(device, **efficiency_of(device.name)._asdict(), **fit_serving().uses)
