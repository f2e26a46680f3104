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
        """Whether nothing is left to do: the run is over, has a result, --keep-last is what it was,
        and its last and its best checkpoint are intact."""
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


# Settings that every run.json has, and that a resumed run may not change: path in run.json -> name.
ALWAYS_THERE = {
    "text/digest": "text",
    "tokenizer/digest": "tokenizer",
    "seed": "seed",
    "recipe/batch": "batch",
    "recipe/context": "context",
    "recipe/optimizer/kind": "optimizer",
}
# All settings that a resumed run may not change, but for those of the architecture (`config/...`).
# Any other setting may change, and run.json notes that it did.
FIXED = ALWAYS_THERE | {
    "base/digest": "base",
    "learns": "choice of trainable parameters",
    "objective": "objective",
    "pack": "packing",
    "stage": "stage",
    "continues": "adapter to continue",
    "mixed_in": "number of general questions mixed in",
}
# Settings of the architecture that a resumed run may change.
CONFIG_MAY_CHANGE = {f"config/{name}" for name in ("dtype", "scan", "remat", "context")}
# Settings that are named like the flag that sets them. A change of one is shown as that flag.
SET_BY_FLAG = re.compile(
    "(recipe|rollout|update)/.*"
    "|config/dtype"
    "|steps|loss|beta|full_loss|keep_last|metric.*|general|no_mix|template"
    "|text/(data|validation)"
)
# Settings that are derived from flags. A change of one is not shown, as that of the flag is.
DERIVED = {"least_steps", "config/scan", "config/remat"}
# Settings that the best checkpoint is chosen by. When one changes, the best is forgotten: its loss
# by the old settings cannot be compared with losses by the new ones.
BEST_CHOSEN_BY = {"text/validation", "text/validation_digest", "loss", "beta"}
# Paths in run.json that are not settings. The flags in `command` give settings, which are compared.
NOT_COMPARED = re.compile("(command|changes|result|general_answers)(/.*)?")


def settings(metadata: dict[str, Any], cfg: ModelConfig) -> dict[str, Any]:
    as_read = json.loads(json.dumps({**metadata, "config": cfg.to_json()}))
    leaves = leaf_paths(as_read)
    return {path: value for path, value in leaves.items() if not NOT_COMPARED.fullmatch(path)}


def differences(before: dict[str, Any], now: dict[str, Any]) -> Changes:
    """Returns the settings that differ.

    Leaves out one that only `now` has, unless it is in FIXED or the architecture's: an older version
    did not write it, so whether it changed is not known.
    """
    architecture = [path for path in now if path.startswith("config/")]
    changes = {}
    for path in dict.fromkeys([*before, *FIXED, *architecture]):
        if before.get(path) != now.get(path):
            changes[path] = (before.get(path), now.get(path))
    return changes


