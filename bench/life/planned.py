"""Plans the same three stages for a large model that was published, by bench.plan."""

from typing import Any

from bench.cli import Json
from bench.plan.answer import Interval, around, costs
from bench.plan.fits import SLOTS, device_numbers, fit_serving
from bench.plan.formulas import serving
from bench.plan.hardware import find_hardware
from bench.plan.model import job
from bench.plan.plans import PRECISIONS, plan_training
from bench.plan.published import clean_runs
from engine.model.config import preset

NAME, PUBLISHED = "llama-2-7b", "Llama-2-7B"
TUNING_TOKENS, PROMPT, ANSWER = 10e6, 1000, 250


def planned_rows() -> dict[str, Any]:
    """Returns rows of training as published, of LoRA on TUNING_TOKENS and of serving a million tokens of answers.

    Each has intervals of device-hours, and of dollars and kWh.
    """
    run = next(run for run in clean_runs() if run.name == PUBLISHED)
    device = find_hardware(run.hardware, {})
    d = device_numbers(device)
    cfg = preset(NAME)
    rows = []
    for stage, method, tokens, devices in (
        ("training", "pretrain", run.tokens, 1024),
        ("fine-tuning", "lora:16", TUNING_TOKENS, 1),
    ):
        m = job(cfg, method, 4096)
        rows.append(_row(stage, tokens, m.trained, plan_training(NAME, method, m, d, tokens, devices).lines["device-hours"], d))
    rate = serving(job(cfg, "pretrain", 4096), d, *PRECISIONS["bfloat16"], 1, SLOTS, PROMPT, ANSWER, 0)["tokens"]
    rows.append(_row("serving", 1e6, 0, around(1e6 / rate / 3600, fit_serving().spread, "hours", ""), d))
    return {
        "model": PUBLISHED, "params": m.params, "hardware": device.name, "rows": rows, "published_hours": run.device_hours,
        "source": run.source,
    }  # fmt: skip


def _row(stage: str, tokens: float, trained: float, hours: Interval, d: Any) -> Json:
    return {
        "stage": stage, "tokens": tokens, "trained": trained, "hours": hours[:3],
        **{name: line[:3] for name, line in costs(hours, d).items()},
    }  # fmt: skip
