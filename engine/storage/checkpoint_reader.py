"""Loads checkpoints (`checkpoint.py`): all of one, to resume a run bit for bit, or its weights alone.

Nothing is loaded before its SHA-256 is checked. Any number of processes loads arrays by slice onto
any mesh, whoever wrote them.
"""

import contextlib
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from engine import manifest
from engine.errors import UserError
from engine.files import remove_unfinished
from engine.mesh import processes
from engine.mesh.layout import place
from engine.model.config import ModelConfig
from engine.model.paths import array_paths, path_of, unflatten
from engine.storage import safetensors
from engine.storage.adapter import CONFIG, PART, WEIGHTS
from engine.storage.adapter_reader import is_adapter, read_leaves
from engine.storage.checkpoint import (
    ALIGNMENT,
    PART_NAME,
    Box,
    box_of,
    checkpoints_of,
    prng_settings,
    steps,
)
from engine.storage.safetensors_writer import DTYPES
from engine.untrusted import quote, read_json_object

ABSENT = "no such array"


class LoadedCheckpoint(NamedTuple):
    """The contents of a checkpoint. `damaged`: one line per damaged file in newer ones."""

    path: Path
    step: int
    params: Any
    optimizer: Any
    state: dict[str, Any]
    damaged: list[str]


class StoredArray(NamedTuple):
    """An array in a checkpoint's files, and the parts that it was cut into."""

    shape: tuple[int, ...]
    dtype: np.dtype
    boxes: dict[Box, safetensors.StoredTensor]

    def read(self, wanted: Box, out: np.ndarray) -> None:
        """Reads a box of the array into `out`, of its shape, from the parts that it overlaps."""
        for box, stored in self.boxes.items():
            overlap = _overlap(box, wanted)
            if overlap is None:
                continue
            target = out
            if wanted:  # a number without axes is no array once it is indexed
                target = out[tuple(slice(start, stop) for start, stop in _relative_to(wanted, overlap))]
            safetensors.read_box(stored, _relative_to(box, overlap), target)


def _overlap(first: Box, second: Box) -> Box | None:
    """Returns the box that two boxes have in common; None where they have none."""
    overlap = []
    for (start, stop), (other_start, other_stop) in zip(first, second):
        common = (max(start, other_start), min(stop, other_stop))
        if common[0] >= common[1]:
            return None
        overlap.append(common)
    return tuple(overlap)


def _relative_to(outer: Box, inner: Box) -> Box:
    """Returns a box as seen from the first element of another, in which it lies."""
    return tuple((start - first, stop - first) for (start, stop), (first, _) in zip(inner, outer))


CheckArrays = Callable[[Path, Mapping[str, StoredArray]], None]  # of a checkpoint; raises UserError


def load(
    folder: Path, params_like: Any, optimizer_like: Any, adapter_of: ModelConfig | None = None
) -> LoadedCheckpoint:
    """Loads the newest intact checkpoint of a run folder to resume training; removes what killed
    saves left.

    params_like, optimizer_like: trees of `jax.ShapeDtypeStruct` as wanted; a leaf with a sharding
    is placed by it, others go uncommitted to the default device. `adapter_of`: the model that a
    LoRA run adapts. Raises UserError when no checkpoint is intact (each damaged file is named), a
    leaf differs in path, shape or dtype, or the PRNG settings differ.
    """
    chosen = ""
    if processes.is_first():
        remove_unfinished(checkpoints_of(folder))
        chosen = json.dumps(_newest_intact(folder), default=str)
    name, damaged = json.loads(processes.gather_strings(chosen)[0])
    newest = Path(name)
    record = _read_state(newest)
    former = record["prng"]
    current = prng_settings()
    if former != current:
        raise UserError(
            f"{newest} was trained with {_list_settings(former)}; "
            f"with the settings of now, {_list_settings(current)}, its keys would draw other numbers. "
            f"Set the former in the environment ({', '.join(former).upper()})."
        )
    if adapter_of is None:
        params = _read_tree(newest / "params", stored_arrays(newest, "params"), params_like)
    else:
        params = _read_adapter(newest, adapter_of, params_like)
    optimizer = _read_tree(newest / "optimizer", stored_arrays(newest, "optimizer"), optimizer_like)
    return LoadedCheckpoint(newest, record["step"], params, optimizer, record["state"], damaged)


def _list_settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items())


def load_params(path: Path, check: CheckArrays) -> LoadedCheckpoint:
    """Loads the weights alone, as nested dicts, from a run folder (its newest intact checkpoint) or
    from one checkpoint.

    The optimizer may be damaged or gone. Changes nothing on disk. Calls `check(checkpoint, arrays)`
    before an array is read. Raises UserError as `load` does, except for PRNG settings, and as
    `check` does.
    """
    newest, damaged = find_intact(path)
    record = _read_state(newest)
    stored = stored_arrays(newest, "params")
    check(newest, stored)
    like = unflatten({name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in stored.items()})
    params = _read_tree(newest / "params", stored, like)
    return LoadedCheckpoint(newest, record["step"], params, None, record["state"], damaged)


