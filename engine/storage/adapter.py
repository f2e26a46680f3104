"""An adapter on disk: what was learnt about one model, as a file of its own that knows which model that was.

FOLDER/adapter.safetensors    PATH.a and PATH.b of every adapted matrix, float32
       adapter.json           the base's digest; each matrix's scale and columns; what else the caller noted
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from engine.errors import UserError
from engine.files import whole_folder
from engine.model.paths import leaf_paths, unflatten
from engine.model.weights.lora import LoRA
from engine.storage.huggingface.safetensors import read_header, read_rows, write_file

WEIGHTS, ABOUT = "adapter.safetensors", "adapter.json"
VERSION = 1


class Adapter(NamedTuple):
    """A tree of LoRA leaves without a base, the digest of the base they were learnt about, and the caller's notes."""

    adapters: dict[str, Any]
    base: str
    about: dict[str, Any]


def save_adapter(folder: Path, adapters: dict[str, Any], *, base: str, about: dict[str, Any] | None = None) -> Path:
    """Writes the folder, whole or not at all, in place of one that is there; returns it.

    `base` is the digest of the params as they were loaded. Raises ValueError for leaves that are not adapters.
    """
    leaves = leaf_paths(adapters)
    others = [path for path, leaf in leaves.items() if not isinstance(leaf, LoRA)]
    if others or not leaves:
        raise ValueError(f"An adapter holds LoRA leaves only; {others or 'nothing'} came.")
    arrays = {f"{path}.{side}": np.asarray(getattr(leaf, side), np.float32) for path, leaf in leaves.items() for side in "ab"}
    described = {path: {"scale": leaf.scale, "columns": leaf.columns} for path, leaf in leaves.items()}
    with whole_folder(folder) as building:
        announced = {name: (array.shape, array.dtype) for name, array in arrays.items()}
        write_file(building / WEIGHTS, announced, arrays.__getitem__)
        text = json.dumps({"version": VERSION, "base": base, "leaves": described, "about": about or {}}, indent=1)
        (building / ABOUT).write_text(text, encoding="utf-8")
    return folder


def load_adapter(folder: Path, *, base: str | None = None) -> Adapter:
    """What `save_adapter` wrote; with `base`, only if it was learnt about the model of that digest.

    Raises UserError when there is none, it is damaged, or it belongs to another model.
    """
    if not (folder / ABOUT).is_file() or not (folder / WEIGHTS).is_file():
        raise UserError(f"There is no adapter at {folder}: it has no {ABOUT} and {WEIGHTS}.")
    try:
        said = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        learnt_about, described, about, version = said["base"], said["leaves"], said["about"], said["version"]
        if not (isinstance(learnt_about, str) and isinstance(described, dict) and isinstance(about, dict)):
            raise TypeError("its base, leaves and about are not a text and two objects")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / ABOUT} is damaged: {error!r}. Restore it, or learn it again.") from None
    if version != VERSION:
        raise UserError(f"{folder / ABOUT} is of version {version}; this is {VERSION}.")
    if base is not None and learnt_about != base:
        raise UserError(
            f"The adapter {folder} was learnt about another model: its base has the digest {learnt_about[:16]}, "
            f"this one {base[:16]}. It was {about.get('model', 'not named')}."
        )
    stored = read_header(folder / WEIGHTS)
    try:
        leaves = {path: _leaf(stored, path, entry) for path, entry in described.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder} is damaged: its two files do not fit each other ({error!r}).") from None
    if len(stored) != 2 * len(leaves) or not leaves:
        raise UserError(f"{folder} is damaged: {len(stored)} tensors are there for {len(leaves)} adapted matrices.")
    return Adapter(unflatten(leaves), learnt_about, about)


def _leaf(stored: dict[str, Any], path: str, entry: dict[str, Any]) -> LoRA:
    a, b = (read_rows(one, 0, one.shape[0]) for one in (stored[f"{path}.a"], stored[f"{path}.b"]))
    columns = tuple((int(start), int(stop)) for start, stop in entry["columns"])
    edges = [edge for span in columns for edge in span]
    if not columns or edges != sorted(edges) or edges[0] < 0 or not all(start < stop for start, stop in columns):
        raise ValueError(f"{path} has columns {columns}")
    if not (math.isfinite(entry["scale"]) and np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError(f"{path} has a number that is not finite")
    width = sum(stop - start for start, stop in columns)
    if a.ndim != 2 or b.ndim != 2 or b.shape[1] != width or a.shape[1] != b.shape[0] * len(columns):
        raise ValueError(f"{path} has a of {a.shape} and b of {b.shape} for columns {columns}")
    return LoRA(None, jnp.asarray(a), jnp.asarray(b), float(entry["scale"]), columns)
