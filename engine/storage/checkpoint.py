"""Saves checkpoints beside training, from which `checkpoint_reader.py` resumes a run bit for bit.

    FOLDER/checkpoints/STEP/params.safetensors      the weights by path, such as `blocks/0/q`; inference reads this alone
                            adapter_*               of a LoRA run, in its place: the adapter in PEFT's layout (`adapter.py`)
                            optimizer.safetensors   the optimizer's state, by path
                            state.json              step, PRNG settings, and the caller's state
                            manifest.json           SHA-256 of every file above

Each of several processes writes its own parts of the arrays: process 1 in params.1.safetensors,
where `blocks/0/q[0:64,0:96]` is rows 0 to 63 and columns 0 to 95. An adapter is small, and process
0 writes it whole.

A checkpoint is built in a hidden folder, read back from the disk and compared with memory, and
appears by one rename: a kill at any instant leaves the older ones and no partial one.
"""

import concurrent.futures
import contextlib
import errno
import functools
import json
import mmap
import os
import re
import shutil
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from engine import manifest
from engine.counting.hardware import free_host_bytes
from engine.errors import UserError
from engine.files import UNFINISHED, atomic_folder, folder_lock, make_folder
from engine.mesh import processes
from engine.model.paths import array_paths, leaf_paths
from engine.storage import adapter, safetensors_writer
from engine.storage.adapter import SavedAdapter
from engine.storage.adapter_writer import adapter_tensors

SAVE_TOPIC = "save"  # the thread's own, see `gather_strings`
# the name of a part of an array
PART_NAME = re.compile(r"(.+)\[(\d{1,15}:\d{1,15}(?:,\d{1,15}:\d{1,15})*)\]")
NICENESS = 5  # of the thread that writes, which takes time from the steps on a CPU
ALIGNMENT = 64  # bytes
TOUCH = 2**24  # bytes at once of new memory

Box = tuple[tuple[int, int], ...]  # [start, stop) along each axis
Pieces = dict[str, Any]  # arrays that this process writes, by their names in its file


# What a process writes


def own_pieces(name: str, leaf: Any) -> Pieces:
    """Returns what this process writes of a leaf: all of it, or parts where the leaf lies on
    several processes.

    Of processes that hold the same part one writes it. Raises TypeError or ValueError for a leaf
    that could not be loaded.
    """
    dtype = getattr(leaf, "dtype", None)
    if dtype not in safetensors_writer.NAMES:
        raise TypeError(f"save: {name} is a {type(leaf).__name__} of {dtype}, which no file can hold.")
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise TypeError(f"save: {name} is {dtype}, of which JAX would keep 32 bits when it is loaded.")
    if PART_NAME.fullmatch(name):
        raise ValueError(f"save: {name} would be taken for a part of an array.")
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        if processes.is_first():
            return {name: leaf}
        return {}
    boxes = {box_of(index, leaf.shape) for index in leaf.sharding.devices_indices_map(leaf.shape).values()}
    # of the devices that hold the same part
    chosen = zlib.crc32(name.encode()) % (leaf.sharding.num_devices // len(boxes))
    pieces = {}
    for shard in leaf.addressable_shards:
        if shard.replica_id != chosen:
            continue
        piece_name = name
        if shard.data.shape != leaf.shape:
            cut = ",".join(f"{start}:{stop}" for start, stop in box_of(shard.index, leaf.shape))
            piece_name = f"{name}[{cut}]"
        pieces[piece_name] = shard.data
    return pieces


def box_of(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape))


