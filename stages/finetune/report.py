"""What a fine-tuning comes to: a model's scores before and after, and the report of them."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax

from engine.counting.hardware import doubt_ceilings
from engine.format import quantity
from stages.finetune.plan import TuningPlan
from stages.runs.answers import JudgedAnswer, compare, describe_faults
from stages.runs.general_questions import compare_known
from stages.runs.stage import Finished, RunReport

QUICK_EXAMPLES = 64  # of a quick evaluation


@dataclasses.dataclass(frozen=True)
class Scores:
    """A model's scores before or after training."""

    held_out: float
    general: float | None  # bits per byte of a general text
    answers: tuple[JudgedAnswer, ...]  # to held-out questions
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    # General questions that it answers right; None where they were not asked.
    known: tuple[str, ...] | None = None


class Measured(NamedTuple):
    """Scores, the unit of `held_out`, and whether one device holds the model, to answer."""

    scores: Scores
    unit: str
    fits_device: bool


def tuning_report(
    tuning: TuningPlan, finished: Finished, after: Measured, step: int, path: Path
) -> RunReport:
    """Reports scores before and after. `step`: the checkpoint that the run stands for; `path`:
    where it was saved."""
    plan = tuning.plan
    before: Scores = finished.before.scores
    now = after.scores
    last_step = finished.loop_state.step
    seconds = finished.loop_state.seconds
    rate = last_step / max(seconds, 1e-9)
    speed = rate * plan.step_tokens
    share_of_ceiling = (finished.warm_rate or rate) * plan.step_flops / tuning.peak_flops
    doubt_ceilings(share_of_ceiling)
    result = {
        "before": dataclasses.asdict(before),
        "after": dataclasses.asdict(now),
        "unit": after.unit,
        "train_seconds": seconds,
        "tokens_per_second": speed,
        "flops_share_of_ceiling": share_of_ceiling,
        "general": tuning.general,
        "kept_step": None,
    }
    rows = [
        (
            "held out",
            f"{before.held_out:.3f} -> {now.held_out:.3f} {after.unit} on {tuning.dataset.held_out_name}",
        )
    ]
    scored = f"of {quantity(len(tuning.dataset.references[:QUICK_EXAMPLES]), 'held-out answer')}"
    for name, value in now.metrics.items():
        rows.append((name, f"{before.metrics[name]:.3f} -> {value:.3f} {scored}"))
    forgotten = "not measured"
    if before.general is not None:
        forgotten = f"{before.general:.3f} -> {now.general:.3f} bits per byte on {tuning.general}"
    rows.append(("forgotten", forgotten))
    if before.known is not None:
        kept_answers = compare_known(before.known, now.known)
        result["kept_answers"] = dataclasses.asdict(kept_answers)
        rows += kept_answers.rows()
    rows.append(("speed", f"{speed:,.0f} tokens/s, {share_of_ceiling:.0%} of the ceiling"))
    if now.answers:
        rows.append(("answers", describe_faults(now.answers)))
    if step != last_step:
        result["kept_step"] = step
        rows.append(
            (
                "chosen",
                f"step {step:,}, the best evaluated; "
                f"the last, {last_step:,}, is still there to train on from",
            )
        )
    texts = compare(
        [answer.question for answer in now.answers],
        [(answer.text, answer.faults) for answer in before.answers],
        [(answer.text, answer.faults) for answer in now.answers],
    )
    trained_count = sum(leaf.size for leaf in jax.tree.leaves(finished.state.trainable))
    as_trained = ""
    if tuning.opened.in_blocks:
        as_trained = " --weights q4"
    next_stages = ["chat", f"serve{as_trained}", f"evaluate{as_trained}", "export"]
    return RunReport(result, texts, rows, f"{path} ({trained_count:,} parameters)", next_stages)
