"""Published runs and rates: the CSV files of this folder, each row with its source. Only rows whose source was read are there.

training_runs.csv        runs that were finished; params: those that multiply each token; layers, width (of attention): of the
                         published configuration, but OPT's and Llama-3.1-405B's, which were not read and only agree with
                         params; devices 0: a cluster of unknown size; recompute: a second forward pass, where a source has
                         one; flops_per_param, attention, lookup: how the source counts
                         reported_flops, (N - lookup) and layers x width x context times those; unclean: why not to count
training_benchmarks.csv  throughputs without saving, evaluating and failing, as shares of the peak of their precision, attention
                         being causal
serving_runs.csv         generated tokens a second of all devices; batch 0: as many as the engine took
finetunes.csv            throughputs; rows of one name differ in the method alone
"""

import csv
import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from engine.counting.accelerators import read_accelerators

_TEXT = {"name", "group", "hardware", "precision", "method", "unclean", "source", "note"}
accelerators = functools.cache(read_accelerators)


class Row(SimpleNamespace):
    """A row, with an attribute for each column; equal to itself alone."""

    __eq__ = object.__eq__
    __hash__ = object.__hash__  # type: ignore[assignment]


@functools.cache
def rows(name: str) -> tuple[Any, ...]:
    """Returns the rows of a file, with a column each; a number that is not there is 0."""
    with (Path(__file__).parent / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        read = lambda column, text: text if column in _TEXT else float(text or 0)
        return tuple(Row(**{column: read(column, text) for column, text in row.items()}) for row in csv.DictReader(file))


@functools.cache
def clean_runs() -> tuple[Any, ...]:
    """Returns the training runs that state their device-hours and count."""
    return tuple(run for run in rows("training_runs") if run.device_hours and not run.unclean)


def utilisation(row: Any) -> float:
    """Returns a benchmark's share of peak, or a run's over all device-hours, with 6 N and causal attention for each token."""
    if hasattr(row, "utilisation"):
        return row.utilisation
    flops = row.tokens * 6 * (row.params + row.layers * row.width * row.context)
    return flops / (row.device_hours * 3600e12 * accelerators()[row.hardware].bf16_tflops)


def chip(hardware: str) -> str:
    """Returns the name of the accelerator whose chip this one has, with another memory."""
    return {"a100-40gb": "a100", "h200": "h100"}.get(hardware, hardware)
