"""Saves checkpoints beside training and loads them; from one a run resumes bit for bit.

    FOLDER/checkpoints/STEP/params.safetensors      the weights by path, such as `blocks/0/q`; inference reads this alone
                            optimizer.safetensors   the optimizer's state, by path
                            state.json              step, PRNG settings, and the caller's state
                            manifest.json           SHA-256 of every file above

Each of several processes writes its own parts of the arrays: process 1 in params.1.safetensors, where `blocks/0/q[0:64,0:96]`
is rows 0 to 63 and columns 0 to 95. Any number of processes loads them by slice onto any mesh.

A checkpoint is built in a hidden folder, read back from the disk and compared with memory, and appears by one rename: a kill at
any instant leaves the older ones and no partial one. Nothing is loaded before its SHA-256 is checked: damage is named, and the
newest intact checkpoint is used.
"""

import concurrent.futures
import contextlib
import errno
import functools
import json
import math
import mmap
import os
import re
import shutil
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import numpy as np

from engine import manifest
from engine.counting.hardware import free_host_bytes
from engine.errors import UserError
from engine.files import UNFINISHED, atomic_folder, folder_lock, make_folder, remove_unfinished
from engine.mesh import processes
from engine.model.paths import unflatten
from engine.storage import safetensors
from engine.untrusted import quote, read_json_object

SAVE_TOPIC = "save"  # the thread's own, see `gather_strings`
# An array of an earlier version, which held q, k, v or gate, up side by side: of a weight, of a moment, or of a LoRA pair.
JOINED_BEFORE = re.compile(r"((?:.*/)?blocks/\d+/)(qkv|gate_up)(_bias)?(?:/(a|b))?")
PART_NAME = re.compile(r"(.+)\[(\d{1,15}:\d{1,15}(?:,\d{1,15}:\d{1,15})*)\]")  # the name of a part of an array
NICENESS = 5  # of the thread that writes, which takes time from the steps on a CPU
ALIGNMENT = 64  # bytes
TOUCH = 2**24  # bytes at once of new memory

Box = tuple[tuple[int, int], ...]  # [start, stop) along each axis
Pieces = dict[str, Any]  # arrays that this process writes, by their names in its file


class LoadedCheckpoint(NamedTuple):
    """The contents of a checkpoint. `damaged`: one line per damaged file in newer ones."""

    path: Path
    step: int
    params: Any
    optimizer: Any
    state: dict[str, Any]
    damaged: list[str]


# What a process writes


def own_pieces(name: str, leaf: Any) -> Pieces:
    """Returns what this process writes of a leaf: a whole array, or parts of one that lies on several processes.

    Of processes that hold the same part one writes it. Raises TypeError or ValueError for a leaf that could not be loaded.
    """
    dtype = getattr(leaf, "dtype", None)
    if dtype not in safetensors.NAMES:
        raise TypeError(f"save: {name} is a {type(leaf).__name__} of {dtype}, which no file can hold.")
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise TypeError(f"save: {name} is {dtype}, of which JAX would keep 32 bits when it is loaded.")
    if PART_NAME.fullmatch(name):
        raise ValueError(f"save: {name} would be taken for a part of an array.")
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return {name: leaf} if processes.is_first() else {}
    boxes = {_box(index, leaf.shape) for index in leaf.sharding.devices_indices_map(leaf.shape).values()}
    chosen = zlib.crc32(name.encode()) % (leaf.sharding.num_devices // len(boxes))  # of the devices that hold the same part
    pieces = {}
    for shard in leaf.addressable_shards:
        if shard.replica_id == chosen:
            cut = ",".join(f"{start}:{stop}" for start, stop in _box(shard.index, leaf.shape))
            pieces[f"{name}[{cut}]" if shard.data.shape != leaf.shape else name] = shard.data
    return pieces


def _box(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape))


