"""Which model is measured: a preset with drawn weights, or one that is on disk or has a name."""

import dataclasses
from typing import Any

import numpy as np

from engine.errors import UserError
from engine.model.config import ModelConfig


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

    from engine.model.paths import leaf_paths, unflatten
    from engine.model.transformer import init_params

    def draw(key: Any) -> Any:
        leaves = leaf_paths(init_params(cfg, key))
        keys = jax.random.split(key, len(leaves))
        return unflatten({
            path: jax.random.normal(one, leaf.shape, jnp.float32) * leaf.shape[0 if path != "embed" else 1] ** -0.5
            if leaf.ndim == 2 else leaf
            for one, (path, leaf) in zip(keys, leaves.items())
        })  # fmt: skip

    return Measured(name, cfg, jax.jit(draw)(jax.random.key(0)))


def loaded(name: str) -> Measured:
    """Loads the model `--model` names, in float32. Raises UserError when there is none, or it is an adapter for another."""
    from engine.storage.find import load_model, locate

    location = locate(name)
    if location.form == "adapter":
        raise UserError(
            f"{location.run} holds an adapter for another model. Fold it into that one first, python -m stages.export "
            f"--model {location.run} --out FOLDER, and give --model FOLDER."
        )
    model = load_model(name, dtype="float32")
    return Measured(model.name, model.cfg, model.params, model.tokenizer)


def tokens_for(model: Measured, rows: int, length: int) -> np.ndarray:
    """tokens (rows, length) int32 to measure with: English, for a model that reads; drawn ones for drawn weights."""
    if model.tokenizer is None:
        return np.random.default_rng(0).integers(0, model.cfg.vocab, (rows, length), dtype=np.int32)
    from pydoc_data.topics import topics  # chapters of Python's reference, on every machine

    count = rows * length
    read = model.tokenizer.encode("\n".join(topics.values())[: 16 * count])
    return np.resize(read, (rows, length)).astype(np.int32)
