"""Finds the previous run in a folder, and restores its newest checkpoint."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from engine import distributed
from engine.errors import UserError
from engine.files import remove_unfinished
from engine.format import duration, join_words
from engine.model.config import ModelConfig
from engine.model.paths import leaf_paths
from engine.placement import place, sharded_shapes
from engine.storage import checkpoint, manifest
from engine.storage.run_folder import read_config, read_json
from engine.text import epoch_order
from engine.training.step import TrainState
from stages.cli.console import Console
from stages.runs.folder import holds_run
from stages.runs.loop_state import LoopState
from stages.runs.mesh import from_file_order
from stages.runs.trainable import TrainableSplit


@dataclasses.dataclass(frozen=True)
class PreviousRun:
    """The run in a folder: its run.json, and its newest checkpoint's LoopState."""

    folder: Path
    record: dict[str, Any]
    loop_state: LoopState

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
    remove_unfinished(folder / "checkpoints")  # puts back the only checkpoint, if a kill came while it was replaced
    record, steps = read_json(folder / "run.json"), checkpoint.steps(folder)
    if not steps:
        return None  # stopped before its first checkpoint
    if differing := _differences(record, facts, read_config(folder), cfg):
        raise UserError(
            f"{folder} holds a run with another {join_words(differing)}. Give another --out-dir, or --overwrite to "
            "begin anew there."
        )
    try:
        loop_state = LoopState.from_json(read_json(folder / "checkpoints" / str(steps[-1]) / "state.json")["state"])
    except (OSError, KeyError, TypeError, ValueError):
        loop_state = LoopState()  # damaged: `restore` reports it, and finds the one before
    return PreviousRun(folder, record, loop_state)


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


# What must be the same to resume a run, and where run.json says it.
MUST_MATCH = {
    "text": "text/digest", "tokenizer": "tokenizer/digest", "seed": "seed", "batch": "recipe/batch",
    "context": "recipe/context", "optimizer": "recipe/optimizer/kind", "base": "base/digest",
    "choice of trainable parameters": "learns", "objective": "objective", "packing": "pack", "stage": "stage",
}  # fmt: skip
SPLIT = " or split of it (earlier versions held out the last tenth: give both parts with --data and --validation)"
OPTIONAL = {"base/digest", "learns", "objective", "pack", "stage"}
# Fields that an older run.json does not have, and what its run did.
ADDED = {"recipe/optimizer/embedding_factor": 1.0, "recipe/optimizer/head_factor": 1.0}
NOT_COMPARED = re.compile("(command|changes|result)(/.*)?")  # the flags in the command are compared one by one


def _differences(old: dict[str, Any], new: dict[str, Any], old_cfg: ModelConfig, cfg: ModelConfig) -> list[str]:
    """Returns what differs and must not: `width (256 there, 384 now)`."""
    there, now = leaf_paths(old), leaf_paths(new)
    if {*MUST_MATCH.values()} - OPTIONAL - there.keys():
        raise UserError("run.json there is damaged. Give another --out-dir, or --overwrite to begin anew.")
    pairs = [(name, getattr(old_cfg, name), getattr(cfg, name)) for name in old_cfg.architecture_differences(cfg)]
    for name, key in MUST_MATCH.items():
        if there.get(key) == now.get(key) or (name == "text" and there.get("seed") != now.get("seed")):  # it follows the seed
            continue
        if key.endswith("/digest"):
            names = (f"{name}/{part}" for part in ("data", "kind", "model"))
            key = next((other for other in names if there.get(other) or now.get(other)), key)
        name += SPLIT if name == "text" and now.get("objective") and there.get(key) == now.get(key) else ""
        pairs.append((name, there.get(key), now.get(key)))
    return [f"{name} ({before} there, {after} now)" if before != after else name for name, before, after in pairs]


def changed_fields(previous: PreviousRun, facts: dict[str, Any], cfg: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """Returns what a run may change and did, {path in run.json: (before, now)}; `config/...` is the architecture's.

    What run.json did not tell in an earlier version is not known to have changed.
    """
    before, now = (
        leaf_paths({**fields, "config": config.to_json()})
        for fields, config in ((previous.record, read_config(previous.folder)), (json.loads(json.dumps(facts)), cfg))
    )
    before = {name: value for name, value in ADDED.items() if name in now} | before
    same = lambda name: name not in before or NOT_COMPARED.fullmatch(name) or before[name] == now.get(name)
    return {name: (before.get(name), now.get(name)) for name in before if not same(name)}


def describe_changes(changes: dict[str, tuple[Any, Any]]) -> list[str]:
    """Returns lines: `learning_rate: 0.003 -> 0.01`."""
    lines = {name: f"{name.rpartition('/')[2]}: {before} -> {now}" for name, (before, now) in changes.items()}
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
        faults = manifest.verify(previous.folder / "checkpoints" / str(best)) if distributed.is_first() else []
        if faults := json.loads(distributed.gather_strings(json.dumps(faults))[0]):
            lines += [*(f"damaged: {line}" for line in faults), f"forgotten: step {best:,} was the best; the next best is kept"]
            loop_state.best = loop_state.best_step = None
    for line in lines:
        console.print(line, style="yellow")
    instead = " (the newest intact one)" if loaded.damaged else ""
    console.print(f"resumed at step {loop_state.step:,}{instead}, {duration(loop_state.seconds)} into training")
    trainable, optimizer = from_file_order(cfg, (split.from_saved(loaded.params), loaded.optimizer))
    return TrainState(place(cfg, jnp.int32(loop_state.step)), trainable, optimizer), loop_state