def _path(keys: Any) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def _leaves(tree: Any) -> dict[str, Any]:
    """Returns the leaves by path: dict keys, fields and positions are names alike."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    by_path = {_path(keys): leaf for keys, leaf in leaves}
    if len(by_path) < len(leaves):
        raise ValueError("save: two arrays have one path: of two keys, one is a number and the other its text, or has a slash.")
    return by_path


class BackgroundSaver:
    """Saves the checkpoints of one run folder, one at a time, while training goes on. `frozen`: params that never change.

    The copies lie in one mapping that is made once: touching new memory takes ten times as long as copying. In the heap they
    would end up above a step's buffer.

    Use it in a `with` block: its end waits for the last write, whose failure is raised unless another error leaves the block.
    """

    def __init__(self, folder: Path, keep: int, frozen: Any = None) -> None:
        self.folder, self.keep, self.frozen = folder, keep, frozen
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "save", _lower_priority)
        self._work: concurrent.futures.Future | None = None
        self._memory: mmap.mmap | None = None
        self._used = 0  # bytes of it

    def reserve(self, *trees: Any) -> None:
        """Begins to make room for copies of such trees, beside training, unless memory is too small for them."""
        pieces = (own_pieces(*leaf) for tree in trees for leaf in _leaves(tree).items())
        size = sum(piece.nbytes + ALIGNMENT for part in pieces for piece in part.values())
        if size <= free_host_bytes():
            self._work = self._pool.submit(self._map_memory, size)

    def _map_memory(self, size: int) -> None:
        try:
            memory = mmap.mmap(-1, max(size, 1))
        except OSError:  # a limit on memory that is not the machine's
            return
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them
                memory.madvise(mmap.MADV_HUGEPAGE)
        for start in range(0, size, TOUCH):
            np.frombuffer(memory, np.uint8)[start : start + TOUCH : mmap.PAGESIZE] = 0
        self._memory = memory

    def save(self, step: int, trainable: Any, optimizer: Any, state: dict[str, Any], best: int | None = None) -> None:
        """Waits for the write before this one, copies the arrays, and begins to write them as `write` does.

        A leaf may be a function that returns the array: where there is room for the copy, only one of these arrays is in
        memory. The arrays may be donated or changed as soon as this returns. Without that room it returns when they are
        written. Raises the UserError of the write before.
        """
        self.wait()
        self._used = 0
        parts = {part: self._copies(tree) for part, tree in (("params", trainable), ("optimizer", optimizer))}
        for leaf in _leaves(self.frozen).items():
            parts["params"] |= own_pieces(*leaf)
        self._work = self._pool.submit(write, self.folder, step, parts, state, keep=self.keep, best=best)
        if self._memory is None:
            self.wait()

    def _copies(self, tree: Any) -> Pieces:
        copies: Pieces = {}
        for name, leaf in _leaves(tree).items():
            pieces = own_pieces(name, leaf() if callable(leaf) else leaf)
            copies |= pieces if self._memory is None else {piece: self._copy(pieces[piece]) for piece in pieces}
            del pieces  # before the next array is made
        return copies

    def _copy(self, x: Any) -> np.ndarray:
        assert self._memory is not None
        copy = np.frombuffer(self._memory, x.dtype, x.size, self._used).reshape(x.shape)
        self._used += -(-x.nbytes // ALIGNMENT) * ALIGNMENT
        if not isinstance(x, jax.Array):
            copy[...] = x
            return copy
        for shard in x.addressable_shards:
            if shard.replica_id == 0:
                copy[shard.index] = np.asarray(shard.data)
        return copy

    def poll(self) -> bool:
        """Returns whether a checkpoint is being written; raises the error of a write that has failed. Never waits."""
        if self._work is not None and self._work.done():
            self.wait()
        return self._work is not None

    def wait(self) -> None:
        """Waits until the last checkpoint is on the disk. Raises UserError when it could not be written."""
        if self._work is not None:
            concurrent.futures.wait([self._work])  # an exception from a signal leaves it to the next call
            work, self._work = self._work, None
            work.result()

    def __enter__(self) -> "BackgroundSaver":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                self.wait()
        finally:
            # After an error the thread may wait for other processes, which this one has to end.
            self._pool.shutdown(wait=error is None or processes.process_count() == 1)
            self._memory = None


def _lower_priority() -> None:
    if sys.platform.startswith("linux"):  # where it is a thread's own
        os.nice(NICENESS)


# Writing


def write(
    folder: Path, step: int, parts: dict[str, Pieces], state: dict[str, Any], *, keep: int, best: int | None = None
) -> Path:
    """Writes `folder/checkpoints/STEP` durably, then removes all but the newest `keep` and step `best`; returns its path.

    parts: {"params": ..., "optimizer": ...}, as `own_pieces` has them; the arrays must stay as they are until this returns.
    state: JSON (tuples come back as lists, keys as text). A checkpoint of the same step is replaced; those of later steps are
    neither counted nor removed.

    Raises UserError, naming the path and the bytes wanted, when the disk refuses or gives back other bits; older checkpoints
    then stay as they were, as after a KeyboardInterrupt or a kill. Raises TypeError or ValueError, before anything is
    written, for a state that is not JSON. Where one of several processes fails, the others wait for it until it ends all.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"save: step must be at least 0 and keep at least 1, not {step} and {keep}.")
    record = json.dumps({"step": step, "prng": _prng_settings(), "state": state}, indent=1, allow_nan=False)
    target = _root(folder) / str(step)
    own = sum(piece.nbytes for pieces in parts.values() for piece in pieces.values())
    wanted = sum(map(int, processes.gather_strings(str(own), SAVE_TOPIC)))
    try:
        with _building(target, wanted, keep, best) as building:
            write_files(building, parts, record.encode() + b"\n")
        processes.gather_strings(topic=SAVE_TOPIC)  # until process 0 has committed
    except OSError as error:
        raise UserError(
            f"Checkpoint {target} could not be written ({wanted / 1e6:,.1f} MB wanted): {error.strerror or error}. Earlier "
            "checkpoints are untouched; make room, or choose another folder."
        ) from error
    return target


