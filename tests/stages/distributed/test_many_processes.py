"""Several real processes over gloo: the same losses, one signal, one death, and refusals that name what differs."""

import re
import resource
import signal
import socket
import subprocess
import time

import numpy as np
import pytest
from tiny_runs import ROOT, metrics, tiny, typed, write_text

from engine.distributed import RESTART
from engine.storage import checkpoint
from stages.train import __main__ as train

STEPS = 24
FLAGS = (
    "--steps", STEPS, "--dtype", "float32", "--optimizer", "adamw", "--save-every", 4, "--log-every", 1, "--eval-every", 15,
    "--device", "cpu",
)  # fmt: skip


@pytest.fixture
def start():
    """Starts `python -m stages.train` in several processes; `own(i)`: more flags of process i. Ends what is left."""
    started: list[subprocess.Popen] = []

    def start(count, text, folder, *more, own=lambda process: ()):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        join = lambda process: ("--processes", count, "--process", process, "--coordinator", f"127.0.0.1:{port}")
        processes = [
            subprocess.Popen(
                typed("train", *tiny(text, folder, *FLAGS, *more, *join(process), *own(process))),
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for process in range(count)
        ]
        started.extend(processes)
        return processes

    yield start
    for process in started:
        process.kill()
        process.communicate()


def until_saved(folder, step, processes):
    """Waits for a checkpoint of a step or later."""
    while not any(saved >= step for saved in checkpoint.steps(folder)):
        assert all(process.poll() is None for process in processes), [process.communicate() for process in processes]
        time.sleep(0.02)


def finish(processes):
    """{exit code} and all of stderr."""
    outputs = [process.communicate(timeout=60) for process in processes]
    return {process.returncode for process in processes}, [error for _, error in outputs]


def losses(folder):
    return {row["step"]: row["loss"] for row in metrics(folder) if "loss" in row}


def test_a_run_survives_kills_and_signals_on_any_number_of_processes(start, text, tmp_path):
    """Four processes, of which one is killed while all save; two that resume, of which one is told to stop; one to the end."""
    alone, folder = tmp_path / "alone", tmp_path / "many"
    assert train.main(tiny(text, alone, *FLAGS)) == 0

    four = start(4, text, folder, "--mesh", "data=2,fsdp=2")
    until_saved(folder, 4, four)
    while not (saving := [*folder.glob("checkpoints/.[0-9]*")]):
        assert all(process.poll() is None for process in four)
        time.sleep(0.001)
    four[2].kill()
    begin = time.monotonic()
    codes, errors = finish(four[:2] + four[3:])
    assert codes == {RESTART}, errors
    assert time.monotonic() - begin < 10
    for error in errors:
        assert "The newest checkpoint is" in error, error
        assert "Traceback" not in error

    first = checkpoint.steps(folder)[-1]
    assert str(first) != saving[0].name.split(".")[1]  # it had not begun to be a checkpoint
    assert checkpoint.load_params(folder).step == first
    two = start(2, text, folder)
    until_saved(folder, first + 4, two)
    two[1].send_signal(signal.SIGTERM)
    codes, errors = finish(two)
    assert codes == {128 + signal.SIGTERM}, errors
    assert first < checkpoint.steps(folder)[-1] < STEPS

    assert train.main(tiny(text, folder, *FLAGS)) == 0
    there, wanted = losses(folder), losses(alone)
    assert list(there) == list(wanted) == list(range(1, STEPS + 1))
    np.testing.assert_allclose([*there.values()], [*wanted.values()], rtol=1e-5)


def test_a_write_that_one_process_is_refused_ends_all_with_its_sentence(start, text, tmp_path):
    two = start(2, text, tmp_path / "run")
    resource.prlimit(two[1].pid, resource.RLIMIT_FSIZE, (2**14, 2**14))  # bytes: less than its part of a checkpoint
    codes, errors = finish(two)
    assert codes == {2}, errors
    sentence = r"Checkpoint \S+/4 could not be written \(\d\.\d MB wanted\): File too large\. Earlier checkpoints are untouched"
    assert re.fullmatch(rf"error: {sentence}[^\n]*\n", errors[1]), errors[1]
    assert re.fullmatch(rf"error: Process 0 ends because process 1 did: {sentence}[^\n]*\n", errors[0]), errors[0]
    assert checkpoint.steps(tmp_path / "run") == []


def test_processes_that_differ_are_refused(start, text, tmp_path):
    other = write_text(tmp_path / "other.txt", lines=200)
    flags = lambda process: ("--seed", 7, "--data", other) if process else ()
    codes, errors = finish(start(2, text, tmp_path / "run", own=flags))
    assert codes == {2}, errors
    for error in errors:
        assert "Process 1 has another seed (7) than process 0 (0)" in error, error
        assert "text/digest" in error
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_not_shared_is_refused(start, text, tmp_path):
    codes, errors = finish(start(2, text, tmp_path / "run", own=lambda process: ("--out-dir", tmp_path / f"host{process}")))
    assert codes == {2}, errors
    assert all("is not shared: process 1 does not see what process 0 writes" in error for error in errors)


def test_a_coordinator_that_is_not_there(failing, text, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        join = ("--processes", 2, "--process", 1, "--coordinator", where, "--join-within", "1s")
        error = failing(train.main, tiny(text, tmp_path / "run", *join))
    assert f"coordinator at {where} could not be reached for 1 s: Connection refused" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--processes", 2], "wants --process I and --coordinator HOST:PORT"),
        (["--process", 0], "are for several processes: give --processes N"),
        (["--processes", 2, "--process", 2, "--coordinator", "h:1"], "is one of 0 to 1 when there are 2"),
        (["--mesh", "data=2"], "XLA_FLAGS=--xla_force_host_platform_device_count=2"),
        (["--mesh", "data=3", "--dry-run"], "does not divide the 4 rows"),
        (["--by-hand", "--mesh", "data=2"], "--by-hand does not go with --mesh"),
    ],
)
def test_a_mesh_that_cannot_be(failing, text, tmp_path, flags, sentence):
    error = failing(train.main, tiny(text, tmp_path / "run", *flags))
    assert sentence in re.sub(r"[\s│]+", " ", error)
