"""Finds the previous run in a folder, and restores its newest checkpoint."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from engine.errors import UserError
from engine.format import duration, join_words
from engine.mesh import processes
from engine.mesh.layout import place, sharded_shapes
from engine.model.config import ModelConfig
from engine.model.paths import leaf_paths
from engine.storage import checkpoint, manifest
from engine.storage.run_folder import read_config, read_json
from engine.text import epoch_order
from engine.training.step import TrainState
from stages.cli.console import Console
from stages.runs.folder import holds_run
from stages.runs.loop_state import LoopState
from stages.runs.mesh import from_file_order
from stages.runs.trainable import TrainableSplit

Changes = dict[str, tuple[Any, Any]]  # path in run.json -> (before, now)


@dataclasses.dataclass(frozen=True)
class PreviousRun:
    """The run in a folder: its run.json, its newest checkpoint's LoopState, and what the run that resumes it changes."""

    folder: Path
    record: dict[str, Any]
    loop_state: LoopState
    changes: Changes

    @property
    def has_result(self) -> bool:
        """Whether it was measured at its end, and its newest checkpoint is intact."""
        step = str(self.loop_state.step)
        return bool(self.record.get("result")) and not manifest.verify(self.folder / "checkpoints" / step)


def find_previous_run(folder: Path, facts: dict[str, Any], cfg: ModelConfig, overwrite: bool) -> PreviousRun | None:
    """Returns the run in the folder to resume; None when there is none, or `overwrite`.

    Raises UserError when the one there trains something else, naming what differs; digests of base and data are compared
    here.
    """
    if overwrite or not holds_run(folder):
        return None
    record, steps = read_json(folder / "run.json"), checkpoint.steps(folder)
    if not steps:
        return None  # stopped before its first checkpoint
    if record.get("skipped_batches"):
        raise UserError(
            f"{folder} holds a run that left out batches {record['skipped_batches']} of its data with --skip-batches, which "
            f"is gone: it cannot be resumed. Evaluate it with --model {folder}, or give --overwrite to begin anew."
        )
    before, now = settings(record, read_config(folder)), settings(facts, cfg)
    if refused := refusals(before, now):
        raise UserError(
            f"{folder} holds a run with another {join_words(refused)}. Give another --out-dir, or --overwrite to "
            "begin anew there."
        )
    try:
        loop_state = LoopState.from_json(read_json(folder / "checkpoints" / str(steps[-1]) / "state.json")["state"])
    except (OSError, KeyError, TypeError, ValueError):
        loop_state = LoopState()  # damaged: `restore` reports it, and finds the one before
    return PreviousRun(folder, record, loop_state, differences(before, now))


def refuse_other_order(previous: PreviousRun) -> None:
    """Raises UserError for a run that read its data in another order than this version's: it would read some of it twice."""
    if previous.record.get("order") != epoch_order.VERSION:
        raise UserError(
            f"{previous.folder} holds a run whose batches came in the order of another version: it cannot be resumed. "
            f"Evaluate, tune or export it with --model {previous.folder}, or give --overwrite to begin anew."
        )


def recorded_batch(folder: Path, overwrite: bool) -> int | None:
    """Returns the batch of the run in the folder that would be resumed; None when there is none."""
    if overwrite or not checkpoint.steps(folder):
        return None
    return leaf_paths(read_json(folder / "run.json")).get("recipe/batch")


# What a resumed run may not change, by its path in run.json, and its name; of the architecture, all that CONFIG_MAY_CHANGE
# does not name. All else may change, and is noted in run.json.
FIXED = {
    "text/digest": "text", "tokenizer/digest": "tokenizer", "seed": "seed", "recipe/batch": "batch",
    "recipe/context": "context", "recipe/optimizer/kind": "optimizer", "base/digest": "base",
    "learns": "choice of trainable parameters", "objective": "objective", "pack": "packing", "stage": "stage",
}  # fmt: skip
SPLIT = " or split of it (earlier versions held out the last tenth: give both parts with --data and --validation)"
CONFIG_MAY_CHANGE = {f"config/{name}" for name in ("dtype", "scan", "remat", "context")}
OPTIONAL = {"base/digest", "learns", "objective", "pack", "stage"}  # not every run has them
# Fields that an older run.json does not have, and what its run did.
ADDED = {"recipe/optimizer/embedding_factor": 1.0, "recipe/optimizer/head_factor": 1.0}
NOT_COMPARED = re.compile("(command|changes|result|skipped_batches)(/.*)?")  # the flags in the command are compared one by one


