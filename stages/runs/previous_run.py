"""Finds the previous run in a folder, compares it with the one that would resume it, and restores it."""

import contextlib
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from engine.errors import UserError
from engine.format import duration, join_words, quantity
from engine.mesh import processes
from engine.mesh.layout import place, sharded_shapes
from engine.model.config import ModelConfig
from engine.model.paths import leaf_paths
from engine.storage import checkpoint_reader
from engine.storage.checkpoint import steps as saved_steps
from engine.storage.checkpoint_reader import find_damage
from engine.storage.run_folder import read_config, read_json
from engine.text.batch import ORDER_VERSION
from engine.training.step import TrainState
from stages.cli.console import Console
from stages.runs.plan import RunPlan
from stages.runs.stage import LoopState, Prepared

Changes = dict[str, tuple[Any, Any]]  # path in run.json -> (before, now)


@dataclasses.dataclass(frozen=True)
class PreviousRun:
    """The run in a folder: its run.json, its newest checkpoint's LoopState, and what the run that
    resumes it changes."""

    folder: Path
    record: dict[str, Any]
    loop_state: LoopState
    changes: Changes

    def is_finished(self, is_over: bool) -> bool:
        """Whether a run that is over was measured at its end as now asked, and is intact in what it
        stands for."""
        result = self.record.get("result")
        if not is_over or not result or "keep_last" in self.changes:
            return False
        steps = {self.loop_state.step, result.get("kept_step") or self.loop_state.step}
        return not any(find_damage(self.folder / "checkpoints" / str(step)) for step in steps)


def find_previous_run(folder: Path, metadata: dict[str, Any], cfg: ModelConfig) -> PreviousRun | None:
    """Returns the run in a run folder to resume; None when it was stopped before its first
    checkpoint.

    Raises UserError when the one there trains something else, naming what differs.
    """
    record = read_json(folder / "run.json")
    steps = saved_steps(folder)
    if not steps:
        return None
    before = settings(record, read_config(folder))
    now = settings(metadata, cfg)
    refused = refusals(before, now)
    if refused:
        refuse_other_order(folder, record)
        raise UserError(
            f"{folder} holds a run with another {join_words(refused)}. "
            "Give another --out-dir, or --overwrite to begin anew there."
        )
    newest = folder / "checkpoints" / str(steps[-1])
    try:
        loop_state = LoopState.from_json(read_json(newest / "state.json")["state"])
    except (OSError, KeyError, TypeError, ValueError):
        loop_state = LoopState()  # damaged: `resume` reports it, and finds the one before
    return PreviousRun(folder, record, loop_state, differences(before, now))


def refuse_other_order(folder: Path, record: dict[str, Any]) -> None:
    """Raises UserError for a run that read its data in another order than this version's: it would
    read some of it twice."""
    if record.get("order") != ORDER_VERSION:
        raise UserError(
            f"{folder} holds a run whose batches came in the order of another version: it cannot be resumed. "
            f"Evaluate, tune or export it with --model {folder}, or give --overwrite to begin anew."
        )


# The settings that a resumed run may not change and that every run.json has: path in it -> name.
ALWAYS_THERE = {
    "text/digest": "text",
    "tokenizer/digest": "tokenizer",
    "seed": "seed",
    "recipe/batch": "batch",
    "recipe/context": "context",
    "recipe/optimizer/kind": "optimizer",
}
# All settings that it may not change, beside those of the architecture. Others may, and run.json
# notes it.
FIXED = ALWAYS_THERE | {
    "base/digest": "base",
    "learns": "choice of trainable parameters",
    "objective": "objective",
    "pack": "packing",
    "stage": "stage",
    "continues": "adapter to continue",
    "mixed_in": "number of general questions mixed in",
}
# The settings of the architecture that may change.
CONFIG_MAY_CHANGE = {f"config/{name}" for name in ("dtype", "scan", "remat", "context")}
# Settings whose name is that of a flag, as which a change is shown.
BY_FLAG = re.compile(
    "(recipe|rollout|update)/.*|config/dtype|steps|loss|beta|full_loss|keep_last|metric.*|general|no_mix|template|text/(data|validation)"
)
# Settings that follow from flags which are shown already.
FOLLOWS = {"least_steps", "config/scan", "config/remat"}
# What the best checkpoint is chosen by: one chosen by others would be beaten never, or always.
MEASURES = {"text/validation", "text/validation_digest", "loss", "beta"}
# The flags in `command` are compared one by one, as the settings that they give.
NOT_COMPARED = re.compile("(command|changes|result|general_answers)(/.*)?")


def settings(metadata: dict[str, Any], cfg: ModelConfig) -> dict[str, Any]:
    as_read = json.loads(json.dumps({**metadata, "config": cfg.to_json()}))
    leaves = leaf_paths(as_read)
    return {path: value for path, value in leaves.items() if not NOT_COMPARED.fullmatch(path)}


def differences(before: dict[str, Any], now: dict[str, Any]) -> Changes:
    """Returns the settings that differ. What an older run.json does not tell is not known to have
    changed."""
    architecture = [path for path in now if path.startswith("config/")]
    changes = {}
    for path in dict.fromkeys([*before, *FIXED, *architecture]):
        if before.get(path) != now.get(path):
            changes[path] = (before.get(path), now.get(path))
    return changes


