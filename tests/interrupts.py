"""Ends a run of tests within ten seconds of SIGINT, with all that it started, also where the run began in the background.

A shell that is no terminal's has its background jobs ignore SIGINT, Python then installs no handler
for it, and what they start inherits that. And `kill -INT` reaches one process, where Ctrl-C reaches
xdist's workers and the servers of their tests too.
"""

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

import pytest

# seconds in which the workers may end by themselves, and their fixtures end what they started
POLITE = 5.0
LEFT = 2.0  # seconds more for this process, once they are killed

_started: set[tuple[int, str]] = (
    set()
)  # what this process had started when it was interrupted: numbers and start times


def pytest_configure() -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_keyboard_interrupt() -> None:
    """Passes the signal on to all that this process started, and sees to it that they and it end."""
    _started.update(_descendants())
    _signal_started(signal.SIGINT)
    threading.Thread(target=_end, daemon=True).start()


@pytest.hookimpl(trylast=True)  # once xdist has waited for its workers
def pytest_unconfigure() -> None:
    _signal_started(signal.SIGKILL)


def _end() -> None:
    """Kills what is left. A worker in a long call of C hears no signal, and xdist would wait for it
    a quarter of a minute.
    """
    time.sleep(POLITE)
    _started.update(_descendants())
    _signal_started(signal.SIGKILL)
    time.sleep(LEFT)
    os._exit(pytest.ExitCode.INTERRUPTED)


def _signal_started(number: int) -> None:
    """Sends a signal to each process of `_started` that still runs, and not to another that got its
    number since.
    """
    for pid, start_time in _started:
        if _status(pid)[1] == start_time:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def _descendants() -> set[tuple[int, str]]:
    """Returns the number and start time of each process that this one or one of its own started;
    none without /proc.
    """
    processes = {int(folder.name): _status(int(folder.name)) for folder in Path("/proc").glob("[0-9]*")}
    family = {os.getpid()}
    grows = True
    while grows:
        children = {pid for pid, (parent, _) in processes.items() if parent in family}
        grows = not children <= family
        family |= children
    return {(pid, processes[pid][1]) for pid in family - {os.getpid()}}


def _status(pid: int) -> tuple[int, str]:
    """Returns the parent and the start time of a process (fields 4 and 22 of stat in proc(5)); (0,
    "") when it is gone.
    """
    try:
        # The command's name before them may hold spaces.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0, ""
    return int(fields[1]), fields[19]


def is_running(pid: int) -> bool:
    """Tells whether a process is there, and not only its exit code."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
