"""Several real processes over gloo: the same losses, one signal, one death, and refusals that name what differs."""

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from many_processes import FLAGS, STEPS, finish, until, until_saved
from tiny_runs import ROOT, WORDS, metrics, tiny, typed, write_text

from engine.errors import UserError
from engine.mesh import processes
from engine.mesh.processes import RESTART, find_coordinator
from engine.storage import checkpoint
from engine.storage.adapter import load_adapter
from engine.storage.model_loader import read_config
from stages.cli.signals import SignalState
from stages.finetune import __main__ as finetune
from stages.train import __main__ as train

SLOW = """
import time, stages.runs.loop as loop
count = loop.Loop._count
loop.Loop._count = lambda *arguments: (time.sleep(0.1), count(*arguments))[1]
"""


def losses(folder):
    return {row["step"]: row["loss"] for row in metrics(folder) if "loss" in row}


def test_a_run_survives_kills_and_signals_on_any_number_of_processes(start, text, tmp_path):
    """Three processes, of which one is killed while all save; two that resume, of which one is told to stop; one to the end."""
    alone, folder = tmp_path / "alone", tmp_path / "many"
    words = tiny(text, folder, *FLAGS, "--batch", 6)
    assert train.main([*words, "--out-dir", str(alone)]) == 0

    three = start(3, "train", *words, "--mesh", "data=3", patch=lambda _: SLOW)
    until_saved(folder, 4, three)
    while not (saving := [*folder.glob("checkpoints/.[0-9]*")]):
        assert all(process.poll() is None for process in three)
        time.sleep(0.001)
    three.pop().kill()
    begin = time.monotonic()
    codes, errors = finish(three)
    assert codes == {RESTART}, errors
    assert time.monotonic() - begin < 15
    for error in errors:
        assert re.fullmatch("error: [^\n]*The newest checkpoint is[^\n]*\n", error), error

    first = checkpoint.steps(folder)[-1]
    assert str(first) != saving[0].name.split(".")[1]  # it had not begun to be a checkpoint
    assert checkpoint.load_params(folder).step == first
    two = start(2, "train", *words, patch=lambda _: SLOW)
    until_saved(folder, first + 4, two)
    two[1].send_signal(signal.SIGTERM)
    codes, errors = finish(two)
    assert codes == {128 + signal.SIGTERM}, errors
    assert first < checkpoint.steps(folder)[-1] < STEPS

    assert train.main(words) == 0
    there, wanted = losses(folder), losses(alone)
    assert list(there) == list(wanted) == list(range(1, STEPS + 1))
    np.testing.assert_allclose([*there.values()], [*wanted.values()], rtol=1e-5)


def test_a_write_that_one_process_is_refused_ends_all_with_its_sentence(start, text, tmp_path):
    two = start(2, "train", *tiny(text, tmp_path / "run", *FLAGS))
    resource.prlimit(two[1].pid, resource.RLIMIT_FSIZE, (2**14, 2**14))  # bytes: less than its part of a checkpoint
    codes, errors = finish(two)
    assert codes == {2}, errors
    sentence = r"Checkpoint \S+/4 could not be written \(\d\.\d MB wanted\): File too large\. Earlier checkpoints are untouched"
    assert re.fullmatch(rf"error: Process 1: {sentence}[^\n]*\n", errors[1]), errors[1]
    assert re.fullmatch(rf"error: Process 0 ends because process 1 did: {sentence}[^\n]*\n", errors[0]), errors[0]
    assert checkpoint.steps(tmp_path / "run") == []


CONNECTIONS = """
import json, time
from engine.mesh import processes
from stages.finetune import run
from stages.runs import mesh
connected, connect, finish = [], mesh.connect_devices, run.FineTuning.finish
def note(path=FILE):
    connected.append(sorted(key for key, _ in processes._group.client.key_value_dir_get_bytes("cpu:gloo/")))
    open(path, "w").write(json.dumps(connected))
mesh.connect_devices = lambda devices: (time.sleep(2), note(), connect(devices), note())[2]
run.FineTuning.finish = lambda *arguments: (finish(*arguments), note())[0]
"""


def test_processes_fine_tune_a_model_as_one_does(start, trained, tmp_path):
    """The scores before and after, and the adapter, are those of one process; process 0 prints them, and writes it.

    All devices connect before the first program, once both processes have compiled that, of which one takes 2 s longer:
    Gloo waits 30 s for a process at a first collective, and none comes later.
    """
    alone, folder, data = tmp_path / "alone", tmp_path / "many", tmp_path / "chats.jsonl"
    messages = lambda word: [{"role": "user", "content": word}, {"role": "assistant", "content": "red sails."}]
    data.write_text("".join(json.dumps({"messages": messages(word)}) + "\n" for word in WORDS.split()))
    flags = lambda folder: (
        "--model", trained, "--data", data, "--out-dir", folder, "--context", 32, "--steps", 8, "--general", "none",
        "--learning-rate", 0.05, "--lora", "rank=4,targets=q,v", "--device", "cpu",
    )  # fmt: skip
    assert finetune.main([*map(str, flags(alone))]) == 0
    watch = lambda process: CONNECTIONS.replace("FILE", repr(str(tmp_path / "connected"))) * process
    codes, errors = finish(start(2, "finetune", *flags(folder), patch=watch))
    assert codes == {0}, errors
    before, connected, at_the_end = json.loads((tmp_path / "connected").read_text())
    assert before == [] != connected == at_the_end
    one, many = (json.loads((run / "run.json").read_text())["result"] for run in (alone, folder))
    for when in ("before", "after"):
        assert many[when]["held_out"] == pytest.approx(one[when]["held_out"], rel=1e-3)
    adapters = [jax.tree.leaves(load_adapter(run / "adapter", read_config(str(trained)))) for run in (alone, folder)]
    for wanted, leaf in zip(*adapters, strict=True):
        np.testing.assert_allclose(leaf, wanted, atol=0.02)


