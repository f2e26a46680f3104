"""Whether a run can go on in a folder, and the state it goes on from."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from engine.errors import UserError
from engine.format import duration, listed
from engine.model.config import ModelConfig
from engine.storage import checkpoint
from engine.storage.run_folder import read_config, read_json
from engine.training.step import TrainState
from stages.cli.console import Console
from stages.runs.estimate import RunPlan
from stages.runs.folder import holds_run
from stages.runs.loop import LoopState
from stages.runs.trainable import TrainableParts


@dataclasses.dataclass(frozen=True)
class PreviousRun:
    """The run that is in a folder: its run.json, and where its newest checkpoint stands."""

    folder: Path
    record: dict[str, Any]
    loop_state: LoopState

    def is_finished(self, plan: RunPlan) -> bool:
        """Whether nothing is left to do: it ran to the plan's end, has a result, and its newest checkpoint is sound."""
        state = self.loop_state
        if plan.progress(state.step, state.seconds) < 1 or not self.record.get("result"):
            return False
        return not checkpoint.verify(self.folder / "checkpoints" / str(state.step))


def find_previous_run(folder: Path, facts: dict[str, Any], cfg: ModelConfig, overwrite: bool) -> PreviousRun | None:
    """Returns the run in the folder that is to go on; None when there is none, or `overwrite` says to forget it.

    Raises UserError when the one there trains something else, naming what differs.
    """
    if overwrite or not holds_run(folder):
        return None
    record = read_json(folder / "run.json")
    if not checkpoint.steps(folder):
        return None  # it was stopped before it had saved anything
    differing = differences(record, facts, read_config(folder), cfg)
    if differing:
        raise UserError(
            f"{folder} holds a run with another {listed(differing)}. Give another --out-dir, or --overwrite to "
            "begin anew there."
        )
    newest = checkpoint.steps(folder)[-1]
    try:
        loop_state = _loop_state(read_json(folder / "checkpoints" / str(newest) / "state.json")["state"])
    except (UserError, KeyError, TypeError):
        loop_state = LoopState()  # damaged: loading will say so, and find the one before
    return PreviousRun(folder, record, loop_state)


def differences(old: dict[str, Any], new: dict[str, Any], old_cfg: ModelConfig, cfg: ModelConfig) -> list[str]:
    """Returns what must be the same for a run to go on, and is not: `width (256 there, 384 now)`."""
    differing = [_differing(name, getattr(old_cfg, name), getattr(cfg, name)) for name in old_cfg.same_architecture(cfg)]
    try:
        pairs = {
            "text": (old["text"]["digest"], new["text"]["digest"]),
            "tokenizer": (old["tokenizer"]["digest"], new["tokenizer"]["digest"]),
            "seed": (old["seed"], new["seed"]),
            "batch": (old["recipe"]["batch"], new["recipe"]["batch"]),
            "context": (old["recipe"]["context"], new["recipe"]["context"]),
            "optimizer": (old["recipe"]["optimizer"]["kind"], new["recipe"]["optimizer"]["kind"]),
            "base": (old.get("base", {}).get("digest"), new.get("base", {}).get("digest")),
            "choice of trainable parameters": (old.get("learns"), new.get("learns")),
            "objective": (old.get("objective"), new.get("objective")),
        }
    except (KeyError, TypeError, AttributeError):
        raise UserError("run.json there is damaged. Give another --out-dir, or --overwrite to begin anew.") from None
    for name, (there, now) in pairs.items():
        if there != now:
            if name in ("text", "tokenizer", "base"):
                there, now = (_source_name(record.get(name, {})) for record in (old, new))
            differing.append(_differing(name, there, now))
    return differing


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Returns what may differ in a run that goes on, such as the learning rate, and does: `learning_rate: 0.003 -> 0.01`."""
    there, now = (
        _flat({"recipe": record.get("recipe"), "validation": record["text"].get("validation")}) for record in (old, new)
    )
    return [f"{name}: {there.get(name)} -> {now.get(name)}" for name in now if there.get(name) != now.get(name)]


def _flat(value: dict[str, Any]) -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, item in value.items():
        leaves |= _flat(item) if isinstance(item, dict) else {name: item}
    return leaves


def _differing(name: str, there: object, now: object) -> str:
    return f"{name} ({there} there, {now} now)" if there != now else name


def _source_name(source: dict[str, Any]) -> str:
    return str(source.get("data") or source.get("kind") or source.get("model"))


def _loop_state(record: dict[str, Any]) -> LoopState:
    return LoopState(**{field.name: record[field.name] for field in dataclasses.fields(LoopState)})


def restore(
    previous: PreviousRun, facts: dict[str, Any], make_state: Callable[[], TrainState], parts: TrainableParts, console: Console
) -> tuple[TrainState, LoopState]:
    """Returns the state of the newest sound checkpoint and where the run stands; prints what was damaged or changed.

    `make_state` makes the state before the first step; only its shapes are asked for.
    """
    like = jax.eval_shape(make_state)
    with console.task("loading the checkpoint"):
        loaded = checkpoint.load(previous.folder, None, jax.eval_shape(parts.to_saved, like.trainable), like.opt_state)
    loop_state = _loop_state(loaded.state)
    for line in loaded.damaged:
        console.print(f"damaged: {line}", style="yellow")
    if loaded.damaged:
        for path in checkpoint.set_aside(previous.folder, loop_state.step):
            console.print(f"set aside: {path}", style="yellow")
    for line in changes(previous.record, facts):
        console.print(f"changed: {line}", style="yellow")
    instead = " (the newest that is sound)" if loaded.damaged else ""
    console.print(f"resumed at step {loop_state.step:,}{instead}, {duration(loop_state.seconds)} into training")
    return TrainState(jnp.int32(loop_state.step), parts.from_saved(loaded.params), loaded.optimizer), loop_state
