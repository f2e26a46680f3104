"""The model that is measured: a preset with random weights, or one that `--model` names; and tokens to measure it with."""

import dataclasses
from pydoc_data.topics import topics  # chapters of Python's reference, on every machine
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engine.errors import UserError
from engine.model.config import ModelConfig
from engine.model.paths import leaf_paths, unflatten
from engine.model.transformer import init_params
from engine.storage.find import load_model, locate


@dataclasses.dataclass(frozen=True)
class BenchModel:
    """A model to measure: its name, float32 weights, and its tokenizer; None for random weights."""

    name: str
    cfg: ModelConfig
    params: Any
    tokenizer: Any = None


def random_model(name: str, cfg: ModelConfig) -> BenchModel:
    """Returns a preset with random matrices and biases, those that training starts at zero too: a model whose blocks add
    nothing would hide every difference between one way of running it and another."""

    def init(key: Any) -> Any:
        leaves = leaf_paths(init_params(cfg, key))
        return unflatten(
            {path: leaf_of(path, leaf, jax.random.fold_in(key, n)) for n, (path, leaf) in enumerate(leaves.items())}
        )

    def leaf_of(path: str, leaf: Any, key: Any) -> Any:
        if path.endswith("norm"):
            return leaf
        inputs = leaf.shape[1 if path == "embed" else 0]
        return jax.random.normal(key, leaf.shape, jnp.float32) * (inputs**-0.5 if leaf.ndim == 2 else 0.05)

    return BenchModel(name, cfg, jax.jit(init)(jax.random.key(0)))


def load(name: str) -> BenchModel:
    """Loads the model `--model` names, in float32. Raises UserError when there is none, or it is an adapter for another."""
    location = locate(name)
    if location.form == "adapter":
        raise UserError(
            f"{location.run} holds an adapter for another model. Fold it into that one first, python -m stages.export "
            f"--model {location.run} --out FOLDER, and give --model FOLDER."
        )
    model = load_model(name, dtype="float32")
    return BenchModel(model.name, model.cfg, model.params, model.tokenizer)


def tokens_for(model: BenchModel, rows: int, length: int) -> np.ndarray:
    """Returns tokens (rows, length) int32 to measure with: English, for a model with a tokenizer, else random ones."""
    if model.tokenizer is None:
        return np.random.default_rng(0).integers(0, model.cfg.vocab, (rows, length), dtype=np.int32)
    tokens = model.tokenizer.encode("\n".join(topics.values())[: 16 * rows * length])
    return np.resize(tokens, (rows, length)).astype(np.int32)
