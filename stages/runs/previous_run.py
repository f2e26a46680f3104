"""Finds the previous run in a folder, refuses one that trained something else, and restores it."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from engine.errors import UserError
from engine.format import duration, join_words, quantity
from engine.mesh import processes
from engine.mesh.layout import place, sharded_shapes
from engine.model.config import ModelConfig
from engine.storage import checkpoint_reader
from engine.storage.checkpoint import steps as saved_steps
from engine.storage.checkpoint_reader import find_damage
from engine.storage.run_folder import read_config, read_json
from engine.text.batch import ORDER_VERSION
from engine.training.step import TrainState
from stages.cli.console import Console
from stages.runs.plan import RunPlan
from stages.runs.settings import (
    BEST_CHOSEN_BY,
    Changes,
    describe_changes,
    differences,
    refusals,
    settings,
)
from stages.runs.stage import LoopState, Prepared


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
