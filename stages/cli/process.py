"""The start and the end of this process."""

import atexit
import contextlib
import errno
import io
import os
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

_IMPORTED = time.perf_counter()


def process_start() -> float:
    """Returns the start of this process in `time.perf_counter`; without /proc, of this file's import."""
    with contextlib.suppress(OSError, ValueError, IndexError, AttributeError):
        # Field 22 of stat, in ticks since boot (proc(5)); the command's name before it may hold spaces.
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
        return time.perf_counter() - age
    return _IMPORTED


class _Terminal(io.FileIO):
    """A terminal to print on: once it is closed, what is printed is dropped."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return len(data)


def outlive_terminal() -> None:
    """Lets this process print on, and save what it does, when the terminal is closed or lacks a character (it is escaped)."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="backslashreplace")
    for name in ("stdout", "stderr"):
        if (stream := getattr(sys, name)) and stream.isatty():
            stream.flush()
            buffer = io.BufferedWriter(_Terminal(stream.fileno(), "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(buffer, stream.encoding, stream.errors, line_buffering=True))


def leave(code: int) -> NoReturn:
    """Ends the process, its exit functions run, without taking the interpreter down, when signals have no sentence."""
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        code = code or 120  # as Python says it
    os._exit(code)