class BackgroundSaver:
    """Saves the checkpoints of one run folder, one at a time, while training goes on.

    `frozen`: params that never change. `adapted`: what is said of the adapter that a LoRA run
    trains; None for weights.

    The copies lie in one mapping that is made once: touching new memory takes ten times as long as
    copying, and in the heap they would end up above a step's buffer. The end of a `with` block
    waits for the last write, whose failure is raised unless another error leaves the block.
    """

    def __init__(
        self, folder: Path, keep: int, frozen: Any = None, adapted: SavedAdapter | None = None
    ) -> None:
        self.folder = folder
        self.keep = keep
        self.frozen = frozen
        self.adapted = adapted
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "save", _lower_priority)
        self._work: concurrent.futures.Future | None = None
        self._memory: mmap.mmap | None = None
        self._used = 0  # bytes of it

    def reserve(self, trainable: Any, optimizer: Any) -> None:
        """Begins to make room for copies of such trees, unless memory is too small for them."""
        size = _own_bytes(optimizer)
        if self.adapted is None:
            size += _own_bytes(trainable)
        elif processes.is_first():  # which writes all of an adapter
            size += sum(leaf.nbytes + ALIGNMENT for leaf in jax.tree.leaves(trainable))
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

    def save(
        self, step: int, trainable: Any, optimizer: Any, state: dict[str, Any], best: int | None = None
    ) -> None:
        """Waits for the write before this one, copies the arrays, and begins to write them as
        `write` does.

        The arrays may be donated or changed once this returns; without room for a copy it returns
        when they are written. Raises the UserError of the write before.
        """
        self.wait()
        self._used = 0
        parts = {"optimizer": self._copies(optimizer)}
        if self.adapted is None:
            parts["params"] = self._copies(trainable)
            for name, leaf in array_paths(self.frozen).items():
                parts["params"] |= own_pieces(name, leaf)
        else:
            parts[adapter.PART] = self._adapter_copies(trainable)
        self._work = self._pool.submit(
            write, self.folder, step, parts, state, keep=self.keep, best=best, adapted=self.adapted
        )
        if self._memory is None:
            self.wait()

    def _adapter_copies(self, trainable: Any) -> Pieces:
        tensors = _whole_adapter(trainable)
        if not processes.is_first():
            return {}
        if self._memory is None:
            return tensors
        return {name: self._copy(tensor) for name, tensor in tensors.items()}

    def _copies(self, tree: Any) -> Pieces:
        copies: Pieces = {}
        for name, leaf in array_paths(tree).items():
            pieces = own_pieces(name, leaf)
            if self._memory is not None:
                pieces = {piece: self._copy(x) for piece, x in pieces.items()}
            copies |= pieces
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
        """Returns whether a checkpoint is being written; raises the error of a write that has
        failed. Never waits.
        """
        if self._work is not None and self._work.done():
            self.wait()
        return self._work is not None

    def wait(self) -> None:
        """Waits until the last checkpoint is on the disk. Raises UserError when it could not be written."""
        if self._work is not None:
            # an exception from a signal leaves it to the next call
            concurrent.futures.wait([self._work])
            work = self._work
            self._work = None
            work.result()

    def __enter__(self) -> "BackgroundSaver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.wait()
        finally:
            # After an error the thread may wait for other processes, which this one has to end.
            self._pool.shutdown(wait=error is None or processes.process_count() == 1)
            self._memory = None


def _own_bytes(tree: Any) -> int:
    """Returns the bytes of copies of what this process writes of a tree."""
    size = 0
    for name, leaf in array_paths(tree).items():
        for piece in own_pieces(name, leaf).values():
            size += piece.nbytes + ALIGNMENT
    return size


def _lower_priority() -> None:
    if sys.platform.startswith("linux"):  # where it is a thread's own
        os.nice(NICENESS)


# Writing


def _whole_adapter(trainable: Any) -> dict[str, np.ndarray]:
    """Returns the tensors of an adapter by PEFT's names, in every process: all must come here."""
    if processes.process_count() > 1:
        from jax.experimental.multihost_utils import process_allgather

        trainable = process_allgather(trainable, tiled=True)
    return adapter_tensors(leaf_paths(trainable))


