"""Which model is measured: a preset with drawn weights, or one that is on disk or has a name."""

import dataclasses
import json
from pathlib import Path
from typing import Any

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
    from engine.storage import checkpoint, gguf, huggingface
    from engine.text.tokenizer import Tokenizer, load_tokenizer

    path = _file(given)
    if path.suffix == ".gguf" and path.is_file():
        found = gguf.load_gguf(path, dtype="float32")
        return Measured(found.name, found.cfg, found.params, Tokenizer(found.tokenizer, found.tokenizer_config))
    run = path.absolute().parents[1] if path.absolute().parent.name == "checkpoints" else path
    if (run / "checkpoints").is_dir() and path.is_dir():
        cfg = ModelConfig.from_json(json.loads((run / "config.json").read_text(encoding="utf-8")))
        return Measured(run.name, cfg, checkpoint.load_params(path).params, load_tokenizer(run / "tokenizer"))
    if (path / "config.json").is_file():
        found = huggingface.load_folder(path, dtype="float32")
        return Measured(found.name, found.cfg, found.params, Tokenizer(found.tokenizer, found.tokenizer_config))
    known = [*PRESETS, "smollm2-135m-instruct"]
    raise UserError(
        f"There is no model at {given}: --model takes a run folder, a step in it, a Hugging Face folder, a .gguf file or "
        f"smollm2-135m-instruct; a shape with drawn weights is --preset.{nearest(given, known)}"
    )


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