def settings(facts: dict[str, Any], cfg: ModelConfig) -> dict[str, Any]:
    """Returns all that is compared, {path in run.json: value}; `config/...` is the architecture's."""
    leaves = leaf_paths(json.loads(json.dumps(facts)) | {"config": json.loads(json.dumps(cfg.to_json()))})
    return {path: value for path, value in leaves.items() if not NOT_COMPARED.fullmatch(path)}


def differences(before: dict[str, Any], now: dict[str, Any]) -> Changes:
    """Returns the settings that differ. What an older run.json does not tell is not known to have changed."""
    before = {path: value for path, value in ADDED.items() if path in now} | before
    paths = dict.fromkeys([*before, *FIXED, *(path for path in now if path.startswith("config/"))])
    return {path: (before.get(path), now.get(path)) for path in paths if before.get(path) != now.get(path)}


def refusals(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Returns what differs and may not: `width (256 there, 384 now)`."""
    if FIXED.keys() - OPTIONAL - before.keys():
        raise UserError("run.json there is damaged. Give another --out-dir, or --overwrite to begin anew.")
    changes, refused = differences(before, now), []
    for path, values in changes.items():
        name = path.removeprefix("config/") if path.startswith("config/") else FIXED.get(path)
        if not name or path in CONFIG_MAY_CHANGE or (name == "text" and "seed" in changes):  # the text follows the seed
            continue
        if path.endswith("/digest"):
            sources = (f"{name}/{part}" for part in ("data", "kind", "model"))
            path = next((source for source in sources if before.get(source) or now.get(source)), path)
            values = before.get(path), now.get(path)
        if name == "text" and now.get("objective") and values[0] == values[1]:
            name += SPLIT
        refused.append(f"{name} ({values[0]} there, {values[1]} now)" if values[0] != values[1] else name)
    return refused


def describe_changes(changes: Changes) -> list[str]:
    """Returns lines: `learning_rate: 0.003 -> 0.01`."""
    lines = {path: f"{path.rpartition('/')[2]}: {before} -> {now}" for path, (before, now) in changes.items()}
    if "text/validation_digest" in lines:
        lines["text/validation_digest"] = "what is in the validation data"
    return [*lines.values()]


def restore(
    previous: PreviousRun, cfg: ModelConfig, make_state: Callable[[Any], TrainState], split: TrainableSplit, console: Console
) -> tuple[TrainState, LoopState]:
    """Returns the states of the newest intact checkpoint; prints what was damaged.

    `make_state` makes the state before the first step, of which only the shapes are used.
    """
    like = sharded_shapes(lambda: (split.to_saved((state := make_state(split.trainable)).trainable), state.opt_state))
    with console.task("loading the checkpoint"):
        loaded = checkpoint.load(previous.folder, *like)
    loop_state = LoopState.from_json(loaded.state)
    aside = checkpoint.rename_newer(previous.folder, loop_state.step) if loaded.damaged else []
    lines = [f"damaged: {line}" for line in loaded.damaged] + [f"set aside: {path}" for path in aside]
    if (best := loop_state.best_step) not in (None, loop_state.step):
        faults = manifest.verify(previous.folder / "checkpoints" / str(best)) if processes.is_first() else []
        if faults := json.loads(processes.gather_strings(json.dumps(faults))[0]):
            lines += [*(f"damaged: {line}" for line in faults), f"forgotten: step {best:,} was the best; the next best is kept"]
            loop_state.best = loop_state.best_step = None
    for line in lines:
        console.print(line, style="yellow")
    instead = " (the newest intact one)" if loaded.damaged else ""
    console.print(f"resumed at step {loop_state.step:,}{instead}, {duration(loop_state.seconds)} into training")
    trainable, optimizer = from_file_order(cfg, (split.from_saved(loaded.params), loaded.optimizer))
    return TrainState(place(cfg, jnp.int32(loop_state.step)), trainable, optimizer), loop_state
