"""A program that takes too long ends with all that it started, and so does one that runs when a signal ends this process."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.subprocesses import run_program
from tests.interrupts import is_running

# A program that waits for a process of its own, as gcc does for cc1. Both hold the output open.
PARENT = "sleep 900 & echo $! > child.part; mv child.part child; wait"


def has_ended(pid: int) -> bool:
    """Tells whether a process that was killed ends: the kernel takes a moment."""
    end = time.monotonic() + 60
    while is_running(pid):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def test_what_a_program_prints_and_its_code():
    ended = run_program(["sh", "-c", "echo said; echo complained >&2; exit 3"], 300)
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, b"said\n", b"complained\n")


def test_a_program_that_takes_too_long_ends_with_what_it_started(tmp_path):
    noted = tmp_path / "child"
    for seconds in (0.2, 2, 20, 200):  # until it had the time to start the other
        with pytest.raises(subprocess.TimeoutExpired):
            run_program(["sh", "-c", f"cd {tmp_path}; {PARENT}"], seconds)
        if noted.exists():
            break
    assert has_ended(int(noted.read_text()))


def test_a_signal_ends_what_a_program_started(tmp_path):
    code = f"""
import os, signal, threading, time
from pathlib import Path
from engine.subprocesses import run_program
from stages.cli import signals
with signals.handle_signals():
    threading.Thread(target=run_program, args=(["sh", "-c", {PARENT!r}], 900), daemon=True).start()
    while not Path("child").exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(600)
"""
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(root)!r}); {code}"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=300)
    assert ended.returncode == 128 + signal.SIGINT, ended.stderr
    assert has_ended(int((tmp_path / "child").read_text()))
