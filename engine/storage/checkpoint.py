"""Saves and loads checkpoints, from which a run resumes bit for bit. No other file uses Orbax.

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

import concurrent.futures
import contextlib
import errno
import itertools
import json
import logging
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np

from engine import distributed
from engine.errors import UserError
from engine.files import atomic_folder, folder_lock, make_folder, sync_and_drop
from engine.storage.digest import leaves_by_path
from engine.storage.manifest import verify, write_manifest

GROUP_BYTES = 2**28  # of arrays that are read at once
TOPIC = "save"  # a thread's own, see `share`
INNER = "orbax"  # Orbax wants to make the folder itself


class LoadedCheckpoint(NamedTuple):
    """The contents of a checkpoint. `damaged`: one line per damaged file in newer ones."""

    path: Path
    step: int
    params: Any
    optimizer: Any
    state: dict[str, Any]
    damaged: list[str]


def save(
    folder: Path, step: int, params: Any, optimizer: Any, state: dict[str, Any], *, keep: int = 3, best: int | None = None
) -> Path:  # fmt: skip
    """Writes `folder/checkpoints/STEP` durably, then removes all but the newest `keep` and step `best`; returns the path.

    params, optimizer: pytrees of JAX or NumPy arrays. state: JSON (tuples come back as lists, keys as text). A checkpoint
    of the same step is replaced; those of later steps are neither counted nor removed.

    Raises UserError, naming the path and the bytes wanted, when the disk refuses or gives back other bits; older checkpoints
    then stay as they were, as after a KeyboardInterrupt or a kill. Raises TypeError or ValueError, before anything is
    written, for a leaf that could not be restored or a state that is not JSON.
    """
    *_, path = save_in_parts(folder, step, params, optimizer, state, keep=keep, best=best)
    return path


def save_in_parts(
    folder: Path, step: int, params: Any, optimizer: Any, state: dict[str, Any], *, keep: int, best: int | None = None
) -> Iterator[Path]:  # fmt: skip
    """Does what `save` does: yields the path when that has begun, and again when it is done, perhaps in another thread.

    The arrays must stay as they are until then. Orbax begins a save of several processes with a collective, so all must begin
    at the same place in their programs; afterwards they only exchange keys. Where one process fails, the others wait for more
    of them until it ends all.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"save: step must be at least 0 and keep at least 1, not {step} and {keep}.")
    parts = {"params": _check_leaves("params", params), "optimizer": _check_leaves("optimizer", optimizer)}
    trees = {part: tree for part, tree in parts.items() if jax.tree.leaves(tree)}
    record = json.dumps({"step": step, "prng": _prng_settings(), "state": state}, indent=1, allow_nan=False)
    root = _root(folder)
    target = root / str(step)
    wanted = sum(leaf.nbytes for tree in trees.values() for leaf in jax.tree.leaves(tree))
    try:
        with _building(target, wanted, keep, best) as building:
            begun = _begin_arrays(building, trees)
            yield target
            _write_arrays(building, trees, begun)
            if distributed.is_first():
                (building / "state.json").write_text(record + "\n", encoding="utf-8")
                sync_and_drop(building)  # so that the disk is read, not what memory still holds of the files
                write_manifest(building)
            _compare_arrays(building, trees)
        distributed.share(topic=TOPIC)  # until process 0 has committed
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
    """Gives all processes a folder to write in, which then appears at `target`; removes what `save` does not keep.

    Process 0 makes and renames it. Raises OSError when fewer than `wanted` bytes are free.
    """
    if not distributed.is_first():
        yield Path(distributed.share(topic=TOPIC)[0])
        return
    root, step = target.parent, int(target.name)
    make_folder(root)
    with folder_lock(root):
        _remove_incomplete(root)
        disk = shutil.disk_usage(root)
        if disk.total > 0 and disk.free < wanted:  # some network file systems know neither
            raise OSError(errno.ENOSPC, f"{disk.free / 1e6:,.1f} MB are free")
        with atomic_folder(target) as building:
            distributed.share(str(building), TOPIC)
            yield building
        for old in {*[earlier for earlier in steps(root.parent) if earlier <= step][:-keep]} - {best}:
            # Hidden by one rename, so that a kill leaves nothing that looks like a checkpoint.
            with contextlib.suppress(OSError):  # the next save tries again
                shutil.rmtree((root / str(old)).rename(root / f".{old}.gone"), ignore_errors=True)


