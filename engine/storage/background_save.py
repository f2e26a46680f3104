"""Saves checkpoints while training goes on: copies the state to host memory, and writes the copy in a thread."""

import concurrent.futures
import contextlib
import mmap
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from engine.counting.hardware import free_host_bytes
from engine.mesh import processes
from engine.storage import checkpoint, orbax_arrays

NICENESS = 5  # of the thread that writes, which takes time from the steps on a CPU
ALIGNMENT = 64  # bytes
TOUCH = 2**24  # bytes at once of new memory


class BackgroundSaver:
    """Saves the checkpoints of one run folder, one at a time. `to_saved` makes params of what trains.

    The copies lie in one mapping that is made once: touching new memory takes ten times as long as copying. In the heap they
    would end up above a step's buffer.

    Use it in a `with` block: its end waits for the last write, whose failure is raised unless another error leaves the block.
    """

    def __init__(self, folder: Path, keep: int, to_saved: Callable[[Any], Any] = lambda trainable: trainable) -> None:
        self.folder, self.keep, self.to_saved = folder, keep, to_saved
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "save", _lower_priority)
        self._work: concurrent.futures.Future | None = None
        self._memory: mmap.mmap | None = None

    def reserve(self, *trees: Any) -> None:
        """Begins to make room for copies of such trees, beside training, unless memory is too small for them."""
        size = sum(map(_copied_bytes, jax.tree.leaves(trees)))
        if size <= free_host_bytes():
            self._work = self._pool.submit(self._map_memory, size)

    def _map_memory(self, size: int) -> None:
        if processes.process_count() > 1:  # whose steps would wait for it at the first save
            orbax_arrays.import_orbax()
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
        """Waits for the write before this one, copies the arrays, and begins to write them as `checkpoint.save_in_parts` does.

        For an array may stand a call that makes it: one is held at a time, if there is room for the copy. The arrays may be
        donated or changed as soon as this returns. Without that room it returns when they are written. Raises the UserError
        of the write before.
        """
        self.wait()
        if self._memory is not None:
            trainable, optimizer = _copy_arrays((trainable, optimizer), self._memory)
        else:
            trainable, optimizer = jax.tree.map(_made, (trainable, optimizer))
        params = self.to_saved(trainable)
        parts = checkpoint.save_in_parts(self.folder, step, params, optimizer, state, keep=self.keep, best=best)
        self._pool.submit(next, parts).result()  # there, so that Orbax's own threads have its priority
        self._work = self._pool.submit(next, parts)
        if self._memory is None:
            self.wait()

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


def _copied_bytes(leaf: Any) -> int:
    """Returns the bytes that `_copy_arrays` takes for an array: of this process's distinct parts of it."""
    if not orbax_arrays.is_shared(leaf):
        return _aligned(leaf.nbytes)
    parts = {shard.index: shard.data.nbytes for shard in leaf.addressable_shards}
    return sum(map(_aligned, parts.values())) if jax.default_backend() == "cpu" else 0


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _made(leaf: Any) -> Any:
    return leaf() if callable(leaf) else leaf


def _copy_arrays(tree: Any, memory: mmap.mmap) -> Any:
    """Returns the tree with copies of its arrays, one after another in `memory`: NumPy's, or JAX's of several processes."""
    leaves, structure = jax.tree.flatten(tree)
    start = 0

    def copy(x: Any) -> np.ndarray:
        nonlocal start
        place = np.frombuffer(memory, x.dtype, x.size, start).reshape(x.shape)
        start += _aligned(x.nbytes)
        if not isinstance(x, jax.Array):
            place[...] = x
            return place
        for shard in x.addressable_shards:
            if shard.replica_id == 0:
                place[shard.index] = np.asarray(shard.data)
        return place

    def copy_leaf(leaf: Any) -> Any:
        leaf = _made(leaf)
        return _copy_shared(leaf, copy) if orbax_arrays.is_shared(leaf) else copy(leaf)

    copies = [copy_leaf(leaf) for leaf in leaves]
    return jax.block_until_ready(jax.tree.unflatten(structure, copies))


def _copy_shared(leaf: jax.Array, copy: Callable[[Any], np.ndarray]) -> jax.Array:
    """Returns an array of several processes with this process's parts in host memory.

    On a CPU each distinct part is copied once, and JAX takes it as it lies there, aligned. Elsewhere JAX copies the part of
    every device to pinned memory.
    """
    if jax.default_backend() != "cpu":
        return jax.device_put(leaf, leaf.sharding.with_memory_kind("pinned_host"))
    parts: dict[Any, np.ndarray] = {}
    for shard in leaf.addressable_shards:
        if shard.index not in parts:
            parts[shard.index] = copy(shard.data)
    arrays = [jax.device_put(parts[shard.index], shard.device) for shard in leaf.addressable_shards]
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, arrays)
