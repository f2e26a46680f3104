"""Replays what was published: what the planner says of each run without that run, its makers' runs, or half of all."""

import math
import random
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from bench.plan.fits import fit_serving, predict_efficiency, predicted_rate
from bench.plan.formulas import SHARE, UPDATE_BYTES, training_memory
from bench.plan.model import config_of_size, job
from bench.plan.plans import ADAPTER_BOUND, MEMORY
from bench.plan.published import clean_runs, rows, utilisation

FLOPS_BOUND = 0.03
SPLITS = 20  # of the runs into halves


class Replay(NamedTuple):
    """A prediction beside the truth: predicted over true less 1, whether the interval holds the truth, and a reason."""

    name: str
    error: float
    inside: bool
    why: str


def replay(run: Any, others: Sequence[Any]) -> Replay:
    """Predicts a run's device-hours from others."""
    fit = predict_efficiency(run.hardware, others, run.year)
    ratio = utilisation(run) / fit.of(run)
    return Replay(run.name, ratio - 1, abs(math.log(ratio)) <= fit.spread, run.unclean or run.note or "no reason found")


def without_each() -> list[Replay]:
    """Predicts each clean run from all other clean runs."""
    return [replay(run, [other for other in clean_runs() if other is not run]) for run in clean_runs()]


def without_makers() -> list[Replay]:
    """Predicts each clean run from those of other makers and code."""
    return [replay(run, [other for other in clean_runs() if other.group != run.group]) for run in clean_runs()]


def halves_held_out() -> list[Replay]:
    """Predicts a half of the clean runs from the other half, for SPLITS random halves."""
    replays, runs = [], list(clean_runs())
    for split in range(SPLITS):
        random.Random(split).shuffle(runs)
        half = len(runs) // 2
        replays += [replay(run, runs[:half]) for run in runs[half:]]
    return replays


def flops_errors() -> list[Replay]:
    """Counts the FLOPs of each run that reports them, as its source says that it counts."""
    replays = []
    for run in rows("training_runs"):
        if run.reported_flops and run.flops_per_param:
            counted = run.flops_per_param * (run.params - run.lookup) + run.attention * run.layers * run.width * run.context
            error = run.tokens * counted / run.reported_flops - 1
            replays.append(Replay(run.name, error, abs(error) <= FLOPS_BOUND, run.note))
    return replays


def serving_errors() -> list[Replay]:
    """Predicts each published rate of serving without it."""
    replays = []
    for place, row in enumerate(rows("serving_runs")):
        fit = fit_serving(without=place)
        ratio = predicted_rate(row, fit.uses) / row.tokens_per_second
        name = (
            f"{row.name} in {row.weight_bits:g} bits, {row.devices:g} x {row.hardware}, {row.prompt:g} + {row.answer:g} tokens"
        )
        replays.append(Replay(name, ratio - 1, abs(math.log(ratio)) <= fit.spread, row.note or "no reason found"))
    return replays


def adapter_errors() -> list[Replay]:
    """Predicts the time of a token with LoRA or QLoRA over that of full fine-tuning, where both were measured."""
    replays, table = [], rows("finetunes")
    full = {row.name: row for row in table if row.method == "full"}
    for row in table:
        if (other := full[row.name]) is not row:
            error = _token_seconds(row) / _token_seconds(other) * row.tokens_per_second / other.tokens_per_second - 1
            replays.append(Replay(f"time of {row.method} for {row.name}", error, abs(error) <= ADAPTER_BOUND, other.note))
    return replays


def memory_errors() -> list[Replay]:
    """Predicts the published peaks of LoRA and QLoRA, but those of a batch that is not stated."""
    replays = []
    for row in rows("finetunes"):
        if row.peak_gb and row.method != "full" and "not stated" not in row.note:
            m, true = job(config_of_size(row.params), row.method, int(row.step_tokens)), 1e9 * row.peak_gb
            plain, least = (training_memory(m, 1, recompute) for recompute in (0, 1))
            predicted = plain if plain < SHARE * 1e9 * row.memory_gb else least
            inside = MEMORY[0] * least <= true <= MEMORY[1] * predicted
            replays.append(Replay(f"memory of {row.method} for {row.name}", predicted / true - 1, inside, row.note))
    return replays


def _token_seconds(row: Any) -> float:
    m = job(config_of_size(row.params), row.method, int(row.context), row.step_tokens)
    return m.flops / (0.45e12 * row.tflops) + m.trained * UPDATE_BYTES / m.step_tokens / (1e9 * row.memory_gbs)


def figures(replays: Sequence[Replay]) -> dict[str, float]:
    """Returns how many there are, the median of the absolute errors, and the share of truths inside their intervals."""
    median = statistics.median(abs(each.error) for each in replays)
    return {"rows": len(replays), "median": median, "inside": statistics.mean(each.inside for each in replays)}


def validation() -> dict[str, Any]:
    """Returns every error figure, and by name with their reasons what lies outside its interval and what counts for nothing."""
    parts = {
        "FLOPs, as the source counts": flops_errors(),
        "device-hours, each run left out": without_each(),
        "device-hours, all runs of its makers left out": without_makers(),
        f"device-hours, half of the runs left out, {SPLITS} times": halves_held_out(),
        "tokens a second of serving, each left out": serving_errors(),
        "time of LoRA over that of full fine-tuning": adapter_errors(),
        "peak memory of LoRA and QLoRA": memory_errors(),
    }
    single = [each for name, part in parts.items() if "half" not in name and "makers" not in name for each in part]
    unclean = [replay(run, clean_runs()) for run in rows("training_runs") if run.unclean]
    return {
        "table": {name: figures(part) for name, part in parts.items()},
        "outside their interval": [each._asdict() for each in single if not each.inside],
        "not clean, so in no figure": [each._asdict() for each in unclean],
    }  # fmt: skip


def describe(document: dict[str, Any]) -> str:
    """Writes the error figures as a table, then the outliers with their reasons."""
    lines = [f"  {'':<50} {'rows':>4}   {'median':>6}   {'inside':>6}"]
    for name, row in document["table"].items():
        lines.append(f"  {name:<50} {row['rows']:>4}   {row['median']:>6.1%}   {row['inside']:>6.0%}")
    for title in ("outside their interval", "not clean, so in no figure"):
        lines.append(f"{title}:")
        lines += [f"  {each['name']}: {each['error']:+.0%}; {each['why']}" for each in document[title]]
    return "\n".join(lines)