def write(
    folder: Path,
    step: int,
    parts: dict[str, Pieces],
    state: dict[str, Any],
    *,
    keep: int,
    best: int | None = None,
    adapted: SavedAdapter | None = None,
) -> Path:
    """Writes `folder/checkpoints/STEP` durably, then removes all but the newest `keep` and step
    `best`; returns its path.

    parts: {"params": ..., "optimizer": ...} of `own_pieces`, which must not change until this
    returns; of an adapter, of which `adapted` says more, {adapter.PART: ..., "optimizer": ...}.
    state: JSON, so tuples come back as lists. A checkpoint of the same step is replaced; later ones
    are neither counted nor removed.

    Raises UserError, naming the path and the bytes wanted, when the disk refuses or gives back
    other bits; older checkpoints stay. Raises TypeError or ValueError, before anything is written,
    for a state that is not JSON. Where one of several processes fails, the others wait for it until
    it ends all.
    """
    record = json.dumps({"step": step, "prng": prng_settings(), "state": state}, indent=1, allow_nan=False)
    target = checkpoints_of(folder) / str(step)
    own_bytes = 0
    for pieces in parts.values():
        own_bytes += sum(piece.nbytes for piece in pieces.values())
    wanted = sum(map(int, processes.gather_strings(str(own_bytes), SAVE_TOPIC)))
    try:
        with _building(target, wanted, keep, best) as building:
            write_files(building, parts, record.encode() + b"\n", adapted)
        processes.gather_strings(topic=SAVE_TOPIC)  # until process 0 has committed
    except OSError as error:
        raise UserError(
            f"Checkpoint {target} could not be written ({wanted / 1e6:,.1f} MB wanted): "
            f"{error.strerror or error}. Earlier checkpoints are untouched; "
            "make room, or choose another folder."
        ) from error
    return target


def write_files(
    building: Path, parts: dict[str, Pieces], record: bytes, adapted: SavedAdapter | None
) -> None:
    """Writes this process's files of a checkpoint and reads them back; process 0 writes the JSON
    files and the manifest.
    """
    mark = ""  # of a process, in the names of its files
    if not processes.is_first():
        mark = f".{jax.process_index()}"
    entries = {}
    for part, pieces in parts.items():
        metadata: dict[str, str] = {}
        if adapted and part == adapter.PART:
            if not pieces:
                continue
            metadata = adapted.metadata
        name = f"{part}{mark}.safetensors"
        encode = functools.partial(safetensors_writer.encode, pieces, pieces.values(), metadata)
        entries[name] = manifest.write_read_back(building / name, encode)
    entries_of_all = processes.gather_strings(json.dumps(entries), SAVE_TOPIC)
    if not processes.is_first():
        return
    texts = {"state.json": record}
    if adapted:
        texts[adapter.CONFIG] = json.dumps(adapted.config(), indent=1).encode() + b"\n"
    for entries_of_one in entries_of_all:
        entries |= json.loads(entries_of_one)
    for name, data in texts.items():
        entries[name] = manifest.write_read_back(building / name, functools.partial(_one_array, data))
    (building / manifest.NAME).write_bytes(manifest.render(entries))


def _one_array(data: bytes) -> list[np.ndarray]:
    return [np.frombuffer(data, np.uint8)]


@contextlib.contextmanager
def _building(target: Path, wanted: int, keep: int, best: int | None) -> Iterator[Path]:
    """Gives all processes a folder to write in, which process 0 makes and renames to `target`; then
    removes old checkpoints.

    Raises OSError when fewer than `wanted` bytes are free.
    """
    if not processes.is_first():
        yield Path(processes.gather_strings(topic=SAVE_TOPIC)[0])
        return
    root = target.parent
    step = int(target.name)
    make_folder(root)
    with folder_lock(root):
        disk = shutil.disk_usage(root)
        if disk.total > 0 and disk.free < wanted:  # some network file systems know neither
            raise OSError(errno.ENOSPC, f"{disk.free / 1e6:,.1f} MB are free")
        with atomic_folder(target) as building:
            processes.gather_strings(str(building), SAVE_TOPIC)
            yield building
        up_to_this = [earlier for earlier in steps(root.parent) if earlier <= step]
        for old in up_to_this[:-keep]:
            if old == best:
                continue
            # Hidden by one rename, so that a kill leaves nothing that looks like a checkpoint.
            with contextlib.suppress(OSError):  # the next save tries again
                hidden = (root / str(old)).rename(root / f".{old}.gone{UNFINISHED}")
                shutil.rmtree(hidden, ignore_errors=True)


def steps(folder: Path) -> list[int]:
    """Returns the steps that a run folder has checkpoints of, intact or not, oldest first."""
    folders = (entry for entry in checkpoints_of(folder).glob("*") if entry.is_dir())
    return sorted(int(entry.name) for entry in folders if re.fullmatch(r"0|[1-9][0-9]*", entry.name))


def checkpoints_of(folder: Path) -> Path:
    return Path(folder).absolute() / "checkpoints"


def prng_settings() -> dict[str, Any]:
    names = ("jax_default_prng_impl", "jax_threefry_partitionable")
    return {name: getattr(jax.config, name) for name in names}