def test_ctrl_c_on_a_mesh_whose_output_is_a_file(text, tmp_path):
    """It saves, says how to go on with the same mesh, and the file holds lines alone."""
    folder, log = tmp_path / "run", tmp_path / "log"
    words = typed("train", *tiny(text, folder, *FLAGS, "--mesh", "fsdp=2", "--steps", 10**6))
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    with log.open("wb") as file, subprocess.Popen(words, cwd=ROOT, stdout=file, stderr=file, env=os.environ | flags) as process:
        until_saved(folder, 4, [process])
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 128 + signal.SIGINT
    printed = log.read_text()
    assert re.search(rf"saved in {folder}/checkpoints/{checkpoint.steps(folder)[-1]}\.\nTo go on: .*--mesh fsdp=2", printed)
    assert "(2 devices, fsdp=2, " in printed
    assert not re.search("[\x1b\r]", printed)


@pytest.mark.parametrize(
    ("process", "met", "printed"),
    [
        (1, "No such text.", ""),
        (1, "", ""),
        (1, "Disk full.", "Disk full."),
        (0, "", "Process 0 ends because process 2 did: No such text."),
    ],
)
def test_a_mistake_of_all_is_printed_once(monkeypatch, process, met, printed):
    """`met`: this process's own mistake, while another says that there is no such text."""
    said: list[tuple[int, str]] = []
    other = 0 if process else 2
    client = SimpleNamespace(blocking_key_value_get=lambda *_: json.dumps([other, processes.MISTAKE, "No such text."]))
    monkeypatch.setattr(processes, "_exit", lambda *ending: said.append(ending))
    for name, value in {"process": process, "mistake": met}.items():
        monkeypatch.setattr(processes._group, name, value, raising=False)
    processes._watch(client)
    assert said == [(processes.MISTAKE, printed)]


IMPATIENT = """
import engine.mesh.processes as processes, stages.runs.loop as loop
processes.HEARTBEAT = 60  # seconds: JAX's service is not to notice it first
count = loop.Loop._count
def counted(self, *rest):
    count(self, *rest)
    loop.STUCK = 4 if self.loop_state.step > 3 else loop.STUCK  # the first steps take longer
loop.Loop._count = counted
"""


def test_a_process_that_hangs_is_noticed(start, text, tmp_path):
    """One is stopped; the other sees no progress for longer than it waits."""
    folder, rarely = tmp_path / "run", ("--steps", 10**6, "--save-every", 10**6, "--eval-every", 10**6)
    two = start(2, "train", *tiny(text, folder, *FLAGS, *rarely), patch=lambda _: IMPATIENT)
    until(lambda: (folder / "metrics.jsonl").exists() and len(losses(folder)) > 4, two)
    two[1].send_signal(signal.SIGSTOP)
    codes, (error,) = finish(two[:1])
    assert codes == {RESTART}, error
    assert re.search(r"^error: step \d+ made no progress for \d+ s\. Nothing was saved yet\. To go on: python -m", error, re.M)


def test_processes_that_differ_are_refused(start, text, tmp_path):
    other = write_text(tmp_path / "other.txt", lines=200)
    flags = lambda process: ("--seed", 7, "--data", other) if process else ()
    codes, [error, other] = finish(start(2, "train", *tiny(text, tmp_path / "run", *FLAGS), own=flags))
    assert (codes, other) == ({2}, ""), "once, by process 0"
    assert "Process 1 has another seed (7) than process 0 (0)" in error, error
    assert "text/digest" in error
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_not_shared_is_refused(start, text, tmp_path):
    own = lambda process: ("--out-dir", tmp_path / f"host{process}")
    codes, [error, other] = finish(start(2, "train", *tiny(text, tmp_path, *FLAGS), own=own))
    assert (codes, other) == ({2}, ""), "once, by process 0"
    assert "is not shared: process 1 does not see what process 0 writes" in error


def test_a_certificate_that_is_not_there_is_named(tmp_path):
    jax.config.update("jax_mtls_key_file", str(tmp_path / "key.pem"))
    try:
        with pytest.raises(UserError, match=r"JAX_MTLS_KEY_FILE names .*key.pem"):
            find_coordinator(2, 0, "127.0.0.1:1", 1.0)
    finally:
        jax.config.update("jax_mtls_key_file", None)


def test_a_process_that_a_signal_ends_says_so_and_tells_the_others_before(monkeypatch, tmp_path):
    """It writes to stderr where Python has it: file descriptor 2 is that of the libraries."""
    calls, printed = [], tmp_path / "stderr"
    monkeypatch.setattr(sys, "stderr", printed.open("w"))
    monkeypatch.setattr(processes, "end", lambda code, sentence: calls.append(code))
    monkeypatch.setattr(os, "_exit", lambda code: calls.append("gone"))
    SignalState(received=signal.SIGTERM).end_now("here.")
    assert calls == [128 + signal.SIGTERM, "gone"]
    assert printed.read_text() == "\nStopped here.\n"


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
    ],
)
def test_a_mesh_that_cannot_be(failing, text, tmp_path, flags, sentence):
    error = failing(train.main, tiny(text, tmp_path / "run", *flags))
    assert sentence in re.sub(r"[\s│]+", " ", error)
