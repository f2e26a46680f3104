"""Which model is measured: a preset with drawn weights, or one that is on disk or has a name."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from engine.errors import UserError, nearest
from engine.model.config import PRESETS, ModelConfig


@dataclasses.dataclass(frozen=True)
class Measured:
    """A model to measure: float32 weights, what to call it, and its tokenizer; None for drawn weights."""

    name: str
    cfg: ModelConfig
    params: Any
    tokenizer: Any = None


def drawn(name: str, cfg: ModelConfig) -> Measured:
    """A preset whose matrices are all drawn at random, those that training starts at zero too: a model whose blocks do
    nothing would hide every difference between one way of running it and another."""
    import jax
    import jax.numpy as jnp

    from engine.model.paths import leaf_paths, nested
    from engine.model.transformer import init_params

    def draw(key: Any) -> Any:
        leaves = leaf_paths(init_params(cfg, key))
        keys = jax.random.split(key, len(leaves))
        return nested({
            path: jax.random.normal(one, leaf.shape, jnp.float32) * leaf.shape[0 if path != "embed" else 1] ** -0.5
            if leaf.ndim == 2 else leaf
            for one, (path, leaf) in zip(keys, leaves.items())
        })  # fmt: skip

    return Measured(name, cfg, jax.jit(draw)(jax.random.key(0)))


def loaded(given: str) -> Measured:
    """The model `--model` names: a run folder, a step folder in it, a Hugging Face folder, a .gguf file or a named asset.

    Raises UserError when there is none.
    """
    from engine.storage import checkpoint
    from engine.storage.gguf import load as gguf
    from engine.storage.huggingface import folder as huggingface
    from engine.text.tokenizer import Tokenizer, load_tokenizer

    path, kind = _found(given)
    if kind == "run":
        run = _run(path)
        return Measured(run.name, _run_config(run), checkpoint.load_params(path).params, load_tokenizer(run / "tokenizer"))
    found = (gguf.load_gguf if kind == "gguf" else huggingface.load_folder)(path, dtype="float32")
    return Measured(found.name, found.cfg, found.params, Tokenizer(found.tokenizer, found.tokenizer_config))


def config_of(given: str) -> ModelConfig:
    """The architecture of the model `--model` names, before any of its weights is read; errors as `loaded`."""
    from engine.storage.gguf import load as gguf
    from engine.storage.huggingface import folder as huggingface

    path, kind = _found(given)
    if kind == "run":
        return _run_config(_run(path))
    return gguf.read_config(path) if kind == "gguf" else huggingface.read_config(path)


def _found(given: str) -> tuple[Path, Literal["gguf", "run", "folder"]]:
    """Where the model lies that `--model` names, and in what form."""
    path = _file(given)
    if path.suffix == ".gguf" and path.is_file():
        return path, "gguf"
    if path.is_dir() and (_run(path) / "checkpoints").is_dir():
        return path, "run"
    if (path / "config.json").is_file():
        return path, "folder"
    known = [*PRESETS, "smollm2-135m-instruct"]
    raise UserError(
        f"There is no model at {given}: --model takes a run folder, a step in it, a Hugging Face folder, a .gguf file or "
        f"smollm2-135m-instruct; a shape with drawn weights is --preset.{nearest(given, known)}"
    )


def _run(path: Path) -> Path:
    """The run folder that a run's or a step's path means."""
    return path.absolute().parents[1] if path.absolute().parent.name == "checkpoints" else path


def _run_config(run: Path) -> ModelConfig:
    """Raises UserError for a run whose config is missing or damaged, or that has learnt an adapter and no model."""
    read = lambda name: json.loads((run / name).read_text(encoding="utf-8"))
    try:
        learns = read("run.json").get("learns", "") if (run / "run.json").exists() else ""
        cfg = ModelConfig.from_json(read("config.json"))
    except (OSError, ValueError, TypeError, AttributeError):
        raise UserError(f"{run} is damaged: its config.json and run.json do not say what model it trained.") from None
    if learns.startswith("rank="):
        raise UserError(
            f"{run} holds an adapter for another model. Fold it into that one first, python -m stages.export --model {run} "
            "--out FOLDER, and give --model FOLDER."
        )
    return cfg


def tokens_for(model: Measured, rows: int, length: int) -> np.ndarray:
    """tokens (rows, length) int32 to measure with: English, for a model that reads; drawn ones for drawn weights."""
    if model.tokenizer is None:
        return np.random.default_rng(0).integers(0, model.cfg.vocab, (rows, length), dtype=np.int32)
    from pydoc_data.topics import topics  # chapters of Python's reference, on every machine

    count = rows * length
    read = model.tokenizer.encode("\n".join(topics.values())[: 16 * count])
    return np.resize(read, (rows, length)).astype(np.int32)


def gguf_file(given: str) -> Path:
    """The .gguf file that `--model` names. Raises UserError when it names none."""
    path = _file(given)
    if path.suffix != ".gguf" or not path.is_file():
        raise UserError(f"There is no .gguf file at {given}; give one, or smollm2-135m-instruct.")
    return path


def _file(given: str) -> Path:
    """A path as it was given, or that of a named model's file, fetched first."""
    from engine.storage import assets

    path = Path(given).expanduser()
    if given not in assets.ASSETS or path.exists():
        return path
    files = assets.fetch(given)
    if "model" not in files:
        raise UserError(f"{given} is a text, not a model. Named model: smollm2-135m-instruct.")
    return files["model"]