def refusals(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Returns a phrase for each setting that differs and may not: `width (256 there, 384 now)`.

    Raises UserError for a damaged run.json, which lacks a setting of ALWAYS_THERE.
    """
    if ALWAYS_THERE.keys() - before.keys():
        raise UserError("run.json there is damaged. Give another --out-dir, or --overwrite to begin anew.")
    changes = differences(before, now)
    refused = []
    for path in changes:
        if path in CONFIG_MAY_CHANGE:
            continue
        if path in FIXED:
            name = FIXED[path]
        elif path.startswith("config/"):
            name = path.removeprefix("config/")
        else:
            continue
        if path == "text/digest" and "seed" in changes:  # the text follows the seed
            continue
        shown_path = _shown_path(path, before, now)
        value_before = before.get(shown_path)
        value_now = now.get(shown_path)
        if value_before != value_now:
            refused.append(f"{name} ({value_before} there, {value_now} now)")
        elif shown_path.endswith(("/data", "/model")):  # the digest alone differs
            refused.append(f"{name} (what is read from {value_before} has changed)")
        else:
            refused.append(name)
    return refused


def _shown_path(path: str, before: dict[str, Any], now: dict[str, Any]) -> str:
    """Returns the setting whose values tell people how the setting `path` differs.

    For a digest that is the setting beside it that says what the digest is of (`text/data` for
    `text/digest`), if there is one. Else it is `path` itself.
    """
    if not path.endswith("/digest"):
        return path
    parent = path.removesuffix("/digest")
    for part in ("data", "kind", "model"):
        described = f"{parent}/{part}"
        if before.get(described) or now.get(described):
            return described
    return path


def describe_changes(changes: Changes) -> list[str]:
    lines = []
    for path, (before, now) in changes.items():
        if path == "text/validation_digest":
            lines.append("what is in the validation data")
        elif path == "max_seconds":
            lines.append(f"--max-time: {_time_limit(before)} -> {_time_limit(now)}")
        elif path == "attention":
            lines.append(
                f"attention {before} -> {now}: "
                f"the next steps are those {before} within rounding, not to the bit"
            )
        elif path not in DERIVED:
            name = path.rpartition("/")[2]
            if SET_BY_FLAG.fullmatch(path):
                name = f"--{name.replace('_', '-')}"
            lines.append(f"{name}: {before} -> {now}")
    return lines


def _time_limit(seconds: float | None) -> str:
    if seconds is None:
        return "none"
    return duration(seconds)


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
    """Returns the loop's state in a checkpoint. Raises UserError for a state that is damaged, or of
    another step."""
    with contextlib.suppress(KeyError, TypeError, ValueError):
        loop_state = LoopState.from_json(loaded.state)
        if loop_state.step == loaded.step:
            return loop_state
    raise UserError(
        f"{loaded.path / 'state.json'} is damaged: "
        f"it does not say the state of a run at step {loaded.step:,}."
    )


def _forget_damaged_best(folder: Path, loop_state: LoopState) -> list[str]:
    """Has the loop forget its best checkpoint if that is damaged. Returns lines that say so.

    Process 0 looks for damage, and tells the other processes.
    """
    best = loop_state.best_step
    if best is None or best == loop_state.step:  # `resume` has loaded the one of this step
        return []
    own_faults: list[str] = []
    if processes.is_first():
        own_faults = find_damage(folder / "checkpoints" / str(best))
    faults = json.loads(processes.gather_strings(json.dumps(own_faults))[0])  # process 0's
    if not faults:
        return []
    loop_state.forget_best()
    lines = [f"damaged: {line}" for line in faults]
    lines.append(f"forgotten: step {best:,} was the best; the next best is kept")
    return lines


def resume(
    previous: PreviousRun, prepared: Prepared, metadata: dict[str, Any], console: Console
) -> tuple[TrainState, LoopState]:
    """Returns the states of the newest intact checkpoint; prints what is damaged or changed, and
    adds changes to `metadata`."""

    def saved_parts() -> tuple[Any, Any]:
        state = prepared.initial_state(prepared.trainable)
        return prepared.to_saved(state.trainable), state.opt_state

    params_like, optimizer_like = sharded_shapes(saved_parts)
    adapter_of = None
    if prepared.adapted:
        adapter_of = prepared.plan.cfg
    with console.task("loading the checkpoint"):
        loaded = checkpoint_reader.load(previous.folder, params_like, optimizer_like, adapter_of)
    loop_state = _loop_state(loaded)
    lines = [f"damaged: {line}" for line in loaded.damaged]
    if loaded.damaged:
        aside = checkpoint_reader.rename_newer(previous.folder, loop_state.step)
        lines += [f"set aside: {path}" for path in aside]
    lines += _forget_damaged_best(previous.folder, loop_state)
    for line in lines:
        console.print(line, style="yellow")
    step = f"step {loop_state.step:,}"
    if loaded.damaged:
        step += " (the newest intact one)"
    console.print(f"resumed at {step}, {duration(loop_state.seconds)} into training")
    for line in describe_changes(previous.changes):
        console.print(f"changed: {line}", style="yellow")
    if previous.changes.keys() & BEST_CHOSEN_BY:
        loop_state.forget_best()
    metadata["changes"] = [*previous.record.get("changes", [])]
    if previous.changes:
        metadata["changes"].append({"step": loop_state.step, "fields": previous.changes})
    state = TrainState(
        place(jnp.int32(loop_state.step)), prepared.from_saved(loaded.params), loaded.optimizer
    )
    return state, loop_state
