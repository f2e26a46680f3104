"""Several real processes over gloo: how they meet, the same losses, one signal, one death, refusals that name what differs."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from engine.errors import UserError
from engine.mesh.processes import ANNOUNCED, RESTART, announced, in_cluster
from engine.storage import checkpoint, checkpoint_reader
from engine.storage.adapter_reader import load_adapter
from engine.storage.run_folder import read_config
from stages import by_hand
from stages.cli import lifecycle
from stages.cli.lifecycle import join
from stages.cli.signals import end_now
from stages.finetune import __main__ as finetune
from stages.train import __main__ as train
from tests.stages.distributed.many_processes import FLAGS, STEPS, finish, free_port, until_saved
from tests.stages.tiny_runs import ROOT, WORDS, metrics, tiny, typed, write_text

pytestmark = pytest.mark.whole

SLOW = """
import time, stages.runs.loop as loop
count = loop.count_step
loop.count_step = lambda *arguments: (time.sleep(0.2), count(*arguments))[1]
"""
ENDLESS_SAVES = """
from engine.storage import checkpoint
write, saves = checkpoint.write_files, []
checkpoint.write_files = lambda *arguments: (saves.append(1), time.sleep(600 * (len(saves) > 1)), write(*arguments))
"""
WAITS_FOR_A_SIGNAL = """
go_on = loop.count_step
def wait(run, *arguments):
    go_on(run, *arguments)
    while run.loop_state.step == 20 and not run.stop.deferral.received:
        time.sleep(0.01)
loop.count_step = wait
"""


def losses(folder):
    return {row["step"]: row["loss"] for row in metrics(folder) if "loss" in row}


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.night)])
def test_a_run_survives_kills_and_signals_on_any_number_of_processes(count, start, text, tmp_path):
    """One of several processes is killed while all save; one of two that resume, and are announced by
    variables, is told to stop; one goes on to the end.
    """
    alone, folder = tmp_path / "alone", tmp_path / "many"
    words = tiny(text, folder, *FLAGS, "--batch", 2 * count)
    assert train.main([*words, "--out-dir", str(alone)]) == 0

    several = start(count, "train", *words, patch=lambda _: SLOW + ENDLESS_SAVES)
    until_saved(folder, 4, several)
    while not (saving := [*folder.glob("checkpoints/.[0-9]*")]):
        assert all(process.poll() is None for process in several)
        time.sleep(0.001)
    several.pop().kill()
    codes, errors = finish(several)  # within 15 s, which promise T9 measures
    assert codes <= {RESTART, -signal.SIGABRT}, errors

    first = checkpoint.steps(folder)[-1]
    assert str(first) != saving[0].name.split(".")[1]  # it had not begun to be a checkpoint
    assert checkpoint_reader.load_params(folder, lambda *_: None).step == first
    two = start(2, "train", *words, patch=lambda process: SLOW + WAITS_FOR_A_SIGNAL * process, announces=True)
    until_saved(folder, first + 4, two)
    two[1].send_signal(signal.SIGTERM)
    codes, errors = finish(two)
    assert codes == {128 + signal.SIGTERM}, errors
    assert first < checkpoint.steps(folder)[-1] < STEPS

    assert train.main(words) == 0
    there, wanted = losses(folder), losses(alone)
    assert list(there) == list(wanted) == list(range(1, STEPS + 1))
    np.testing.assert_allclose([*there.values()], [*wanted.values()], rtol=1e-5)


LIMITED = """
import resource
import stages.cli.lifecycle as lifecycle
meet = lifecycle.join
def meet_and_limit(*arguments):
    meet(*arguments)
    from engine.model.native.library import native_problem
    native_problem()  # loads the kernels, from files in memory
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, 2**14))  # bytes: less than this process's part of a checkpoint
lifecycle.join = meet_and_limit
"""


def test_a_write_that_one_process_is_refused_ends_all_with_its_sentence(start, text, tmp_path):
    two = start(2, "train", *tiny(text, tmp_path / "run", *FLAGS), patch=lambda number: LIMITED * number)
    codes, errors = finish(two)
    assert codes == {2}, errors
    sentence = r"Checkpoint \S+/4 could not be written \(\d\.\d MB wanted\): File too large\. Earlier checkpoints are untouched"
    assert re.search(rf"^error: Process 1: {sentence}", errors[1], re.M), errors[1]
    assert re.search(rf"^error: Process 1 ended: {sentence}", errors[0], re.M), errors[0]
    assert checkpoint.steps(tmp_path / "run") == []


CONNECTIONS = """
import json, time
from engine.mesh import processes
from stages.finetune import run
from stages.runs import mesh
connected, connect, report = [], mesh.connect_devices, run.PreparedTuning.report
def note(path=FILE):
    connected.append(sorted(key for key, _ in processes.group.client.key_value_dir_get_bytes("cpu:gloo/")))
    open(path, "w").write(json.dumps(connected))
