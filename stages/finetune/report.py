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
from stages.runs.model_stage import Rows
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
    before: Scores = finished.before.scores
    now = after.scores
    last_step = finished.loop_state.step
    speed = training_speed(tuning, finished)
    doubt_ceilings(speed.share_of_ceiling)
    result = {
        "before": dataclasses.asdict(before),
        "after": dataclasses.asdict(now),
        "unit": after.unit,
        "train_seconds": finished.loop_state.seconds,
        "training_flops": last_step * tuning.plan.step_flops,
        "tokens_per_second": speed.tokens_a_second,
        "flops_share_of_ceiling": speed.share_of_ceiling,
        "general": tuning.general,
        "kept_step": None,
    }
    rows = score_rows(tuning, before, after)
    if before.known is not None:
        kept_answers = compare_known(before.known, now.known)
        result["kept_answers"] = dataclasses.asdict(kept_answers)
        rows += kept_answers.rows()
    rows.append(
        ("speed", f"{speed.tokens_a_second:,.0f} tokens/s, {speed.share_of_ceiling:.0%} of the ceiling")
    )
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
    return RunReport(
        result=result,
        texts=texts,
        rows=rows,
        saved=f"{path} ({trained_count:,} parameters)",
        next_stages=["chat", f"serve{as_trained}", f"evaluate{as_trained}", "export"],
    )


class Speed(NamedTuple):
    """How fast a run trained."""

    tokens_a_second: float
    share_of_ceiling: float  # of this machine's FLOP/s


def training_speed(tuning: TuningPlan, finished: Finished) -> Speed:
    """Returns the mean speed of a run, and the share of the ceiling that its warm steps reach."""
    plan = tuning.plan
    steps_a_second = finished.loop_state.step / max(finished.loop_state.seconds, 1e-9)
    warm_steps_a_second = finished.warm_rate or steps_a_second
    return Speed(
        tokens_a_second=steps_a_second * plan.step_tokens,
        share_of_ceiling=warm_steps_a_second * plan.step_flops / tuning.peak_flops,
    )


def score_rows(tuning: TuningPlan, before: Scores, after: Measured) -> Rows:
    """Returns the summary's rows of scores before and after training, but those of general questions."""
    now = after.scores
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
    return rows