def write_files(building: Path, parts: dict[str, Pieces], record: bytes) -> None:
    """Writes this process's files of a checkpoint, reads them back, and as process 0 writes state.json and the manifest."""
    own = "" if processes.is_first() else f".{jax.process_index()}"
    entries = {}
    for part, pieces in parts.items():
        name = f"{part}{own}.safetensors"
        entries[name] = manifest.write_checked(building / name, functools.partial(safetensors.encode, pieces, pieces.values()))
    gathered = processes.gather_strings(json.dumps(entries), SAVE_TOPIC)
    if processes.is_first():
        entries = {name: entry for text in gathered for name, entry in json.loads(text).items()}
        entries["state.json"] = manifest.write_checked(building / "state.json", lambda: [np.frombuffer(record, np.uint8)])
        (building / manifest.NAME).write_bytes(manifest.render(entries))


@contextlib.contextmanager
def _building(target: Path, wanted: int, keep: int, best: int | None) -> Iterator[Path]:
    """Gives all processes a folder to write in, which then appears at `target`; removes what is not kept.

    Process 0 makes and renames it. Raises OSError when fewer than `wanted` bytes are free.
    """
    if not processes.is_first():
        yield Path(processes.gather_strings(topic=SAVE_TOPIC)[0])
        return
    root, step = target.parent, int(target.name)
    make_folder(root)
    with folder_lock(root):
        disk = shutil.disk_usage(root)
        if disk.total > 0 and disk.free < wanted:  # some network file systems know neither
            raise OSError(errno.ENOSPC, f"{disk.free / 1e6:,.1f} MB are free")
        with atomic_folder(target) as building:
            processes.gather_strings(str(building), SAVE_TOPIC)
            yield building
        for old in {*[earlier for earlier in steps(root.parent) if earlier <= step][:-keep]} - {best}:
            # Hidden by one rename, so that a kill leaves nothing that looks like a checkpoint.
            with contextlib.suppress(OSError):  # the next save tries again
                shutil.rmtree((root / str(old)).rename(root / f".{old}.gone{UNFINISHED}"), ignore_errors=True)


# Reading


