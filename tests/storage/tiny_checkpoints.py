"""Checkpoints so small that hundreds can be made; each step has other values."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from engine.storage import checkpoint, checkpoint_reader
from engine.storage.checkpoint import BackgroundSaver
from engine.storage.checkpoint_reader import LoadedCheckpoint
from engine.storage.digest import digest


def save(
    folder: Path,
    step: int,
    params: Any,
    optimizer: Any,
    state: Any,
    *,
    keep: int = 3,
    best: int | None = None,
) -> Path:
    """Saves at once; returns the path."""
    with BackgroundSaver(folder, keep) as saver:
        saver.save(step, params, optimizer, state, best)
    return folder.absolute() / "checkpoints" / str(step)


def tiny(step: int) -> tuple[dict, tuple]:
    return {"w": np.arange(6, dtype=np.float32).reshape(2, 3) + step}, (
        {"m": np.full(3, step, jax.dtypes.bfloat16)},
    )


def write_tiny(folder: Path, step: int, keep: int = 3) -> Path:
    """Saves without starting JAX, so that a process may fork before."""
    params, (moments,) = tiny(step)
    return checkpoint.write(
        folder, step, {"params": params, "optimizer": {"0/m": moments["m"]}}, {"at": step}, keep=keep
    )


def load_tiny(folder: Path) -> LoadedCheckpoint:
    return checkpoint_reader.load(folder, *jax.eval_shape(lambda: jax.tree.map(jax.numpy.asarray, tiny(0))))


def load_params(path: Path) -> LoadedCheckpoint:
    """Loads params of any model."""
    return checkpoint_reader.load_params(path, lambda *_: None)


def same_bits(first: Any, second: Any) -> bool:
    return jax.tree.structure(first) == jax.tree.structure(second) and digest(first) == digest(second)


def is_step(loaded: LoadedCheckpoint, step: int) -> bool:
    """`loaded` is, in all its parts, what `write_tiny` wrote for `step`."""
    same = same_bits((loaded.params, loaded.optimizer), tiny(step))
    return same and loaded.step == loaded.state["at"] == int(loaded.path.name) == step


def hidden(folder: Path) -> list[str]:
    return [entry.name for entry in (folder / "checkpoints").iterdir() if entry.name.startswith(".")]
