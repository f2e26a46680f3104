"""A training run: from flags to plain values."""

import dataclasses
from typing import Any

import numpy as np

from engine.device import Device
from engine.model.config import preset
from stages.cli.console import Console
from stages.runs.estimate import RunPlan
from stages.runs.folder import default_folder
from stages.runs.loop import Intervals
from stages.runs.recipes import Recipe, recipe
from stages.runs.run import RunOptions, Stage, execute
from stages.runs.text_data import prepare_text
from stages.train.by_hand import ByHand
from stages.train.flags import Train
from stages.train.in_jax import InJax
from stages.train.training import Training

SECONDS, SECONDS_BY_HAND = 180.0, 60.0  # of a run when nobody asks for a length


def run(flags: Train, device: Device) -> int:
    """Trains as the flags say. Returns the exit code."""
    text, length = flags.text, flags.length
    chosen = chosen_recipe(flags)
    if flags.by_hand:
        device = dataclasses.replace(device, name=f"{device.name}, by NumPy {np.__version__}")
    folder = flags.folder.out_dir or default_folder(flags.preset + "-by-hand" * flags.by_hand, text.data)
    seconds = SECONDS_BY_HAND if flags.by_hand else SECONDS
    intervals = Intervals(flags.folder.save_every, flags.folder.keep, flags.monitoring.log_every, flags.monitoring.eval_every)

    def make_stage(console: Console) -> Stage:
        data = prepare_text(text.data, text.validation, chosen.tokenizer, console)
        cfg = _replace(
            preset(flags.preset), vocab=data.tokenizer.vocab, context=chosen.context, scan=chosen.scan,
            remat="block" if chosen.remat else "none", dtype="float32" if flags.by_hand else flags.step.dtype,
        )  # fmt: skip
        limit = length.max_time or (None if length.steps else seconds)
        plan = RunPlan(flags.preset, cfg, chosen, flags.seed, length.steps, limit)
        facts = {
            "preset": plan.name,
            "text": {
                "data": text.data, "validation": str(text.validation) if text.validation else None, "digest": data.digest,
                "bytes": data.train.bytes, "tokens": len(data.train.tokens),
            },
            "tokenizer": {"kind": chosen.tokenizer, "digest": data.tokenizer.digest},
        }  # fmt: skip
        implementation = ByHand(plan, data) if flags.by_hand else InJax(plan, data)
        default_length = not (length.max_time or length.steps)
        return Training(implementation, plan, data, facts, device, folder, default_length, console)

    return execute(RunOptions("train", device, folder, flags.folder.overwrite, flags.dry_run, intervals), make_stage)


def chosen_recipe(flags: Train) -> Recipe:
    """Returns the preset's recipe with what the flags say instead."""
    base = recipe(flags.preset, preset(flags.preset).vocab)
    step, optimizer = flags.step, dataclasses.asdict(flags.optimizer)
    kind = optimizer.pop("optimizer")
    return _replace(
        base, tokenizer=flags.text.tokenizer, context=step.context, batch=step.batch,
        accumulate=1 if flags.by_hand else step.accumulate, scan=step.scan or None, remat=step.remat or None,
        optimizer=_replace(base.optimizer, kind="adamw" if flags.by_hand else kind, **optimizer),
    )  # fmt: skip


def _replace(config: Any, **values: Any) -> Any:
    """Returns the config with those values that are not None."""
    return dataclasses.replace(config, **{name: value for name, value in values.items() if value is not None})
