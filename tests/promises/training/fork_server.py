"""Runs commands of this project in processes that need not import JAX again: a few tenths of a second each.

A server imports all that training needs, while it has one thread and before JAX has started
anything; each command is a fork of it, so what lies on disk afterwards, and how it ends, is what a
process of its own would have left. `ForkServer` talks to one.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

from tests import faults

ROOT = Path(__file__).resolve().parents[3]


class ForkServer:
    """One server, and one command at a time. `library`: faults.c, compiled, for commands with a fault."""

    def __init__(self, library: Path, **env: str) -> None:
        env = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            **env,
        }
        env |= {"LD_PRELOAD": str(library), "FAULTS": str(library)}
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, stage: str, words: list[str], output: Path, fault: Any, patch: str, **env: str) -> int:
        """Starts `python -m stages.STAGE WORDS` with its output in a file; returns its process id.

        fault: the arguments of `faults.arm`. patch: code to run before the command.
        """
        assert self.process.stdin is not None
        job = {
            "stage": stage,
            "words": words,
            "output": str(output),
            "fault": fault,
            "patch": patch,
            "env": env,
        }
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return self._number()

    def wait(self) -> int:
        """Returns the command's exit code, negative for the signal that ended it."""
        return self._number()

    def close(self) -> None:
        self.process.communicate()

    def _number(self) -> int:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"The fork server ended with {self.process.wait()}.")
        return int(line)


def serve() -> None:
    """Forks a process for each line of stdin, which carries out its command and exits."""
    os.environ.pop("LD_PRELOAD")  # whatever a command starts is not counted
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGHUP,
    ):  # as under `python -m`, and behind nohup too
        signal.signal(number, importlib.import_module("stages").stop)
    importlib.import_module("stages.train.run")
    for line in sys.stdin:
        threads = len(os.listdir("/proc/self/task"))
        if threads > 1:
            raise RuntimeError(
                f"A fork of a process with {threads} threads would not be a process of its own."
            )
        if pid := os.fork():
            print(pid, flush=True)
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        else:
            carry_out(json.loads(line))


def carry_out(job: dict[str, Any]) -> NoReturn:
    """Becomes the command of a job."""
    os.environ |= job["env"]
    output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for handle in (1, 2):
        os.dup2(output, handle)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    stage = importlib.import_module(f"stages.{job['stage']}.__main__")
    sys.argv = [stage.__file__ or "", *job["words"]]
    exec(job["patch"], {})
    faults.arm(*job["fault"])
    importlib.import_module("stages.cli.command").leave(stage.main())


if __name__ == "__main__":
    serve()