class StoredArray(NamedTuple):
    """An array in a checkpoint's files. `boxes`: the parts that it was cut into."""

    shape: tuple[int, ...]
    dtype: np.dtype
    boxes: dict[Box, safetensors.StoredTensor]

    def read(self, wanted: Box, out: np.ndarray) -> None:
        """Reads a box of the array into `out`, of its shape."""
        for box, stored in self.boxes.items():
            both = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, wanted)]
            if all(start < stop for start, stop in both):
                inside = tuple(slice(start - first, stop - first) for (start, stop), (first, _) in zip(both, wanted))
                within = [(start - first, stop - first) for (start, stop), (first, _) in zip(both, box)]
                safetensors.read_box(stored, within, out[inside] if inside else out)


def load(folder: Path, params_like: Any, optimizer_like: Any) -> LoadedCheckpoint:
    """Loads the newest intact checkpoint of a run folder to resume training; removes what killed saves left.

    params_like, optimizer_like: trees of `jax.ShapeDtypeStruct` with the structure, shapes and dtypes wanted. A leaf with a
    sharding is placed by it; the others go, uncommitted, to the default device.

    Raises UserError when there is no checkpoint, none is intact (each damaged file is named), a leaf differs in path,
    shape or dtype, or PRNG settings differ, by which keys would draw other numbers.
    """
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
    params = _read_tree(newest / "params", _current_arrays(newest, "params"), params_like)
    optimizer = _read_tree(newest / "optimizer", _current_arrays(newest, "optimizer"), optimizer_like)
    return LoadedCheckpoint(newest, record["step"], params, optimizer, record["state"], damaged)


def load_params(path: Path) -> LoadedCheckpoint:
    """Loads the weights alone, as nested dicts, from a run folder (its newest intact checkpoint) or from one checkpoint.

    The optimizer may be damaged or gone; `LoadedCheckpoint.optimizer` is None. Changes nothing on disk. Raises UserError as
    `load` does, but not for PRNG settings.
    """
    newest, damaged = Path(path).absolute(), list[str]()
    if _root(newest).is_dir():
        newest, damaged = _newest_intact(newest, skip="optimizer")
    elif not any((newest / name).is_file() for name in ("state.json", manifest.NAME)):
        raise UserError(f"There is no checkpoint at {path}.")
    elif lines := manifest.verify(newest, skip="optimizer"):
        raise UserError(f"Checkpoint {path} is damaged: {'; '.join(lines)}. Use another checkpoint of the run.")
    record, stored = _read_state(newest), _current_arrays(newest, "params")
    like = unflatten({name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in stored.items()})
    params = _read_tree(newest / "params", stored, like)
    return LoadedCheckpoint(newest, record["step"], params, None, record["state"], damaged)


def _current_arrays(checkpoint: Path, part: str) -> dict[str, StoredArray]:
    """As `stored_arrays`. Raises UserError, naming the command that converts, for a checkpoint of an earlier version."""
    if (checkpoint / part).is_dir():
        raise UserError(
            f"{checkpoint} was saved by an earlier version, in Orbax's format. Convert its run once: uv run --extra older "
            f"python -m stages.convert --model {checkpoint.parents[1]}"
        )
    arrays = stored_arrays(checkpoint, part)
    if any(map(JOINED_BEFORE.fullmatch, arrays)):
        raise UserError(
            f"{checkpoint} was saved by an earlier version, with q, k and v in one array. Convert its run once: "
            f"python -m stages.convert --model {checkpoint.parents[1]}"
        )
    return arrays


def stored_arrays(checkpoint: Path, part: str) -> dict[str, StoredArray]:
    """Returns the arrays of one part of a checkpoint by path, unread, after checking that each is there whole."""
    boxes: dict[str, dict[Box, safetensors.StoredTensor]] = {}
    for path in sorted(checkpoint.glob(f"{part}.*safetensors")):
        for name, tensor in safetensors.read_header(path)[0].items():
            box: Box = tuple((0, size) for size in tensor.shape)
            if match := PART_NAME.fullmatch(name):
                name, cuts = match.groups()
                starts, stops = zip(*(map(int, cut.split(":")) for cut in cuts.split(",")))
                box = tuple(zip(starts, stops))
            boxes.setdefault(name, {})[box] = tensor
    arrays = {}
    for name, parts in boxes.items():
        cuts = [sorted({*axis}) for axis in zip(*parts)]  # a sharding cuts each axis, and the parts are all that this makes
        shape = tuple(axis[-1][1] for axis in cuts)
        whole = all(tuple(stop - start for start, stop in box) == tensor.shape for box, tensor in parts.items())
        whole = whole and all([start for start, _ in axis] == [0, *(stop for _, stop in axis[:-1])] for axis in cuts)
        whole = whole and math.prod(map(len, cuts)) == len(parts)
        kinds = {(tensor.dtype, len(tensor.shape)) for tensor in parts.values()}
        if not whole or len(kinds) > 1 or any(name[: slash.start()] in boxes for slash in re.finditer("/", name)):
            raise UserError(f"{checkpoint} is damaged: the parts of {quote(name)} make no array.")
        arrays[name] = StoredArray(shape, safetensors.DTYPES[kinds.pop()[0]], parts)
    return arrays


