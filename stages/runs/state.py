"""Whether a run can go on in a folder, and the state it goes on from."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from engine import format as words
from engine.errors import UserError
from engine.files import write_json
from engine.model.config import ModelConfig
from engine.model.transformer import init_params
from engine.storage import checkpoint
from engine.text.tokenizer import Tokenizer
from engine.training.step import TrainState
from engine.storage.run_folder import read_config, read_json
from stages.runs import folder as run_folder
from stages.cli.console import Console
from stages.runs.loop import LoopState
from stages.runs.estimate import Plan


@dataclasses.dataclass(frozen=True)
class PreviousRun:
    """A run that is there: what run.json says, and where its newest checkpoint stands."""

    folder: Path
    run: dict[str, Any]
    past: LoopState

    def finished(self, plan: Plan) -> bool:
        return plan.done(self.past.step, self.past.seconds) >= 1

    def sound(self) -> bool:
        """Whether the newest checkpoint is what was written."""
        return not checkpoint.verify(self.folder / "checkpoints" / str(self.past.step))


def find_previous_run(folder: Path, facts: dict[str, Any], cfg: ModelConfig, overwrite: bool) -> PreviousRun | None:
    """The run in the folder that is to go on; None when there is none, or `overwrite` says to forget it.

    Raises UserError when the one there learns something else, naming what differs.
    """
    if overwrite or not run_folder.holds_run(folder):
        return None
    run = read_json(folder / "run.json")
    if not checkpoint.steps(folder):
        return None  # stopped before its first checkpoint: nothing to go on from, nothing to lose
    differing = differences(run, facts, read_config(folder), cfg)
    if differing:
        raise UserError(
            f"{folder} holds a run with another {words.listed(differing)}. Give another --out-dir, or --overwrite to "
            "begin anew there."
        )
    newest = checkpoint.steps(folder)[-1]
    try:
        state = read_json(folder / "checkpoints" / str(newest) / "state.json")["state"]
        past = loop_state_of(state)
    except (UserError, KeyError, TypeError):
        past = LoopState()  # damaged: loading will say so, and find the one before
    return PreviousRun(folder, run, past)


def differences(old: dict[str, Any], new: dict[str, Any], old_cfg: ModelConfig, cfg: ModelConfig) -> list[str]:
    """`width (256 there, 384 now)`: what must be the same for a run to go on, and is not."""
    found = [_differing(name, getattr(old_cfg, name), getattr(cfg, name)) for name in old_cfg.same_architecture(cfg)]
    try:
        pairs = {
            "text": (old["text"]["digest"], new["text"]["digest"]),
            "tokenizer": (old["tokenizer"]["digest"], new["tokenizer"]["digest"]),
            "seed": (old["seed"], new["seed"]),
            "batch": (old["recipe"]["batch"], new["recipe"]["batch"]),
            "context": (old["recipe"]["context"], new["recipe"]["context"]),
            "optimizer": (old["recipe"]["optimizer"]["kind"], new["recipe"]["optimizer"]["kind"]),
            "base": (old.get("base", {}).get("digest"), new.get("base", {}).get("digest")),
            "choice of what learns": (old.get("learns"), new.get("learns")),
            "objective": (old.get("objective"), new.get("objective")),
        }
    except (KeyError, TypeError, AttributeError):
        raise UserError("run.json there is damaged. Give another --out-dir, or --overwrite to begin anew.") from None
    for name, (there, now) in pairs.items():
        if there != now:
            if name in ("text", "tokenizer", "base"):
                there, now = (_named(run.get(name, {})) for run in (old, new))
            found.append(_differing(name, there, now))
    return found


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What a run may go on with although it is not as it was, such as the learning rate: `learning_rate: 0.003 -> 0.01`."""
    there, now = (_flat({"recipe": run.get("recipe"), "validation": run["text"].get("validation")}) for run in (old, new))
    return [f"{name}: {there.get(name)} -> {now.get(name)}" for name in now if there.get(name) != now.get(name)]


def _flat(value: dict[str, Any]) -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, item in value.items():
        leaves |= _flat(item) if isinstance(item, dict) else {name: item}
    return leaves


def _differing(name: str, there: object, now: object) -> str:
    return f"{name} ({there} there, {now} now)" if there != now else name


def _named(described: dict[str, Any]) -> str:
    return str(described.get("data") or described.get("kind") or described.get("model"))


def loop_state_of(state: dict[str, Any]) -> LoopState:
    """The part of state.json that is ours."""
    return LoopState(**{field.name: state[field.name] for field in dataclasses.fields(LoopState)})


def restore(
    before: PreviousRun | None, plan: Plan, begin: Callable[[Any], TrainState], facts: dict[str, Any], console: Console
) -> tuple[TrainState, LoopState]:
    """The state to train from: random weights, or the newest sound checkpoint, said aloud.

    `begin` makes of new weights the state before the first step.
    """
    fresh = lambda: begin(init_params(plan.cfg, jax.random.key(plan.seed)))
    if before is None:
        with console.task("drawing weights"):
            return jax.jit(fresh)(), LoopState()
    like = jax.eval_shape(fresh)
    with console.task("loading the checkpoint"):
        loaded = checkpoint.load(before.folder, None, like.trainable, like.opt_state)
    past = loop_state_of(loaded.state)
    for line in loaded.damaged:
        console.print(f"damaged: {line}", style="yellow")
    if loaded.damaged:
        for path in checkpoint.set_aside(before.folder, past.step):
            console.print(f"set aside: {path}", style="yellow")
    for line in changes(before.run, facts):
        console.print(f"changed: {line}", style="yellow")
    instead = " (the newest that is sound)" if loaded.damaged else ""
    console.print(f"resumed at step {past.step:,}{instead}, {words.duration(past.seconds)} into training")
    return TrainState(jax.numpy.int32(past.step), loaded.params, loaded.optimizer), past


def begin(folder: Path, cfg: ModelConfig, tokenizer: Tokenizer, facts: dict[str, Any], fresh: bool) -> None:
    """Writes what describes the run, before its first step."""
    if fresh:
        run_folder.clear_run(folder)
    tokenizer.save(folder / "tokenizer")
    write_json(folder / "config.json", cfg.to_json())
    run_folder.write_run_json(folder, facts)