def load(folder: Path, params_like: Any, optimizer_like: Any) -> LoadedCheckpoint:
    """Loads the newest intact checkpoint of a run folder to resume training; removes what killed saves left.

    params_like, optimizer_like: trees of arrays or `jax.ShapeDtypeStruct` with the structure, shapes and dtypes wanted. A
    leaf with a sharding is placed by it; the others go, uncommitted, to the default device.

    Raises UserError when there is no checkpoint, none is intact (each damaged file is named), a leaf differs in path,
    shape or dtype, or PRNG settings differ, by which keys would draw other numbers.
    """
    threading.Thread(target=import_orbax, daemon=True).start()  # beside the hashing
    chosen = ""
    if distributed.is_first():
        remove_incomplete(folder)
        chosen = json.dumps(_newest_intact(folder), default=str)
    name, damaged = json.loads(distributed.share(chosen)[0])
    record, settings = _read_state(newest := Path(name)), _prng_settings()
    if (trained := record["prng"]) != settings:
        former, now = (", ".join(f"{name}={value}" for name, value in prng.items()) for prng in (trained, settings))
        raise UserError(
            f"{newest} was trained with {former}; with the settings of now, {now}, its keys would draw other numbers. "
            f"Set the former in the environment ({', '.join(trained).upper()})."
        )
    params, optimizer = _read_arrays(newest, "params", params_like), _read_arrays(newest, "optimizer", optimizer_like)
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
    return LoadedCheckpoint(newest, record["step"], _read_arrays(newest, "params"), None, record["state"], damaged)


def _read_state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))


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
    if not distributed.is_first():
        return moved
    for step in [step for step in steps(folder) if step > after]:
        shutil.rmtree(target := root / f"damaged-{step}", ignore_errors=True)
        moved.append((root / str(step)).rename(target))
    return moved


def remove_incomplete(folder: Path) -> None:
    """Removes the unfinished checkpoints of killed saves from a run folder, unless another process saves there."""
    root = _root(folder)
    with contextlib.suppress(OSError), folder_lock(root, wait=False):
        _remove_incomplete(root)


def _remove_incomplete(root: Path) -> None:
    """Removes hidden folders: under the lock, nobody writes them."""
    for leftover in [entry for entry in root.iterdir() if re.match(r"\.\d+\.", entry.name)]:
        step = leftover.name.split(".")[1]
        # A kill while a step was replaced: the old checkpoint in here is whole.
        if (leftover / step).is_dir() and not (root / step).exists():
            os.replace(leftover / step, root / step)
        shutil.rmtree(leftover, ignore_errors=True)


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


def _check_leaves(part: str, tree: Any) -> Any:
    """Returns `tree` with NumPy scalars as 0-d arrays; raises for a leaf that Orbax would lose."""
    names: dict[str, str] = {}
    for path, leaf in leaves_by_path(tree).items():
        name = f"{part}/{'/'.join(path)}"
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
            raise TypeError(f"save: {name} is a {type(leaf).__name__}, not an array.")
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise TypeError(f"save: {name} is a PRNG key; save its jax.random.key_data.")
        if jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
            raise TypeError(f"save: {name} is {leaf.dtype}, of which JAX would keep 32 bits when it is loaded.")
        if leaf.size == 0:
            raise ValueError(f"save: {name} has shape {leaf.shape}; Orbax cannot save an array without elements.")
        # Orbax joins names with dots, and overwrites equal ones in silence.
        if (other := names.setdefault(".".join(path), name)) != name:
            raise ValueError(f"save: {other} and {name} would have one name on disk.")
    # Orbax takes an array of one of several processes for a mistake; process 0 writes NumPy's.
    alone = lambda leaf: isinstance(leaf, np.generic) or (distributed.process_count() > 1 and not is_shared(leaf))
    return jax.tree.map(lambda leaf: np.asarray(leaf) if alone(leaf) else leaf, tree)


def import_orbax() -> None:
    """Imports Orbax, which takes half a second, before it is needed."""
    from orbax.checkpoint import v1  # noqa: F401


def _run_orbax[T](work: Callable[[ModuleType], T], alone: bool = False) -> T:
    """Runs `work(ocp)` with Orbax under our options, `alone` without the other processes; imported only now: 0.4 s.

    In a thread: Ctrl-C in the middle of Orbax would leave closed event loops with callbacks still to come, and tracebacks.
    """

    def run() -> T:
        from orbax.checkpoint import v1 as ocp

        context = ocp.Context()
        context.array.saving.use_compression = False  # weights do not compress: zstd doubles the time and saves 8%
        context.asynchronous.create_directories_asynchronously = False  # one that fails is noticed after twenty minutes
        context.memory.deepcopy_host_arrays = False  # nobody changes an array while we wait
        if alone:
            context.multiprocessing.primary_host = jax.process_index()
            context.multiprocessing.active_processes = {jax.process_index()}
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax raises each error that it logs, also in its own threads
        report = sys.unraisablehook
        # After an error, which is raised, TensorStore still calls into event loops that Orbax has closed.
        sys.unraisablehook = lambda late: None if str(late.exc_value) == "Event loop is closed" else report(late)
        with context:
            result = work(ocp)
        sys.unraisablehook = report
        return result

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def _begin_arrays(building: Path, trees: dict[str, Any]) -> Any:
    """Begins to write the arrays of several processes; returns Orbax's response, or None with one process."""
    if distributed.process_count() == 1 or not trees:
        return None
    return _run_orbax(lambda ocp: ocp.save_checkpointables_async(building / INNER, trees))


def _write_arrays(building: Path, trees: dict[str, Any], begun: Any = None) -> None:
    """Writes the arrays, or waits until those are written that `_begin_arrays` has begun."""
    inner = building / INNER
    if trees:
        _run_orbax(lambda ocp: begun.result() if begun else ocp.save_checkpointables(inner, trees))
        if not distributed.is_first():
            return
        (inner / "commit_success.txt").unlink(missing_ok=True)  # says only where it was built
        for entry in [*inner.iterdir()]:
            entry.rename(building / entry.name)
        inner.rmdir()


