"""Starts one run in several real processes on this machine, over gloo, and waits for what they do."""

import os
import random
import re
import socket
import subprocess
import sys
import time

import pytest

from engine.mesh.processes import ANNOUNCED
from engine.storage import checkpoint
from tests.stages.tiny_runs import ROOT, typed

STEPS = 24
FLAGS = (
    "--steps",
    STEPS,
    "--dtype",
    "float32",
    "--optimizer",
    "adamw",
    "--save-every",
    4,
    "--log-every",
    1,
    "--eval-every",
    15,
    "--device",
    "cpu",
)
# JAX keeps the programs of process 0 alone, and another's are others, as its devices are: they
# would be compiled in each test.
KEEPS_PROGRAMS = """
from types import SimpleNamespace
import stages.cli.lifecycle as lifecycle
join = lifecycle.join
def join_and_keep(*arguments):
    join(*arguments)
    from jax._src import compiler
    compiler.distributed = SimpleNamespace(global_state=SimpleNamespace(process_id=0, client=None))
lifecycle.join = join_and_keep
"""


def free_port() -> int:
    """Returns a port that nothing listens at: below those that the system deals out, which another
    test may get meanwhile.
    """
    while True:
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", port := random.randrange(20_000, 30_000)))
            except OSError:
                continue
            return port


@pytest.fixture
def start():
    """Starts `python -m stages.STAGE` in several processes, and ends what is left of them.

    `own(i)`: more flags of process i; `patch(i)`: code that it runs before the command. With
    `announces` they find one another by variables, as under Kubeflow's Trainer, and not by flags.
    """
    started: list[subprocess.Popen] = []

    def start(count, stage, *args, own=lambda process: (), patch=lambda process: "", announces=False):
        address = f"127.0.0.1:{free_port()}"
        for process in range(count):
            join, environment = (), dict(os.environ)
            if announces:
                environment |= dict(zip(ANNOUNCED, (address, str(count), str(process))))
            elif count > 1:
                join = ("--processes", count, "--process", process, "--coordinator", address)
            words = typed(stage, *args, *join, *own(process))
            if code := KEEPS_PROGRAMS * (process > 0) + patch(process):
                run = f"from stages.cli.command import leave\nfrom stages.{stage}.__main__ import main\nleave(main())"
                words = [sys.executable, "-c", f"{code}\n{run}", *words[3:]]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            started.append(subprocess.Popen(words, cwd=ROOT, env=environment, **pipes))
        return started[-count:]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def until(happened, processes):
    """Waits until `happened()`, while all processes run."""
    while not happened():
        assert all(process.poll() is None for process in processes), [
            process.communicate() for process in processes
        ]
        time.sleep(0.02)


def until_saved(folder, step, processes):
    """Waits for a checkpoint of a step or later."""
    until(lambda: any(saved >= step for saved in checkpoint.steps(folder)), processes)


def finish(processes):
    """Returns the exit codes that occur, and stderr of each. Only process 0 prints."""
    outputs = [process.communicate() for process in processes]
    assert not any(
        printed
        for process, (printed, _) in zip(processes, outputs)
        if re.search("--process [1-9]", " ".join(process.args))
    )
    return {process.returncode for process in processes}, [error for _, error in outputs]