def refusals(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Returns what differs and may not: `width (256 there, 384 now)`."""
    if ALWAYS_THERE.keys() - before.keys():
        raise UserError("run.json there is damaged. Give another --out-dir, or --overwrite to begin anew.")
    changes = differences(before, now)
    refused = []
    for path in changes:
        name = path.removeprefix("config/") if path.startswith("config/") else FIXED.get(path)
        if not name or path in CONFIG_MAY_CHANGE:
            continue
        if name == "text" and "seed" in changes:  # the text follows the seed
            continue
        shown_path = _shown_path(path, name, before, now)
        value_before = before.get(shown_path)
        value_now = now.get(shown_path)
        if value_before != value_now:
            refused.append(f"{name} ({value_before} there, {value_now} now)")
        elif shown_path.endswith(("/data", "/model")):  # the digest alone differs
            refused.append(f"{name} (what is read from {value_before} has changed)")
        else:
            refused.append(name)
    return refused


def _shown_path(path: str, name: str, before: dict[str, Any], now: dict[str, Any]) -> str:
    """Returns the setting whose values tell people how another setting differs: that which says
    what a digest is of, if there is one, else `path` itself."""
    if not path.endswith("/digest"):
        return path
    for part in ("data", "kind", "model"):
        described = f"{name}/{part}"
        if before.get(described) or now.get(described):
            return described
    return path


def describe_changes(changes: Changes) -> list[str]:
    lines = []
    for path, (before, now) in changes.items():
        if path == "text/validation_digest":
            lines.append("what is in the validation data")
        elif path == "max_seconds":
            lines.append(f"--max-time: {before and duration(before)} -> {now and duration(now)}")
        elif path == "attention":
            lines.append(
                f"attention {before} -> {now}: "
                f"the next steps are those {before} within rounding, not to the bit"
            )
        elif path not in FOLLOWS:
            name = path.rpartition("/")[2]
            if BY_FLAG.fullmatch(path):
                name = f"--{name.replace('_', '-')}"
            lines.append(f"{name}: {before} -> {now}")
    return lines


def print_finished(previous: PreviousRun, plan: RunPlan, console: Console) -> None:
    done = previous.loop_state
    summary = previous.record["result"].get("summary", "measured")
    more = "a larger --patience"
    if plan.progress(done.step, done.seconds) >= 1:
        more = f"more --{plan.step_name}s or --max-time"
    console.print(
        f"This run is finished: {quantity(done.step, plan.step_name)} in {duration(done.seconds)}, "
        f"{summary}. To train it further give {more}; to begin anew, --overwrite."
    )
    for line in describe_changes(previous.changes):
        console.print(f"changed, which trains nothing: {line}", style="yellow")


def _loop_state(loaded: checkpoint_reader.LoadedCheckpoint) -> LoopState:
    """Returns the loop's state in a checkpoint. Raises UserError for one that is damaged, or of
    another step."""
    with contextlib.suppress(KeyError, TypeError, ValueError):
        loop_state = LoopState.from_json(loaded.state)
        if loop_state.step == loaded.step:
            return loop_state
    raise UserError(
        f"{loaded.path / 'state.json'} is damaged: "
        f"it does not say the state of a run at step {loaded.step:,}."
    )


def resume(
    previous: PreviousRun, prepared: Prepared, metadata: dict[str, Any], console: Console
) -> tuple[TrainState, LoopState]:
    """Returns the states of the newest intact checkpoint; prints what is damaged or changed, and
    adds changes to `metadata`."""

    def saved_parts() -> tuple[Any, Any]:
        state = prepared.initial_state(prepared.trainable)
        return prepared.to_saved(state.trainable), state.opt_state

    params_like, optimizer_like = sharded_shapes(saved_parts)
    adapter_of = prepared.plan.cfg if prepared.adapted else None
    with console.task("loading the checkpoint"):
        loaded = checkpoint_reader.load(previous.folder, params_like, optimizer_like, adapter_of)
    loop_state = _loop_state(loaded)
    lines = [f"damaged: {line}" for line in loaded.damaged]
    if loaded.damaged:
        aside = checkpoint_reader.rename_newer(previous.folder, loop_state.step)
        lines += [f"set aside: {path}" for path in aside]
    best = loop_state.best_step
    if best is not None and best != loop_state.step:
        own = find_damage(previous.folder / "checkpoints" / str(best)) if processes.is_first() else []
        faults = json.loads(processes.gather_strings(json.dumps(own))[0])  # process 0's
        if faults:
            lines += [f"damaged: {line}" for line in faults]
            lines.append(f"forgotten: step {best:,} was the best; the next best is kept")
            loop_state.forget_best()
    for line in lines:
        console.print(line, style="yellow")
    instead = " (the newest intact one)" if loaded.damaged else ""
    console.print(
        f"resumed at step {loop_state.step:,}{instead}, {duration(loop_state.seconds)} into training"
    )
    for line in describe_changes(previous.changes):
        console.print(f"changed: {line}", style="yellow")
    if previous.changes.keys() & MEASURES:
        loop_state.forget_best()
    metadata["changes"] = [*previous.record.get("changes", [])]
    if previous.changes:
        metadata["changes"].append({"step": loop_state.step, "fields": previous.changes})
    state = TrainState(
        place(jnp.int32(loop_state.step)), prepared.from_saved(loaded.params), loaded.optimizer
    )
    return state, loop_state
