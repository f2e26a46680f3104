"""Fits to published runs the share of a device's peak that training gets, and a roofline of serving.

The share is a ridge regression of its logarithm on chip, one node or several, parameters, whether
activations are computed again, and the year. What a source states as its MFU is never read: shares
come from tokens, parameters and hours. The interval is what holds runs that are left out: the
quantile of the residuals that each run has when it is left out (the jackknife). The two penalties
were chosen among three pairs by those same residuals. Of serving three numbers are fitted to
published rates: what compute and bandwidth yield, and the start of a layer's kernels.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bench.plan.hardware import HERE, DeviceNumbers, accelerators, numbers, read_calibration
from bench.plan.published_rows import (
    ServingRun,
    TrainingBenchmark,
    TrainingRun,
    clean_runs,
    serving_runs,
    training_benchmarks,
)
from engine.counting.accelerators import Accelerator
from engine.planning.formulas import Numbers, efficiency, serving

LEVEL = 0.85  # of the left-out runs that an interval holds
SLOPE_PENALTY = 0.3
CHIP_PENALTY = 0.5  # the fewer runs a chip has, the nearer it stays to all
# The numbers by which the regressions tell rows apart, besides chips.
SHARED_FEATURES = ("base", "node", "size", "repeated")
RUN_FEATURES = (*SHARED_FEATURES, "drift")
BENCHMARK_FEATURES = (*SHARED_FEATURES, "eight_bit")
ONE_NODE = 8  # devices, at most
SLOTS = 512  # requests at once, at most: what engines take by default
LEAST_SPREAD = 0.05  # of this machine, whose few steps may agree by chance

TrainingTable = tuple[TrainingRun, ...] | tuple[TrainingBenchmark, ...]


@dataclass(frozen=True)
class ShareWeights:
    """What `formulas.efficiency` takes of a device: weights of the logarithm of its share of the peak."""

    base: float
    node: float  # where the run has one node
    size: float  # for each tenfold of the parameters above 1e10
    repeated: float  # where activations are computed again

    def share_for(self, run: TrainingRun) -> float:
        """Returns the share of the peak that a run of this size gets on the device."""
        return efficiency(self, run.params, run.devices or math.inf, run.recompute)


@dataclass(frozen=True)
class Efficiency(ShareWeights):
    """A device's weights, and how well they are known."""

    spread: float  # of the logarithm, each way
    origin: str  # in words


class ServingUse(NamedTuple):
    """What a device yields in serving; arrays where many settings are tried at once."""

    compute_use: float | np.ndarray  # share of the peak
    bandwidth_use: float | np.ndarray  # share of the bandwidth
    layer_seconds: float | np.ndarray  # to start a layer's kernels


# The settings that are tried: (settings, fields of ServingUse).
_TRIED = np.array(
    list(
        itertools.product(np.arange(0.40, 0.86, 0.05), np.arange(0.6, 0.96, 0.05), np.arange(0, 1.3e-4, 1e-5))
    )
)


@dataclass(frozen=True)
class ServingDevice(DeviceNumbers):
    """What `formulas.serving` takes of a device: its data sheet, and the fields of ServingUse."""

    compute_use: float | np.ndarray
    bandwidth_use: float | np.ndarray
    layer_seconds: float | np.ndarray


@dataclass(frozen=True)
class PlannedDevice(DeviceNumbers):
    """What all formulas take of a device: its data sheet, and the fields of Efficiency and ServingUse."""

    base: float
    node: float
    size: float
    repeated: float
    spread: float
    origin: str
    compute_use: float
    bandwidth_use: float
    layer_seconds: float


def make_efficiency(base: float, weights: Numbers, spread: float, origin: str) -> Efficiency:
    return Efficiency(
        base=base,
        node=weights["node"],
        size=weights["size"],
        repeated=weights["repeated"],
        spread=spread,
        origin=origin,
    )


def chip(hardware: str) -> str:
    """Returns the name of the accelerator whose chip this one has, with another memory."""
    return {"a100-40gb": "a100", "h200": "h100"}.get(hardware, hardware)


