"""The commands, a file or a package each. Under `python -m` it answers signals from here on.

`python -m stages` lists them. A command parses flags, wires the engine, loops and prints.
"""

import _signal as signal  # signal.py takes milliseconds to import, in which Ctrl-C would be a traceback
import contextlib
import gc
import os
import select
import sys

from engine import sources

FULL_SECONDS = 0.5  # that a sentence waits for a full pipe
phase = "before anything was begun."  # printed after "Stopped" by `stop`


def write_stderr(sentence: str) -> None:
    """Writes past `print`, which the main thread may be in the middle of; not to a pipe that stays full, as nobody reads it."""
    stderr = sys.stderr.fileno() if sys.stderr else 2
    with contextlib.suppress(OSError):  # the terminal may be closed
        if select.select([], [stderr], [], FULL_SECONDS)[1]:
            os.write(stderr, f"\n{sentence}\n".encode())


def stop(number: int, _: object) -> None:
    """Ends the process at a signal before its command is running (`stages.cli.signals`) or after it is over."""
    write_stderr(f"Stopped {phase}")
    os._exit(128 + number)


# While `python -m` looks for a module, argv[0] is "-m": a program that merely imports this package is left alone.
if sys.argv[:1] == ["-m"]:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, stop)
    sources.record()
    gc.disable()  # imports leave no garbage: `run_command` enables it again once the flags are parsed
