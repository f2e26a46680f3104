"""Reads the published runs, benchmarks and rates in `published/`, one dataclass for each file.

A number that a source does not state is 0. Rows are equal to themselves alone, so that a run can be
left out of the others.
"""

import csv
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from bench.plan.hardware import accelerators

PUBLISHED = Path(__file__).parent / "published"
FLOP_OF_A_TFLOPS_HOUR = 3600e12


@dataclass(eq=False)
class TrainingRun:
    """A whole training run, with the device-hours that it took."""

    name: str
    group: str  # its makers
    year: float
    params: float  # that multiply each token
    layers: float
    width: float  # of attention
    context: float
    tokens: float
    hardware: str
    devices: float  # 0: a cluster of unknown size
    recompute: float  # 1 where activations are computed again
    device_hours: float
    # The FLOPs that the source reports, and how it counts them for a token: flops_per_param times
    # params without lookup, and attention times layers x width x context.
    reported_flops: float
    flops_per_param: float
    attention: float
    lookup: float
    unclean: str  # why the run is in no figure
    source: str
    note: str

    @property
    def utilisation(self) -> float:
        """The share of the peak over all device-hours, with 6 N and causal attention for each token."""
        flops = self.tokens * 6 * (self.params + self.layers * self.width * self.context)
        peak = accelerators()[self.hardware].bf16_tflops
        return flops / (self.device_hours * FLOP_OF_A_TFLOPS_HOUR * peak)


@dataclass(eq=False)
class TrainingBenchmark:
    """Some training steps, whose share of the peak the source states."""

    name: str
    year: float
    params: float
    hardware: str
    devices: float
    recompute: float  # 1 where activations are computed again
    precision: str  # of the products: `bfloat16` or `8-bit`
    utilisation: float
    source: str


@dataclass(eq=False)
class ServingRun:
    """A rate of serving; the planner's formulas take the row as their model."""

    name: str
    params: float
    matmul: float  # parameters that are multiplied
    layers: float
    kv_width: float
    width: float
    vocab: float
    weight_bits: float
    kv_bits: float
    hardware: str
    devices: float
    batch: float  # requests at once; 0: as many as the engine took
    prompt: float  # tokens
    answer: float  # tokens
    tokens_per_second: float
    source: str
    note: str

    @property
    def query_width(self) -> float:
        """The width of all query heads, which in these models is that of the model."""
        return self.width


@dataclass(eq=False)
class FineTune:
    """A fine-tuning by one method; rows of one name differ in the method alone."""

    name: str
    params: float
    layers: float
    width: float
    context: float
    step_tokens: float
    hardware: str
    tflops: float
    memory_gbs: float
    memory_gb: float
    method: str
    tokens_per_second: float
    peak_gb: float
    batch_stated: float  # 1 where the source states the batch that the peak is of
    source: str
    note: str


@functools.cache
def training_runs() -> tuple[TrainingRun, ...]:
    return _read_rows("training_runs", TrainingRun)


@functools.cache
def clean_runs() -> tuple[TrainingRun, ...]:
    """Returns the training runs that state their device-hours and that nothing speaks against."""
    return tuple(run for run in training_runs() if run.device_hours and not run.unclean)


@functools.cache
def training_benchmarks() -> tuple[TrainingBenchmark, ...]:
    return _read_rows("training_benchmarks", TrainingBenchmark)


@functools.cache
def serving_runs() -> tuple[ServingRun, ...]:
    return _read_rows("serving_runs", ServingRun)


@functools.cache
def finetunes() -> tuple[FineTune, ...]:
    return _read_rows("finetunes", FineTune)


def _read_rows[Row](name: str, kind: type[Row]) -> tuple[Row, ...]:
    """Returns the rows of a file, whose columns are the fields of `kind`."""
    types = get_type_hints(kind)
    rows = []
    with (PUBLISHED / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        for texts in csv.DictReader(file):
            cells: dict[str, Any] = {}
            for column, text in texts.items():
                if types[column] is str:
                    cells[column] = text
                else:
                    cells[column] = float(text or 0)
            rows.append(kind(**cells))
    return tuple(rows)
