"""Starts a command: `start_command` answers signals, and is called before a command's other imports.

This file imports little, so that Ctrl-C is answered from a command's first milliseconds on.
"""

# signal.py takes milliseconds to import, in which Ctrl-C would be a traceback
import _signal as signal
import contextlib
import gc
import os
import select
import sys

from engine import sources

FULL_SECONDS = 0.5  # that a sentence waits for a full pipe
phase = "before anything was begun."  # printed after "Stopped" when a signal comes


def start_command() -> None:
    """Answers signals in a sentence, lets this process store programs, and puts garbage collection
    off.

    To be called before anything else of the engine is imported. `run_command` collects garbage
    again, once flags are parsed.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # as nohup has it
        if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
            continue
        signal.signal(number, _stop)
    sources.record()
    gc.disable()  # imports leave no garbage


def write_stderr(sentence: str) -> None:
    """Writes past `print`, which the main thread may be in the middle of; not to a pipe that stays
    full, as nobody reads it.
    """
    stderr = sys.stderr.fileno() if sys.stderr else 2
    with contextlib.suppress(OSError):  # the terminal may be closed
        _, writable, _ = select.select([], [stderr], [], FULL_SECONDS)
        if writable:
            os.write(stderr, f"\n{sentence}\n".encode())


def _stop(number: int, _: object) -> None:
    """Ends the process at a signal before its command is running (`stages.cli.signals`) or after it
    is over.
    """
    write_stderr(f"Stopped {phase}")
    os._exit(128 + number)