def find_intact(path: Path) -> tuple[Path, list[str]]:
    """Returns the newest intact checkpoint of a run folder, or `path` if it is one; and a line per
    damaged file in newer ones.

    The optimizer may be damaged or gone. Raises UserError when there is none, or one that is named
    is damaged.
    """
    checkpoint = Path(path).absolute()
    if checkpoints_of(checkpoint).is_dir():
        return _newest_intact(checkpoint, skip="optimizer")
    if not any((checkpoint / name).is_file() for name in ("state.json", manifest.NAME)):
        raise UserError(f"There is no checkpoint at {path}.")
    lines = find_damage(checkpoint, skip="optimizer")
    if lines:
        raise UserError(
            f"Checkpoint {path} is damaged: {'; '.join(lines)}. Use another checkpoint of the run."
        )
    return checkpoint, []


def check_is_adapter(checkpoint: Path) -> None:
    """Raises UserError for a LoRA run's checkpoint that is not in PEFT's layout, as those of
    earlier versions.
    """
    if not is_adapter(checkpoint):
        raise UserError(
            f"{checkpoint} has no {CONFIG} and {WEIGHTS}: it is of an earlier version of this program, "
            "which cannot be read any more. Train the adapter anew."
        )


def _read_adapter(checkpoint: Path, cfg: ModelConfig, like: Any) -> Any:
    """Returns a checkpoint's adapter as a tree like `like`, laid out over the mesh."""
    check_is_adapter(checkpoint)
    adapter = read_leaves(checkpoint, cfg)
    _refuse_difference(checkpoint / PART, array_paths(like), array_paths(adapter))
    return place(jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(adapter)))


def peek_arrays(path: Path, check: CheckArrays) -> Mapping[str, Any]:
    """Returns the arrays that `load_params` is about to load, with shapes and dtypes, before a byte
    of them is verified.

    They are those of the newest checkpoint that passes `check`. Raises UserError as `load_params`
    does where none passes.
    """
    newest = Path(path).absolute()
    checkpoints = [newest]
    if checkpoints_of(newest).is_dir():
        checkpoints = [checkpoints_of(newest) / str(step) for step in reversed(steps(newest))]
    for checkpoint in checkpoints:
        with contextlib.suppress(UserError, OSError):  # of a damaged one, which `load_params` names
            arrays = stored_arrays(checkpoint, "params")
            check(checkpoint, arrays)
            return arrays
    return array_paths(load_params(path, check).params)


def stored_arrays(checkpoint: Path, part: str) -> dict[str, StoredArray]:
    """Returns the arrays of one part of a checkpoint by path, unread, after checking that each is
    there whole.
    """
    boxes: dict[str, dict[Box, safetensors.StoredTensor]] = {}
    for path in sorted(checkpoint.glob(f"{part}.*safetensors")):
        for stored_name, tensor in safetensors.read_header(path)[0].items():
            name, box = _split_part_name(stored_name, tensor.shape)
            boxes.setdefault(name, {})[box] = tensor
    arrays = {}
    for name, parts in boxes.items():
        shape = _shape_of_parts({box: tensor.shape for box, tensor in parts.items()})
        kinds = {(tensor.dtype, len(tensor.shape)) for tensor in parts.values()}
        is_folder = any(name[: slash.start()] in boxes for slash in re.finditer("/", name))
        if shape is None or len(kinds) > 1 or is_folder:
            raise UserError(f"{checkpoint} is damaged: the parts of {quote(name)} make no array.")
        dtype, _ = kinds.pop()
        arrays[name] = StoredArray(shape, DTYPES[dtype], parts)
    return arrays


def _split_part_name(stored_name: str, shape: tuple[int, ...]) -> tuple[str, Box]:
    """Returns the path of the array of which a tensor in a file is a part, or all, and its box there."""
    match = PART_NAME.fullmatch(stored_name)
    if not match:
        return stored_name, tuple((0, size) for size in shape)
    name, cuts = match.groups()
    box = []
    for cut in cuts.split(","):
        start, stop = cut.split(":")
        box.append((int(start), int(stop)))
    return name, tuple(box)


def _shape_of_parts(parts: Mapping[Box, tuple[int, ...]]) -> tuple[int, ...] | None:
    """Returns the shape of the array that parts, each with its shape, make; None unless they make one."""
    for box, part_shape in parts.items():
        if tuple(stop - start for start, stop in box) != part_shape:
            return None
    # A sharding cuts each axis into ranges, and the parts are all that this makes.
    axes = [sorted({*ranges}) for ranges in zip(*parts)]
    for ranges in axes:
        end = 0
        for start, stop in ranges:
            if start != end:
                return None
            end = stop
    if math.prod(map(len, axes)) != len(parts):
        return None
    return tuple(ranges[-1][1] for ranges in axes)


