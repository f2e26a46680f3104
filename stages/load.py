"""Where a command asks for a model: what `--model` may be, and what comes of it."""

import dataclasses
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.model.config import ModelConfig
from engine.storage import checkpoint
from engine.storage.assets import ASSETS
from engine.text.tokenizer import Tokenizer, load_tokenizer
from stages import run_folder
from stages.console import Console

TODAY = "a run folder (runs/demo-shakespeare) or a step folder in it (runs/demo-shakespeare/checkpoints/1000)"


@dataclasses.dataclass(frozen=True)
class Model:
    """A model to read: float32 weights as they were trained, its tokenizer, and where both are from."""

    cfg: ModelConfig
    params: Any
    tokenizer: Tokenizer
    run: Path
    checkpoint: Path
    damaged: list[str]


def load_model(given: str | None) -> Model:
    """The model `--model` names; by default the run that was saved to last.

    Raises UserError when there is none, it is damaged, or it is of a kind that cannot be read yet.
    """
    path = Path(given).expanduser() if given else run_folder.newest()
    run = _run_of(path, given or str(path))
    cfg = run_folder.read_config(run)
    tokenizer = load_tokenizer(run / "tokenizer")
    if tokenizer.vocab > cfg.vocab:
        raise UserError(
            f"{run / 'tokenizer'} has {tokenizer.vocab:,} tokens and the model {cfg.vocab:,}: one of them was replaced."
        )
    loaded = checkpoint.load_params(path)
    return Model(cfg, loaded.params, tokenizer, run, loaded.path, loaded.damaged)


def _run_of(path: Path, given: str) -> Path:
    """The run folder that a path lies in."""
    if (path / "checkpoints").is_dir() and (path / "run.json").exists():
        return path
    if (path / "params").is_dir() and path.parent.name == "checkpoints":
        return path.parent.parent
    if (path / "run.json").exists():
        raise UserError(f"{path} has no checkpoint yet: its run was stopped before the first one was saved.")
    if given in ASSETS or path.suffix == ".gguf" or (path / "model.safetensors").exists():
        raise UserError(f"{given} cannot be read as a model yet; --model takes {TODAY}.")
    if path.exists():
        raise UserError(f"{path} holds no model that is known here; --model takes {TODAY}.")
    raise UserError(f"There is no model at {path}; --model takes {TODAY}.")


def say_damaged(model: Model, console: Console) -> None:
    """Names what was passed over on the way to a sound checkpoint."""
    for line in model.damaged:
        console.say(f"damaged: {line}", style="yellow")
    if model.damaged:
        console.say(f"using {model.checkpoint} instead", style="yellow")