def _compare_arrays(building: Path, trees: dict[str, Any]) -> None:
    """Reads the arrays back, in groups, and raises OSError for one that has other bits than in memory.

    Each of several processes compares its own parts; all wait for process 0 before, and for one another after.
    """
    distributed.share(topic=TOPIC)
    for part, tree in trees.items():
        leaves = jax.tree.leaves(tree)
        for group in _in_groups(jax.tree.map(lambda leaf: (_as_abstract if is_shared(leaf) else _on_host)(leaf), tree)):
            try:
                read = _run_orbax(lambda ocp: ocp.load(building, group, checkpointable_name=part))  # noqa: B023
            except ValueError as error:
                raise OSError(errno.EIO, f"{part} cannot be read back") from error
            for leaf, back in zip(leaves, jax.tree.leaves(read)):
                if back is not ... and not all(map(np.array_equal, _bytes(leaf), _bytes(back))):
                    name = next("/".join(path) for path, other in leaves_by_path(tree).items() if other is leaf)
                    raise OSError(errno.EIO, f"{part}/{name} was read back with other bits than it has in memory")
    distributed.share(topic=TOPIC)


def _in_groups(like: Any) -> Iterator[Any]:
    """Yields the tree for each group of its leaves, with `...` for the others, which Orbax does not read."""
    leaves, structure = jax.tree.flatten(like)
    groups = [total // GROUP_BYTES for total in itertools.accumulate(leaf.size * leaf.dtype.itemsize for leaf in leaves)]
    for group in dict.fromkeys(groups):
        yield jax.tree.unflatten(structure, [leaf if at == group else ... for leaf, at in zip(leaves, groups)])


def is_shared(leaf: Any) -> bool:
    """Whether an array lies on devices of several processes."""
    return isinstance(leaf, jax.Array) and not leaf.is_fully_addressable


def _bytes(leaf: Any) -> list[np.ndarray]:
    """Returns the bytes of this process's parts of an array."""
    parts = [shard.data for shard in leaf.addressable_shards] if is_shared(leaf) else [leaf]
    return [np.ascontiguousarray(part).reshape(-1).view(np.uint8) for part in parts]


def _read_arrays(checkpoint: Path, part: str, like: Any = None) -> Any:
    """Returns one part's arrays, read in groups: touching new memory costs more than reading, and a group's serves the next.

    JAX copies NumPy's arrays, for a step cannot donate what only lies in their memory.
    """
    own = lambda new: jax.device_put(new, may_alias=False) if isinstance(new, np.ndarray) else new
    read = lambda work: _run_orbax(work, alone=like is None)
    stored = read(lambda ocp: ocp.metadata(checkpoint, part).metadata) if (checkpoint / part).is_dir() else {}
    # Without the shardings that Orbax noted: those devices need not exist now.
    tree = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), stored) if like is None else like
    wanted = _kinds(tree)
    _refuse_difference(checkpoint / part, wanted, _kinds(stored))
    for group in _in_groups(jax.tree.map(_as_abstract, tree)):
        arrays = jax.tree.map(own, read(lambda ocp: ocp.load(checkpoint, group, checkpointable_name=part)))  # noqa: B023
        tree = jax.block_until_ready(jax.tree.map(lambda leaf, new: leaf if new is ... else new, tree, arrays))
    _refuse_difference(checkpoint / part, wanted, _kinds(tree))  # without x64, JAX makes 32 bits of 64 in silence
    return tree


def _kinds(tree: Any) -> dict[tuple[str, ...], str]:
    return {path: f"{np.dtype(leaf.dtype).name} {tuple(leaf.shape)}" for path, leaf in leaves_by_path(tree).items()}


def _as_abstract(leaf: Any) -> Any:
    """Returns a leaf for Orbax to restore by its sharding, or into host memory (twice as fast on one device)."""
    if getattr(leaf, "sharding", None) is not None and getattr(leaf, "committed", True):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    return _on_host(leaf)


def _on_host(leaf: Any) -> np.ndarray:
    """Returns a shape and a dtype without the memory, for Orbax to restore into host memory."""
    return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)


def _refuse_difference(where: Path, wanted: dict, stored: dict) -> None:
    """Raises UserError for other paths, shapes or dtypes: Orbax casts dtypes in silence and blames a handler for shapes."""
    if differing := sorted({path for path, _ in wanted.items() ^ stored.items()}):
        expected, actual = (kinds.get(differing[0], "no such array") for kinds in (wanted, stored))
        more = f" ({len(differing) - 1} more arrays differ)" if len(differing) > 1 else ""
        raise UserError(
            f"{where} is of another model: at {'/'.join(differing[0])} {expected} was wanted and {actual} came{more}. "
            "Use the config it was trained with, or another folder."
        )


def _prng_settings() -> dict[str, Any]:
    return {name: getattr(jax.config, name) for name in ("jax_default_prng_impl", "jax_threefry_partitionable")}