def _read_tree(where: Path, stored: dict[str, StoredArray], like: Any) -> Any:
    """Returns a tree like `like` of the arrays. Raises UserError for other paths, shapes or dtypes."""
    wanted = _leaves(like)
    _refuse_difference(where, wanted, stored)
    room = max((math.prod(array.shape) * array.dtype.itemsize for array in stored.values()), default=0)
    buffer = np.empty(room + 2 * ALIGNMENT, np.uint8)  # for one after another: new memory for each costs more than reading
    # JAX copies what does not lie at a multiple of 16 bytes; what does, it may take as it lies, whatever `may_alias` says.
    buffer = buffer[-buffer.ctypes.data % ALIGNMENT + 8 :]
    arrays = {name: _read_array(stored[name], leaf.sharding, buffer) for name, leaf in wanted.items()}
    _refuse_difference(where, wanted, arrays)  # without x64, JAX makes 32 bits of 64
    return jax.tree_util.tree_map_with_path(lambda keys, _: arrays[_path(keys)], like)


def _read_array(stored: StoredArray, sharding: Any, buffer: np.ndarray) -> jax.Array:
    """Returns an array placed by its sharding, or on the default device. `buffer`: memory to read into, which JAX copies."""
    places = sharding.addressable_devices_indices_map(stored.shape) if sharding else {None: (slice(None),) * len(stored.shape)}
    parts, read = [], None
    for device, index in places.items():
        if (box := _box(index, stored.shape)) != read:
            shape = [stop - start for start, stop in box]
            out = buffer[: math.prod(shape) * stored.dtype.itemsize].view(stored.dtype).reshape(shape)
            stored.read(box, out)
            read = box
        parts.append(jax.block_until_ready(jax.device_put(out, device, may_alias=False)))
    return jax.make_array_from_single_device_arrays(stored.shape, sharding, parts) if sharding else parts[0]


def _refuse_difference(where: Path, wanted: dict[str, Any], came: dict[str, Any]) -> None:
    kinds = [{name: f"{leaf.dtype} {tuple(leaf.shape)}" for name, leaf in leaves.items()} for leaves in (wanted, came)]
    if differing := sorted({name for name, _ in kinds[0].items() ^ kinds[1].items()}):
        expected, actual = (leaves.get(differing[0], "no such array") for leaves in kinds)
        more = f" ({len(differing) - 1} more arrays differ)" if len(differing) > 1 else ""
        raise UserError(
            f"{where} is of another model: at {differing[0]} {expected} was wanted and {actual} came{more}. Use the config it "
            "was trained with, or another folder."
        )


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
    return Path(folder).absolute() / "checkpoints"


def _newest_intact(folder: Path, skip: str | None = None) -> tuple[Path, list[str]]:
    damaged: list[str] = []
    for step in reversed(steps(folder)):
        path = _root(folder) / str(step)
        if not (lines := manifest.verify(path, skip)):
            return path, damaged
        damaged += lines
    if not damaged:
        raise UserError(f"{folder} has no checkpoint.")
    raise UserError(f"{folder} has no intact checkpoint: {'; '.join(damaged)}. Train anew, or restore the files from a copy.")


def _prng_settings() -> dict[str, Any]:
    return {name: getattr(jax.config, name) for name in ("jax_default_prng_impl", "jax_threefry_partitionable")}