def predict_efficiency(
    hardware: str, runs: Sequence[TrainingRun] | None = None, year: float | None = None
) -> Efficiency:
    """Returns a device's efficiency by the best evidence there is: runs on its chip, else benchmarks
    on it, else the runs on all other chips. `runs`: by default all clean ones. `year`: the year whose
    software is assumed; by default the newest run's on this chip.
    """
    evidence = tuple(runs or clean_runs())
    own = chip(hardware)
    if count_on_chip(evidence, own):
        return from_runs_on_chip(own, evidence, year)
    if count_on_chip(training_benchmarks(), own):
        return from_benchmarks_on_chip(own, evidence)
    return from_other_chips(own, evidence, year)


def count_on_chip(table: TrainingTable, own: str) -> int:
    return sum(chip(row.hardware) == own for row in table)


def from_runs_on_chip(own: str, runs: tuple[TrainingRun, ...], year: float | None) -> Efficiency:
    """Returns the efficiency of a chip that some of the runs are on. `year`: None for that of the
    newest of these, for what software has gained on newer chips may not hold on this one.
    """
    weights, left_out = regression_of_runs(runs)
    if year is None:
        year = max(run.year for run in runs if chip(run.hardware) == own)
    base = weights["base"] + weights[own]
    base += weights["drift"] * drift_of_year(year)
    origin = f"{len(runs)} published runs, {count_on_chip(runs, own)} of them on {own}"
    return make_efficiency(base, weights, spread_of(left_out), origin)


def from_benchmarks_on_chip(own: str, runs: tuple[TrainingRun, ...]) -> Efficiency:
    """Returns the efficiency of a chip that benchmarks alone are on: theirs, less what whole runs fall
    short of benchmarks on chips that have both.
    """
    weights, _ = regression_of_benchmarks()
    steady = ShareWeights(
        base=weights["base"],
        node=weights["node"],
        size=weights["size"],
        repeated=weights["repeated"],
    )
    shortfalls = []  # logarithms, below 0 where a run is slower
    for run in runs:
        if chip(run.hardware) in weights:
            ratio = run.utilisation / steady.share_for(run)
            shortfalls.append(math.log(ratio) - weights[chip(run.hardware)])
    shortfall = np.median(shortfalls)
    base = weights["base"] + weights[own] + float(shortfall)
    spread = spread_of(np.array(shortfalls) - shortfall)
    count = count_on_chip(training_benchmarks(), own)
    benchmarks = "benchmark" if count == 1 else "benchmarks"
    origin = f"{count} published {benchmarks} on {own}, and how far below such whole runs stay on other chips"
    return make_efficiency(base, weights, spread, origin)


def from_other_chips(own: str, runs: tuple[TrainingRun, ...], year: float | None) -> Efficiency:
    """Returns the efficiency of a chip on which nothing was published: that of a mean chip, as far off
    as the furthest of the others besides. `year`: None for that of the newest run.
    """
    weights, left_out = regression_of_runs(runs)
    if year is None:
        year = max(run.year for run in runs)
    base = weights["base"] + weights["drift"] * drift_of_year(year)
    furthest = max(abs(weights[chip(run.hardware)]) for run in runs)
    spread = math.hypot(spread_of(left_out), furthest)
    origin = f"{len(runs)} published runs on other chips, for none on {own} was found"
    return make_efficiency(base, weights, spread, origin)


def spread_of(residuals: np.ndarray) -> float:
    """Returns the size that LEVEL of the residuals do not exceed, corrected for their number."""
    return float(np.quantile(np.abs(residuals), min(1.0, LEVEL * (1 + 1 / len(residuals)))))


def drift_of_year(year: float) -> float:
    return (year - 2023) / 3


def shared_features(row: TrainingRun | TrainingBenchmark) -> list[float]:
    """Returns the numbers of SHARED_FEATURES."""
    base = 1
    on_one_node = 0 < row.devices <= ONE_NODE
    size = math.log10(row.params / 1e10)
    return [base, on_one_node, size, row.recompute]


def run_features(run: TrainingRun) -> list[float]:
    """Returns the numbers of RUN_FEATURES."""
    return [*shared_features(run), drift_of_year(run.year)]


def benchmark_features(benchmark: TrainingBenchmark) -> list[float]:
    """Returns the numbers of BENCHMARK_FEATURES."""
    eight_bit = benchmark.precision != "bfloat16"  # then the share is of the 8-bit peak
    return [*shared_features(benchmark), eight_bit]


