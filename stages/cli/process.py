"""Tells when this process began, for "from the command to the first step"; and keeps NumPy to one thread."""

import contextlib
import os
import time
from pathlib import Path

_IMPORTED = time.perf_counter()


def process_start() -> float:
    """Returns the moment this process began, by `time.perf_counter`; where there is no /proc, the import of this file."""
    with contextlib.suppress(OSError, ValueError, IndexError, AttributeError):
        # Field 22 of stat, in ticks since boot (proc(5)); the command's name before it may hold spaces.
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
        return time.perf_counter() - age
    return _IMPORTED


def use_one_numpy_thread() -> None:
    """Makes NumPy's products run in the calling thread. Works until NumPy is imported; JAX is not concerned."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
