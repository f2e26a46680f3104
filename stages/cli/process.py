"""The start time of this process."""

import contextlib
import os
import time
from pathlib import Path

_IMPORTED = time.perf_counter()


def process_start() -> float:
    """Returns the start of this process in `time.perf_counter`; without /proc, of this file's import."""
    with contextlib.suppress(OSError, ValueError, IndexError, AttributeError):
        # Field 22 of stat, in ticks since boot (proc(5)); the command's name before it may hold spaces.
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
        return time.perf_counter() - age
    return _IMPORTED