class Regression(NamedTuple):
    """`weights`: of each feature and of each chip. `left_out`: by row, the error of its logarithm when
    it is left out.
    """

    weights: Numbers
    left_out: np.ndarray


@functools.lru_cache(maxsize=256)
def regression_of_runs(runs: tuple[TrainingRun, ...]) -> Regression:
    return ridge_regression(runs, RUN_FEATURES, [run_features(run) for run in runs])


@functools.cache
def regression_of_benchmarks() -> Regression:
    benchmarks = training_benchmarks()
    return ridge_regression(benchmarks, BENCHMARK_FEATURES, [benchmark_features(each) for each in benchmarks])


def ridge_regression(
    table: TrainingTable, names: Sequence[str], features: Sequence[Sequence[float]]
) -> Regression:
    """Fits the logarithm of the share of the peak on chips and `features`, each row's numbers of these
    `names`. Errors of rows left out follow from one fit: each residual is divided by 1 less the row's
    leverage.
    """
    chip_of_row = [chip(row.hardware) for row in table]
    chips = sorted(set(chip_of_row))
    inputs = []
    for own, name in zip(features, chip_of_row, strict=True):
        is_on_chip = [name == each for each in chips]
        inputs.append([*own, *is_on_chip])
    x = np.array(inputs, float)
    y = np.log([row.utilisation for row in table])
    penalties = [0.0, *[SLOPE_PENALTY] * (len(names) - 1), *[CHIP_PENALTY] * len(chips)]
    inverse = np.linalg.inv(x.T @ x + np.diag(penalties))
    weights = inverse @ (x.T @ y)
    leverages = np.einsum("ij,jk,ik->i", x, inverse, x)
    left_out = (y - x @ weights) / (1 - leverages)
    return Regression(dict(zip((*names, *chips), weights.tolist())), left_out)


def efficiency_of(name: str) -> Efficiency:
    """Returns a device's efficiency: of this machine as measured, of others by published runs."""
    if name != HERE:
        return predict_efficiency(name)
    low, middle, high = read_calibration()["shares"]
    return Efficiency(
        base=math.log(middle),
        node=0,
        size=0,
        repeated=0,
        spread=max(math.log(high / middle), math.log(middle / low), LEAST_SPREAD),
        origin="training steps measured on this machine, slowest to fastest",
    )


class ServingFit(NamedTuple):
    """What devices yield, and the spread of a rate's logarithm each way."""

    uses: ServingUse
    spread: float
    origin: str


@functools.cache
def log_errors_of_tried() -> np.ndarray:
    """Returns (settings that are tried, published rates): logarithms of predicted over measured."""
    uses = ServingUse(*_TRIED.T)
    return np.array([np.log(predicted_rate(row, uses) / row.tokens_per_second) for row in serving_runs()]).T


def predicted_rate(row: ServingRun, uses: ServingUse) -> float | np.ndarray:
    """Returns the tokens a second that the formula gives for a published rate's setting; an array
    where `uses` are arrays.
    """
    device = ServingDevice(**vars(numbers(accelerators()[row.hardware])), **uses._asdict())
    estimates = serving(
        row,
        device,
        row.weight_bits,
        row.kv_bits,
        row.devices,
        slots=row.batch or SLOTS,
        prompt=row.prompt,
        answer=row.answer,
        cached=row.batch == 1,  # a lone stream was timed without its prompt
    )
    return estimates["tokens"]


def fit_serving(without: int | None = None) -> ServingFit:
    """Fits to the published rates, without one where its index is given: the setting of least mean
    error.
    """
    errors = log_errors_of_tried()
    if without is not None:
        errors = np.delete(errors, without, axis=1)
    best = int(np.abs(errors).mean(axis=1).argmin())
    origin = f"{errors.shape[1]} published rates of TensorRT-LLM and gpt-fast on A100, H100 and H200"
    uses = ServingUse(*_TRIED[best].tolist())
    return ServingFit(uses, spread_of(errors[best]), origin)


def device_numbers(device: Accelerator) -> PlannedDevice:
    """Returns what the formulas take of a device, with what published runs say of it."""
    return PlannedDevice(
        **vars(numbers(device)), **vars(efficiency_of(device.name)), **fit_serving().uses._asdict()
    )