def _read_tree(where: Path, stored: dict[str, StoredArray], like: Any) -> Any:
    wanted = array_paths(like)
    _refuse_difference(where, wanted, stored)
    room = max((math.prod(array.shape) * array.dtype.itemsize for array in stored.values()), default=0)
    # for one after another: new memory for each costs more than reading
    buffer = np.empty(room + 2 * ALIGNMENT, np.uint8)
    # JAX copies what does not lie at a multiple of 16 bytes; what does, it may take as it lies,
    # whatever `may_alias` says.
    buffer = buffer[-buffer.ctypes.data % ALIGNMENT + 8 :]
    arrays = {name: _read_array(stored[name], leaf.sharding, buffer) for name, leaf in wanted.items()}
    _refuse_difference(where, wanted, arrays)  # without x64, JAX makes 32 bits of 64
    return jax.tree_util.tree_map_with_path(lambda keys, _: arrays[path_of(keys)], like)


def _read_array(stored: StoredArray, sharding: Any, buffer: np.ndarray) -> jax.Array:
    """Returns an array placed by its sharding, or on the default device. `buffer`: memory to read
    into, which JAX copies.
    """
    if sharding:
        places = sharding.addressable_devices_indices_map(stored.shape)
    else:
        places = {None: (slice(None),) * len(stored.shape)}
    parts = []
    box_in_buffer = None
    for device, index in places.items():
        box = box_of(index, stored.shape)
        if box != box_in_buffer:
            shape = [stop - start for start, stop in box]
            out = buffer[: math.prod(shape) * stored.dtype.itemsize].view(stored.dtype).reshape(shape)
            stored.read(box, out)
            box_in_buffer = box
        parts.append(jax.block_until_ready(jax.device_put(out, device, may_alias=False)))
    if sharding:
        return jax.make_array_from_single_device_arrays(stored.shape, sharding, parts)
    return parts[0]


def _refuse_difference(where: Path, wanted: Mapping[str, Any], came: Mapping[str, Any]) -> None:
    """Raises UserError unless leaves by path have the same names, dtypes and shapes."""
    expected = _describe_leaves(wanted)
    actual = _describe_leaves(came)
    differing = sorted(name for name in expected | actual if expected.get(name) != actual.get(name))
    if not differing:
        return
    first = differing[0]
    more = ""
    if len(differing) > 1:
        more = f" ({len(differing) - 1} more arrays differ)"
    raise UserError(
        f"{where} is of another model: at {first} {expected.get(first, ABSENT)} was wanted "
        f"and {actual.get(first, ABSENT)} came{more}. "
        "Use the config it was trained with, or another folder."
    )


def _describe_leaves(leaves: Mapping[str, Any]) -> dict[str, str]:
    return {name: f"{leaf.dtype} {tuple(leaf.shape)}" for name, leaf in leaves.items()}


def _read_state(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / "state.json"
    record = read_json_object(path)
    match record:
        case {"step": int(), "prng": dict(), "state": _}:
            return record
    raise UserError(f"{path} is damaged: it does not say the step and the state of a run.")


def rename_newer(folder: Path, after: int) -> list[Path]:
    """Renames each checkpoint newer than step `after` to `damaged-STEP`; returns the new paths.
    Only process 0 does.
    """
    root = checkpoints_of(folder)
    moved: list[Path] = []
    if not processes.is_first():
        return moved
    for step in [step for step in steps(folder) if step > after]:
        target = root / f"damaged-{step}"
        shutil.rmtree(target, ignore_errors=True)
        moved.append((root / str(step)).rename(target))
    return moved


def find_damage(checkpoint: Path, skip: str | None = None) -> list[str]:
    """Returns one line per damaged file of a checkpoint, as `manifest.verify`; or one line if it
    holds another step's files.
    """
    lines = manifest.verify(checkpoint, skip)
    if lines:
        return lines
    try:
        step = _read_state(checkpoint)["step"]
    except UserError as error:
        return [str(error).rstrip(".")]
    is_other = checkpoint.name.isdecimal() and step != int(checkpoint.name)
    if is_other:
        return [f"{checkpoint} holds the files of step {step:,}"]
    return []


def _newest_intact(folder: Path, skip: str | None = None) -> tuple[Path, list[str]]:
    damaged: list[str] = []
    for step in reversed(steps(folder)):
        path = checkpoints_of(folder) / str(step)
        lines = find_damage(path, skip)
        if not lines:
            return path, damaged
        damaged += lines
    if not damaged:
        raise UserError(f"{folder} has no checkpoint.")
    raise UserError(
        f"{folder} has no intact checkpoint: {'; '.join(damaged)}. "
        "Train anew, or restore the files from a copy."
    )
