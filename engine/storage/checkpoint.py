"""Saves and loads checkpoints, from which a run resumes bit for bit.

    FOLDER/checkpoints/STEP/                an Orbax v1 checkpoint of two items:
                            params/         a pytree; inference reads this alone
                            optimizer/      another
                            state.json      step, PRNG settings, and the caller's state
                            manifest.json   SHA-256 of every file above

Orbax commits by a rename without fsync or checksum. So a checkpoint is built in a hidden folder, synced, read back and
compared with memory, and appears by one rename: a kill at any instant leaves the older ones and no partial one. Nothing is
loaded before its SHA-256 is checked: damage is named, and the newest intact checkpoint is used. Each of several processes
writes its own part of the arrays and reads it back; process 0 writes the rest, and commits when all have.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from engine.errors import UserError
from engine.files import UNFINISHED, atomic_folder, folder_lock, make_folder, remove_unfinished, sync_and_drop
from engine.mesh import processes
from engine.storage import orbax_arrays
from engine.storage.manifest import verify, write_manifest
from engine.storage.untrusted import read_json_object


class LoadedCheckpoint(NamedTuple):
    """The contents of a checkpoint. `damaged`: one line per damaged file in newer ones."""

    path: Path
    step: int
    params: Any
    optimizer: Any
    state: dict[str, Any]
    damaged: list[str]


def save_in_parts(
    folder: Path, step: int, params: Any, optimizer: Any, state: dict[str, Any], *, keep: int, best: int | None = None
) -> Iterator[Path]:  # fmt: skip
    """Writes `folder/checkpoints/STEP` durably, then removes all but the newest `keep` and step `best`.

    Yields the path when that has begun, and again when it is done, perhaps in another thread; the arrays must stay as they
    are until then. params, optimizer: pytrees of JAX or NumPy arrays. state: JSON (tuples come back as lists, keys as text).
    A checkpoint of the same step is replaced; those of later steps are neither counted nor removed.

    Raises UserError, naming the path and the bytes wanted, when the disk refuses or gives back other bits; older checkpoints
    then stay as they were, as after a KeyboardInterrupt or a kill. Raises TypeError or ValueError, before anything is
    written, for a leaf that could not be restored or a state that is not JSON.

    Orbax begins a save of several processes with a collective, so all must begin
    at the same place in their programs; afterwards they only exchange keys. Where one process fails, the others wait for more
    of them until it ends all.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"save: step must be at least 0 and keep at least 1, not {step} and {keep}.")
    parts = {name: orbax_arrays.check_leaves(name, tree) for name, tree in (("params", params), ("optimizer", optimizer))}
    trees = {part: tree for part, tree in parts.items() if jax.tree.leaves(tree)}
    record = json.dumps({"step": step, "prng": _prng_settings(), "state": state}, indent=1, allow_nan=False)
    root = _root(folder)
    target = root / str(step)
    wanted = sum(leaf.nbytes for tree in trees.values() for leaf in jax.tree.leaves(tree))
    try:
        with _building(target, wanted, keep, best) as building:
            begun = orbax_arrays.begin_write(building, trees)
            yield target
            orbax_arrays.write(building, trees, begun)
            if processes.is_first():
                (building / "state.json").write_text(record + "\n", encoding="utf-8")
                sync_and_drop(building)  # so that the disk is read, not what memory still holds of the files
                write_manifest(building)
            orbax_arrays.compare(building, trees)
        processes.gather_strings(topic=orbax_arrays.TOPIC)  # until process 0 has committed
    except (OSError, ValueError) as error:
        # TensorStore tells the operating system's error in a ValueError.
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if not code and not isinstance(error, OSError):
            raise
        reason = os.strerror(int(code[1])) if code else getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"Checkpoint {target} could not be written ({wanted / 1e6:,.1f} MB wanted): {reason}. Earlier checkpoints are "
            "untouched; make room, or choose another folder."
        ) from error
    yield target


@contextlib.contextmanager
def _building(target: Path, wanted: int, keep: int, best: int | None) -> Iterator[Path]:
    """Gives all processes a folder to write in, which then appears at `target`; removes what is not kept.

    Process 0 makes and renames it. Raises OSError when fewer than `wanted` bytes are free.
    """
    if not processes.is_first():
        yield Path(processes.gather_strings(topic=orbax_arrays.TOPIC)[0])
        return
    root, step = target.parent, int(target.name)
    make_folder(root)
    with folder_lock(root):
        disk = shutil.disk_usage(root)
        if disk.total > 0 and disk.free < wanted:  # some network file systems know neither
            raise OSError(errno.ENOSPC, f"{disk.free / 1e6:,.1f} MB are free")
        with atomic_folder(target) as building:
            processes.gather_strings(str(building), orbax_arrays.TOPIC)
            yield building
        for old in {*[earlier for earlier in steps(root.parent) if earlier <= step][:-keep]} - {best}:
            # Hidden by one rename, so that a kill leaves nothing that looks like a checkpoint.
            with contextlib.suppress(OSError):  # the next save tries again
                shutil.rmtree((root / str(old)).rename(root / f".{old}.gone{UNFINISHED}"), ignore_errors=True)


