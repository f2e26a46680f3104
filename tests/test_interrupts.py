"""A run of tests in the background, where SIGINT is ignored, ends at SIGINT with all that its tests started."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.interrupts import is_running

# A server that ignores SIGINT, as whatever a background job starts does; then a call of C, which no
# handler interrupts.
WAITS = """
import ctypes, os, subprocess, sys
from pathlib import Path

def test_waits():
    server = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(2, signal.SIG_IGN); time.sleep(900)"])
    Path("waiting.part").write_text(f"{os.getpid()} {server.pid}")
    os.rename("waiting.part", "waiting")
    WAIT
"""
IGNORES_SIGINT = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
PATIENCE = 300  # seconds: without the handler it would be fifteen minutes

PROMISED = 10  # seconds from the signal to the end of all that was started


@pytest.mark.parametrize(
    ("workers", "wait"),
    [(1, "ctypes.PyDLL(None).sleep(900)"), (0, "__import__('time').sleep(900)")],
    ids=["worker", "alone"],
)
def test_a_run_in_the_background_ends_with_all_it_started(workers, wait, tmp_path):
    (tmp_path / "test_waits.py").write_text(WAITS.replace("WAIT", wait))
    options = [
        "-q",
        "-c",
        os.devnull,
        "--rootdir",
        tmp_path,
        "-p",
        "no:cacheprovider",
        "-p",
        "tests.interrupts",
        "-n",
        workers,
    ]
    words = [sys.executable, "-c", IGNORES_SIGINT, sys.executable, "-m", "pytest", *options, "test_waits.py"]
    env = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTEST_PLUGINS": "xdist",
    }
    started: list[int] = []
    with subprocess.Popen(
        [*map(str, words)], cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as run:
        try:
            until(lambda: (tmp_path / "waiting").exists() or run.poll() is not None)
            started += [int(number) for number in (tmp_path / "waiting").read_text().split()]
            run.send_signal(signal.SIGINT)
            signalled = time.monotonic()
            printed = run.communicate(timeout=PATIENCE)[0].decode()
            assert run.returncode == pytest.ExitCode.INTERRUPTED, printed
            until(lambda: not any(is_running(pid) for pid in started))
            assert time.monotonic() - signalled < PROMISED
        finally:
            run.kill()
            for pid in filter(is_running, started):
                os.kill(pid, signal.SIGKILL)


def until(happened):
    end = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.05)
