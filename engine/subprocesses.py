"""Runs a program for a limited time, and kills it with all that it started, also when a signal ends this process."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence

_groups: set[int] = set()  # of the programs that run


def run_program(
    command: Sequence[str], seconds: float, files: Sequence[int] = ()
) -> subprocess.CompletedProcess[bytes]:
    """Runs a program that inherits the open `files`, and returns its exit code and output.

    Raises subprocess.TimeoutExpired after so many seconds, once the program and all that it
    started are killed, and OSError when it cannot be started.
    """
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=pipe,
        stderr=pipe,
        pass_fds=files,
        start_new_session=True,
    ) as process:
        _groups.add(process.pid)
        try:
            output, errors = process.communicate(timeout=seconds)
        except BaseException:
            _kill_group(process.pid)
            raise
        finally:
            _groups.discard(process.pid)
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def kill_programs() -> None:
    """Kills the programs that run, and all that they started. Ctrl-C in a terminal does not reach
    them.
    """
    for group in [*_groups]:
        _kill_group(group)


def _kill_group(group: int) -> None:
    # of a group that has ended
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
