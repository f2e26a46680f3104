"""Checkpoints to test with: one of every kind of leaf, and ones so small that hundreds can be made."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax

from engine.storage.checkpoint import LoadedCheckpoint, load, save_in_parts
from engine.storage.digest import digest


def save(folder: Path, step: int, params, optimizer, state, *, keep: int = 3, best: int | None = None) -> Path:
    """Saves at once; returns the path."""
    return [*save_in_parts(folder, step, params, optimizer, state, keep=keep, best=best)][-1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Int8:
    values: jax.Array
    scale: jax.Array


def make_params(seed: int) -> dict:
    """Every bfloat16, three NaNs, a -0.0, a 0-d array, a node that is no dict, layers named out of order."""
    draw = np.random.default_rng(seed)
    layers = {name: {"qkv": draw.normal(size=(5, 7)), "norm": np.full(5, -0.0)} for name in ("0", "1", "10")}
    return {
        "layers": jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), layers),
        "embedding": jnp.asarray(np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16).reshape(256, 256)),
        "quantized": Int8(jnp.asarray(draw.integers(-128, 127, (3, 2)), jnp.int8), jnp.ones(2)),
        "nans": jnp.asarray(np.asarray([0x7FC00001, 0xFFC12345, 0x7F800001], np.uint32).view(np.float32)),
        "seed": jnp.int32(seed),
    }


def make_optimizer(seed: int) -> dict:
    """Returns what an optax state holds (named tuples, empty states, masked leaves, a count), a PRNG key's data and a flag."""
    weights = {"w": jnp.full((4, 3), seed + 0.1), "frozen": jnp.ones(2)}
    adamw = optax.adamw(optax.linear_schedule(1.0, 0.0, 9), mu_dtype=jnp.bfloat16)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.masked(adamw, {"w": True, "frozen": False}))
    _, state = tx.update(weights, tx.init(weights), weights)
    return {"tx": state, "key": jax.random.key_data(jax.random.key(seed)), "finite": jnp.asarray(True)}


MODEL = jax.eval_shape(lambda: (make_params(0), make_optimizer(0)))
STATE = {"data": {"epoch": 2, "offset": 12345}, "best": 0.1 + 0.2, "words": "é\n"}


def save_model(folder: Path, step: int, **options) -> Path:
    return save(folder, step, make_params(step), make_optimizer(step), STATE, **options)


def tiny(step: int) -> tuple[dict, tuple]:
    return {"w": jnp.arange(6.0).reshape(2, 3) + step}, ({"m": jnp.full(3, step, jnp.bfloat16)},)


def save_tiny(folder: Path, step: int, **options) -> Path:
    """Saves a checkpoint so small that hundreds can be made; each step has other values."""
    return save(folder, step, *tiny(step), {"at": step}, **options)


def load_tiny(folder: Path) -> LoadedCheckpoint:
    return load(folder, *jax.eval_shape(lambda: tiny(0)))


def same_bits(first, second) -> bool:
    return jax.tree.structure(first) == jax.tree.structure(second) and digest(first) == digest(second)


def is_step(loaded: LoadedCheckpoint, step: int) -> bool:
    """`loaded` is, in all its parts, what `save_tiny` wrote for `step`."""
    same = same_bits((loaded.params, loaded.optimizer), tiny(step))
    return same and loaded.step == loaded.state["at"] == int(loaded.path.name) == step


def hidden(folder: Path) -> list[str]:
    return [entry.name for entry in (folder / "checkpoints").iterdir() if entry.name.startswith(".")]