mesh.connect_devices = lambda devices: (time.sleep(2), note(), connect(devices), note())[2]
run.PreparedTuning.report = lambda *arguments: (report(*arguments), note())[0]
"""


@pytest.mark.law("sharding equivalence")
def test_processes_fine_tune_a_model_as_one_does(start, trained, tmp_path):
    """The scores before and after, and the adapter, are those of one process; process 0 prints
    them, and writes it and the events for TensorBoard.

    All devices connect before the first program, once both processes have compiled that, of which
    one takes 2 s longer: Gloo waits 30 s for a process at a first collective, and none comes later.
    """
    alone, folder, data = tmp_path / "alone", tmp_path / "many", tmp_path / "chats.jsonl"
    messages = lambda word: [
        {"role": "user", "content": word},
        {"role": "assistant", "content": "red sails."},
    ]
    data.write_text("".join(json.dumps({"messages": messages(word)}) + "\n" for word in WORDS.split()))
    flags = lambda folder: (
        "--model",
        trained,
        "--data",
        data,
        "--out-dir",
        folder,
        "--context",
        32,
        "--steps",
        8,
        "--general",
        "none",
        "--learning-rate",
        0.05,
        "--lora",
        "rank=4,targets=q,v",
        "--device",
        "cpu",
    )
    assert finetune.main([*map(str, flags(alone))]) == 0
    watch = lambda process: CONNECTIONS.replace("FILE", repr(str(tmp_path / "connected"))) * process
    codes, errors = finish(start(2, "finetune", *flags(folder), "--tensorboard", patch=watch))
    assert codes == {0}, errors
    before, connected, at_the_end = json.loads((tmp_path / "connected").read_text())
    assert before == [] != connected == at_the_end
    assert len([*(folder / "tensorboard").iterdir()]) == 1
    one, many = (json.loads((run / "run.json").read_text())["result"] for run in (alone, folder))
    for when in ("before", "after"):
        assert many[when]["held_out"] == pytest.approx(one[when]["held_out"], rel=1e-3)
    newest = [run / "checkpoints" / str(checkpoint.steps(run)[-1]) for run in (alone, folder)]
    adapters = [jax.tree.leaves(load_adapter(step, read_config(trained))) for step in newest]
    for wanted, leaf in zip(*adapters, strict=True):
        np.testing.assert_allclose(leaf, wanted, atol=0.02)


def test_ctrl_c_on_a_mesh_whose_output_is_a_file(text, tmp_path):
    """It saves, says how to go on with the same mesh, and the file holds lines alone."""
    folder, log = tmp_path / "run", tmp_path / "log"
    words = typed("train", *tiny(text, folder, *FLAGS, "--mesh", "fsdp=2", "--steps", 10**6))
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    with (
        log.open("wb") as file,
        subprocess.Popen(words, cwd=ROOT, stdout=file, stderr=file, env=os.environ | flags) as process,
    ):
        until_saved(folder, 4, [process])
        process.send_signal(signal.SIGINT)
        assert process.wait() == 128 + signal.SIGINT
    printed = log.read_text()
    assert re.search(
        rf"saved in {folder}/checkpoints/{checkpoint.steps(folder)[-1]}\.\nTo go on: .*--mesh fsdp=2", printed
    )
    assert "(2 devices, fsdp=2, " in printed
    assert not re.search("[\x1b\r]", printed)


@pytest.mark.parametrize(
    ("flags", "phrases"),
    [
        (
            ("--seed", 7, "--data", "OTHER"),
            ("Process 1 has another seed (7) than process 0 (0)", "text/digest"),
        ),
        (("--processes", 3), ("Process 1 has another --processes (3) than process 0 (2)",)),
        (("--out-dir", "OTHER-run"), ("is not shared: process 1 does not see what process 0 writes",)),
    ],
)
def test_processes_that_differ_are_refused(flags, phrases, start, text, tmp_path):
    other = write_text(tmp_path / "other.txt", lines=200)
    own = lambda process: [str(flag).replace("OTHER", str(other)) for flag in flags] if process else ()
    codes, errors = finish(start(2, "train", *tiny(text, tmp_path / "run", *FLAGS), own=own))
    assert codes == {2}, errors
    assert all(phrase in errors[0] for phrase in phrases), errors
    assert "--processes" in flags or "error" not in errors[1], "once, by process 0"
    assert not (tmp_path / "run").exists()


def test_a_process_that_a_signal_ends_says_so_and_tells_the_others_before(monkeypatch, tmp_path):
    calls, printed = [], tmp_path / "stderr"
    monkeypatch.setattr(sys, "stderr", printed.open("w"))
    monkeypatch.setattr(lifecycle, "end", lambda code, sentence: calls.append(code))
    monkeypatch.setattr(os, "_exit", lambda code: calls.append("gone"))
    end_now(signal.SIGTERM, "here.")
    assert calls == [128 + signal.SIGTERM, "gone"]
    assert printed.read_text() == "\nStopped here.\n"


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "::"])
def test_a_port_that_is_taken(address):
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as taken:
        taken.bind((address, 0))
        taken.listen()
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UserError, match=f"Process 0 cannot listen at {where}: Address already in use"):
            join(where, 2, 0, 1.0)


@pytest.mark.parametrize("process", [0, pytest.param(1, marks=pytest.mark.night)])
def test_a_process_alone_says_that_not_all_met(start, text, tmp_path, process):
    """Process 1 alone has nobody to listen for it."""
    where = f"127.0.0.1:{free_port()}"
    flags = ("--processes", 2, "--process", process, "--coordinator", where, "--join-within", "1s")
    codes, [error] = finish(start(1, "train", *tiny(text, tmp_path / "run", *flags)))
    assert (codes, f"error: Not all 2 processes met at {where} within 1 s: start each once" in error) == (
        {2},
        True,
    ), error
    assert not (tmp_path / "run").exists()


def test_a_coordinator_without_a_port(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host")
    with pytest.raises(UserError, match="The coordinator host has no port"):
        join(None, 2, 1, 1.0)


@pytest.mark.parametrize(
    ("values", "phrase"),
    [
        (("", "2", "0"), "JAX_NUM_PROCESSES is set, and JAX_COORDINATOR_ADDRESS is not"),
        (("host:1", "2", ""), "JAX_NUM_PROCESSES is set, and JAX_PROCESS_ID is not"),
        (
            ("host:1", "2", "2"),
            "JAX_PROCESS_ID=2 is one of 0 to JAX_NUM_PROCESSES - 1, and JAX_NUM_PROCESSES is 2",
        ),
        (("host:1", "two", "0"), "JAX_NUM_PROCESSES is two"),
    ],
)
def test_variables_that_place_a_process_nowhere(values, phrase, monkeypatch):
    for name, value in zip(ANNOUNCED, values):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=phrase):
        announced()


def test_one_process_that_is_announced_is_no_cluster(monkeypatch):
    assert announced() is None
    for name, value in zip(ANNOUNCED, ("host:1", "1", "0")):
        monkeypatch.setenv(name, value)
    assert announced() == ("host:1", 1, 0)
    assert not in_cluster()


def test_by_hand_there_is_one_process(monkeypatch, failing, text):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    assert "Training by hand runs in one process" in failing(by_hand.main, ["--data", str(text)])
