"""How processes join, and the sentences for each way in which that fails; one that aborts says one sentence."""

import socket
import subprocess
import sys

import jax
import pytest
from jax._src.clusters.mpi4py_cluster import Mpi4pyCluster
from tiny_runs import ROOT, tiny

from engine.errors import UserError
from engine.mesh import processes
from engine.mesh.processes import MISTAKE, RESTART, _explain_abort, find_coordinator, join
from stages import by_hand
from stages.train import __main__ as train
from stages.train.run import Training


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "::"])
def test_a_port_that_is_taken(address):
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as taken:
        taken.bind((address, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"cannot listen at \[::\]:{port}: Address already in use"):
            find_coordinator(2, 0, f"127.0.0.1:{port}", 1.0)


def test_processes_that_count_themselves_differently(monkeypatch):
    starts: list[dict] = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **options: starts.append(options))
    for name in ("handle_abort", "begin"):
        monkeypatch.setattr(processes, name, lambda *_: None)
    monkeypatch.setattr(processes, "gather_strings", lambda own: [own, own.replace("2", "3")])
    with pytest.raises(UserError, match=r"Process 1 has another --processes \(3\) than process 0 \(2\)"):
        join("127.0.0.1:0", 2, 0, 0.4)
    assert starts[0]["initialization_timeout"] == 1, "rounded up: 0 would be for ever"


def test_a_coordinator_without_a_port(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host")
    with pytest.raises(UserError, match="The coordinator host has no port"):
        find_coordinator(2, 1, None, 1.0)


def test_open_mpi_5_wants_mpi4py(monkeypatch):
    monkeypatch.setattr(Mpi4pyCluster, "is_env_present", lambda: False)
    for name, value in {"WORLD_SIZE": 2, "WORLD_RANK": 0, "WORLD_LOCAL_RANK": 0}.items():
        monkeypatch.setenv(f"OMPI_COMM_{name}", str(value))
    with pytest.raises(UserError, match="Open MPI 5 says which process this is only through mpi4py"):
        find_coordinator(None, None, None, 1.0)


def test_by_hand_there_is_one_process(monkeypatch, failing, text):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    assert "Training by hand runs in one process" in failing(by_hand.main, ["--data", str(text)])


def test_a_process_that_ends_before_it_has_loaded_says_how_to_go_on(monkeypatch, failing, text, tmp_path):
    def end(*_):
        raise UserError(processes._group.describe_saved())

    monkeypatch.setattr(Training, "__init__", end)
    assert "To go on: python -m stages.train" in failing(train.main, tiny(text, tmp_path / "run"))


@pytest.mark.parametrize(
    ("written", "activity", "code", "sentence"),
    [
        (
            "tasks are unhealthy (stopped sending heartbeats):\n1\n12\nThe tasks",
            "step 3",
            RESTART,
            "Process 2 lost process 1, 12,",
        ),
        ("UNAVAILABLE: Failed to send RPC to coordination service.", "step 3", RESTART, "Process 2 lost process 0,"),
        ("terminate called: gloo::IoException", "step 3", RESTART, "Process 2 lost another one,"),
        ("ABORTED: 1 unexpectedly tried to connect with", "", MISTAKE, "Process 1 was started twice"),
        ("ABORTED: 1 unexpectedly tried to connect with", "step 3", RESTART, "Process 1 was started twice"),
        ("ABORTED: 2 unexpectedly tried to connect with", "step 3", MISTAKE, "Process 2 was started twice"),
        ("corrupted size vs. prev_size\n", "step 3", RESTART, "aborted by a library: corrupted size vs. prev_size\nNothing"),
    ],
)
def test_an_abort_is_explained_by_what_the_library_wrote(monkeypatch, written, activity, code, sentence):
    for name, value in {"process": 2, "activity": activity, "describe_saved": lambda: "Nothing."}.items():
        monkeypatch.setattr(processes._group, name, value, raising=False)
    found, printed = _explain_abort(written)
    assert (found, sentence in printed) == (code, True), printed


ABORT = """
import os, sys
from engine.mesh import processes
from stages.cli.process import print_errors_on
print_errors_on(processes.hide_library_errors())
processes.handle_abort("Not all met.")
os.write(2, b"of joining\\n")
processes._group.joining = processes._take_library_errors()[:0]
os.write(2, b"a warning\\n")
processes._show_library_errors()
print("our own", file=sys.stderr)
os.write(2, b"coordination_service.cc:1518] stopped sending heartbeats):\\n1\\n")
processes._show_library_errors()
os.write(2, b"*** stack trace ***\\n")
os.abort()
"""


def test_an_abort_prints_one_sentence_and_no_stack_trace():
    run = subprocess.run([sys.executable, "-c", ABORT], cwd=ROOT, capture_output=True, text=True, check=False)
    lost = "error: Process 0 lost process 1, which is gone or does not answer. Nothing was saved yet.\n"
    assert (run.returncode, run.stderr) == (RESTART, f"a warning\nour own\n{lost}")
