"""Replays what was published: what the planner says of each run without it, or without its makers' runs."""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from bench.plan.fits import fit_serving, predict_efficiency, predicted_rate
from bench.plan.model import config_of_size, job
from bench.plan.plans import ADAPTER_BOUND, MEMORY
from bench.plan.published_rows import (
    FineTune,
    TrainingRun,
    clean_runs,
    finetunes,
    serving_runs,
    training_runs,
)
from bench.terminal import print_table
from engine.planning.formulas import SHARE, UPDATE_BYTES, bytes_a_device

FLOPS_BOUND = 0.03
ASSUMED_SHARE = 0.45  # of the peak, that fine-tuning gets


class Replay(NamedTuple):
    """A prediction beside the truth: predicted over true less 1, whether the interval holds the
    truth, and a reason.
    """

    name: str
    error: float
    inside: bool
    why: str


def replay(run: TrainingRun, others: Sequence[TrainingRun]) -> Replay:
    """Predicts a run from others."""
    efficiency = predict_efficiency(run.hardware, others, run.year)
    ratio = run.utilisation / efficiency.share_for(run)
    is_inside = abs(math.log(ratio)) <= efficiency.spread
    return Replay(run.name, ratio - 1, is_inside, run.unclean or run.note or "no reason found")


def left_out(together: Callable[[TrainingRun, TrainingRun], bool]) -> list[Replay]:
    """Predicts each clean run from all clean runs that are not left out `together` with it."""
    return [
        replay(run, [other for other in clean_runs() if not together(run, other)]) for run in clean_runs()
    ]


def flops_errors() -> Iterator[Replay]:
    """Counts the FLOPs of each run that reports them, as its source says that it counts."""
    for run in training_runs():
        if run.reported_flops and run.flops_per_param:
            counted = (
                run.flops_per_param * (run.params - run.lookup)
                + run.attention * run.layers * run.width * run.context
            )
            error = run.tokens * counted / run.reported_flops - 1
            yield Replay(run.name, error, abs(error) <= FLOPS_BOUND, run.note)


def serving_errors() -> Iterator[Replay]:
    """Predicts each published rate of serving without it."""
    for index, row in enumerate(serving_runs()):
        fit = fit_serving(without=index)
        ratio = float(predicted_rate(row, fit.uses)) / row.tokens_per_second
        tokens = f"{row.prompt:g} + {row.answer:g} tokens"
        name = f"{row.name} in {row.weight_bits:g} bits, {row.devices:g} x {row.hardware}, {tokens}"
        yield Replay(name, ratio - 1, abs(math.log(ratio)) <= fit.spread, row.note or "no reason found")


def adapter_errors() -> Iterator[Replay]:
    """Predicts the time of a token with LoRA or QLoRA over that of full fine-tuning, where both
    were measured.
    """
    full_tuning = {row.name: row for row in finetunes() if row.method == "full"}
    for row in finetunes():
        full = full_tuning[row.name]
        if row is full:
            continue
        predicted = _token_seconds(row) / _token_seconds(full)
        error = predicted * row.tokens_per_second / full.tokens_per_second - 1
        name = f"time of {row.method} for {row.name}"
        yield Replay(name, error, abs(error) <= ADAPTER_BOUND, full.note)


def memory_errors() -> Iterator[Replay]:
    """Predicts the published peaks of LoRA and QLoRA, but those of a batch that is not stated."""
    for row in finetunes():
        if row.peak_gb and row.method != "full" and row.batch_stated:
            m = job(config_of_size(row.params), row.method, int(row.step_tokens))
            true = 1e9 * row.peak_gb
            plain = bytes_a_device(m, devices=1, recompute=0)
            least = bytes_a_device(m, devices=1, recompute=1)
            if plain < SHARE * 1e9 * row.memory_gb:
                predicted = plain
            else:
                predicted = least
            is_inside = MEMORY[0] * least <= true <= MEMORY[1] * predicted
            yield Replay(f"memory of {row.method} for {row.name}", predicted / true - 1, is_inside, row.note)


def _token_seconds(row: FineTune) -> float:
    """Returns the seconds of a token at ASSUMED_SHARE of the peak, and of its part of the optimizer's
    update.
    """
    m = job(config_of_size(row.params), row.method, int(row.context), row.step_tokens)
    products = m.flops / (ASSUMED_SHARE * 1e12 * row.tflops)
    update = m.trained * UPDATE_BYTES / m.step_tokens / (1e9 * row.memory_gbs)
    return products + update


def figures(replays: Sequence[Replay]) -> dict[str, float]:
    """Returns how many there are, the median of the absolute errors, and the share of truths inside
    their intervals.
    """
    median = statistics.median(abs(each.error) for each in replays)
    return {
        "rows": len(replays),
        "median": median,
        "inside": statistics.mean(each.inside for each in replays),
    }


def validation() -> dict[str, Any]:
    """Returns every error figure, and by name with their reasons what lies outside its interval and
    what counts for nothing.
    """
    flops = [*flops_errors()]
    each_run = left_out(lambda run, other: run is other)
    each_maker = left_out(lambda run, other: run.group == other.group)
    rates = [*serving_errors()]
    adapter_times = [*adapter_errors()]
    peaks = [*memory_errors()]
    parts = {
        "FLOPs, as the source counts": flops,
        "device-hours, each run left out": each_run,
        "device-hours, all runs of its makers left out": each_maker,
        "tokens a second of serving, each left out": rates,
        "time of LoRA over that of full fine-tuning": adapter_times,
        "peak memory of LoRA and QLoRA": peaks,
    }
    # without `each_maker`, whose runs are those of `each_run` again
    single = [*flops, *each_run, *rates, *adapter_times, *peaks]
    unclean = [replay(run, clean_runs()) for run in training_runs() if run.unclean]
    return {
        "table": {name: figures(part) for name, part in parts.items()},
        "outside their interval": [each._asdict() for each in single if not each.inside],
        "not clean, so in no figure": [each._asdict() for each in unclean],
    }


def cells(document: dict[str, Any]) -> list[tuple[str, ...]]:
    """Returns the error figures as a table."""
    return [
        (name, f"{row['rows']}", f"{row['median']:.1%}", f"{row['inside']:.0%}")
        for name, row in document["table"].items()
    ]


def show(document: dict[str, Any]) -> None:
    """Prints the error figures, then the outliers with their reasons."""
    print_table("What is predicted without itself", ("", "rows", "median error", "inside"), cells(document))
    for title in ("outside their interval", "not clean, so in no figure"):
        outliers = [(each["name"], f"{each['error']:+.0%}", each["why"]) for each in document[title]]
        print_table(title, ("", "error", "why"), outliers, left=3)
