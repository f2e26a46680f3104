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
from engine.storage import checkpoint

NICENESS = 5  # of the thread that writes, which takes time from the steps on a CPU; at 10 it needed over a minute for 1.6 GB
ALIGNED = 64  # bytes
TOUCHED = 2**24  # bytes at once of new memory


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
        size = sum(map(_aligned_bytes, jax.tree.leaves(trees)))
        if size <= free_host_bytes():
            self._work = self._pool.submit(self._map_memory, size)

    def _map_memory(self, size: int) -> None:
        try:
            memory = mmap.mmap(-1, size)
        except OSError:  # a limit on memory that is not the machine's
            return
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them
                memory.madvise(mmap.MADV_HUGEPAGE)
        for start in range(0, size, TOUCHED):
            np.frombuffer(memory, np.uint8)[start : start + TOUCHED : mmap.PAGESIZE] = 0
        self._memory = memory

    def save(self, step: int, trainable: Any, optimizer: Any, state: dict[str, Any], best: int | None = None) -> None:
        """Waits for the write before this one, copies the arrays, and begins to write them as `checkpoint.save` does.

        The arrays may be donated or changed as soon as this returns. Without room for the copy it returns when they are
        written. Raises the UserError of the write before.
        """
        self.wait()
        if self._memory is not None:
            trainable, optimizer = _copy_arrays((trainable, optimizer), self._memory)
        self._work = self._pool.submit(
            lambda: checkpoint.save(self.folder, step, self.to_saved(trainable), optimizer, state, keep=self.keep, best=best)
        )
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
            self._pool.shutdown()
            self._memory = None


def _lower_priority() -> None:
    if sys.platform.startswith("linux"):  # where it is a thread's own
        os.nice(NICENESS)


def _aligned_bytes(leaf: Any) -> int:
    return -(-leaf.nbytes // ALIGNED) * ALIGNED


def _copy_arrays(tree: Any, memory: mmap.mmap) -> Any:
    """Returns the tree with NumPy copies of its arrays, one after another in `memory`."""
    leaves, structure = jax.tree.flatten(tree)
    copies, start = [], 0
    for leaf in leaves:
        copy = np.frombuffer(memory, leaf.dtype, leaf.size, start).reshape(leaf.shape)
        if isinstance(leaf, jax.Array):
            for shard in leaf.addressable_shards:
                if shard.replica_id == 0:
                    copy[shard.index] = np.asarray(shard.data)
        else:
            copy[...] = leaf
        copies.append(copy)
        start += _aligned_bytes(leaf)
    return jax.tree.unflatten(structure, copies)