def load(folder: Path, params_like: Any, optimizer_like: Any) -> LoadedCheckpoint:
    """Loads the newest intact checkpoint of a run folder to resume training; removes what killed saves left.

    params_like, optimizer_like: trees of arrays or `jax.ShapeDtypeStruct` with the structure, shapes and dtypes wanted. A
    leaf with a sharding is placed by it; the others go, uncommitted, to the default device.

    Raises UserError when there is no checkpoint, none is intact (each damaged file is named), a leaf differs in path,
    shape or dtype, or PRNG settings differ, by which keys would draw other numbers.
    """
    threading.Thread(target=orbax_arrays.import_orbax, daemon=True).start()  # beside the hashing
    chosen = ""
    if processes.is_first():
        remove_unfinished(_root(folder))
        chosen = json.dumps(_newest_intact(folder), default=str)
    name, damaged = json.loads(processes.gather_strings(chosen)[0])
    record, settings = _read_state(newest := Path(name)), _prng_settings()
    if (trained := record["prng"]) != settings:
        former, now = (", ".join(f"{name}={value}" for name, value in prng.items()) for prng in (trained, settings))
        raise UserError(
            f"{newest} was trained with {former}; with the settings of now, {now}, its keys would draw other numbers. "
            f"Set the former in the environment ({', '.join(trained).upper()})."
        )
    params = orbax_arrays.read(newest / "params", params_like)
    optimizer = orbax_arrays.read(newest / "optimizer", optimizer_like)
    return LoadedCheckpoint(newest, record["step"], params, optimizer, record["state"], damaged)


def load_params(path: Path) -> LoadedCheckpoint:
    """Loads the weights alone, for inference, from a run folder (its newest intact checkpoint) or from one checkpoint.

    The optimizer may be damaged or gone; `LoadedCheckpoint.optimizer` is None. params are dicts, and lists for tuples.
    Changes nothing on disk. Raises UserError as `load` does, but not for PRNG settings.
    """
    newest, damaged = Path(path).absolute(), list[str]()
    if _root(newest).is_dir():
        newest, damaged = _newest_intact(newest, skip=("optimizer",))
    elif not (newest / "params").is_dir():
        raise UserError(f"There is no checkpoint at {path}.")
    elif lines := verify(newest, skip=("optimizer",)):
        raise UserError(f"Checkpoint {path} is damaged: {'; '.join(lines)}. Use another checkpoint of the run.")
    record = _read_state(newest)
    return LoadedCheckpoint(newest, record["step"], orbax_arrays.read_alone(newest / "params"), None, record["state"], damaged)


def _read_state(checkpoint: Path) -> dict[str, Any]:
    match record := read_json_object(path := checkpoint / "state.json"):
        case {"step": int(), "prng": dict(), "state": _}:
            return record
    raise UserError(f"{path} is damaged: it does not say the step and the state of a run.")


def steps(folder: Path) -> list[int]:
    """Returns the steps that a run folder has checkpoints of, intact or not, oldest first."""
    folders = (entry for entry in _root(folder).glob("*") if entry.is_dir())
    return sorted(int(entry.name) for entry in folders if re.fullmatch(r"0|[1-9][0-9]*", entry.name))


def rename_newer(folder: Path, after: int) -> list[Path]:
    """Renames each checkpoint newer than step `after`, from which a run resumes, to `damaged-STEP`; returns the new paths.

    Only process 0 does.
    """
    root = _root(folder)
    moved: list[Path] = []
    if not processes.is_first():
        return moved
    for step in [step for step in steps(folder) if step > after]:
        shutil.rmtree(target := root / f"damaged-{step}", ignore_errors=True)
        moved.append((root / str(step)).rename(target))
    return moved


def _root(folder: Path) -> Path:
    return Path(folder).absolute() / "checkpoints"  # Orbax refuses relative paths


def _newest_intact(folder: Path, skip: tuple[str, ...] = ()) -> tuple[Path, list[str]]:
    damaged: list[str] = []
    for step in reversed(steps(folder)):
        path = _root(folder) / str(step)
        if not (lines := verify(path, skip)):
            return path, damaged
        damaged += lines
    if not damaged:
        raise UserError(f"{folder} has no checkpoint.")
    raise UserError(f"{folder} has no intact checkpoint: {'; '.join(damaged)}. Train anew, or restore the files from a copy.")


def _prng_settings() -> dict[str, Any]:
    return {name: getattr(jax.config, name) for name in ("jax_default_prng_impl", "jax_threefry_partitionable")}
