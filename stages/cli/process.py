"""The start and the end of this process."""

import atexit
import contextlib
import os
import sys
import time
from pathlib import Path
from typing import NoReturn

_IMPORTED = time.perf_counter()


def process_start() -> float:
    """Returns the start of this process in `time.perf_counter`; without /proc, of this file's import."""
    with contextlib.suppress(OSError, ValueError, IndexError, AttributeError):
        # Field 22 of stat, in ticks since boot (proc(5)); the command's name before it may hold spaces.
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
        return time.perf_counter() - age
    return _IMPORTED


def leave(code: int) -> NoReturn:
    """Ends the process, its exit functions run, without taking the interpreter down, when signals have no sentence."""
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        code = code or 120  # as Python says it
    os._exit(code)
