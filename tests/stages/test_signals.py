"""Ctrl-C, SIGTERM and SIGHUP at any moment: T5 on the real command."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine import manifest
from engine.storage import checkpoint, checkpoint_reader
from stages.__main__ import stages
from stages.train import __main__ as train
from tests.stages.tiny_runs import PATIENCE, ROOT, command, tiny, typed

LONG = ("--steps", 1_000_000, "--save-every", 5, "--eval-every", 1_000_000)


@pytest.fixture(autouse=True)
def hangup():
    """Lets what a test starts be ended by SIGHUP: it inherits that the signal is ignored where the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def started():
    """Processes put in here do not outlive the test."""
    processes: list[subprocess.Popen] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()
        for pipe in filter(None, (process.stdout, process.stderr)):
            pipe.close()


def start(started: list[subprocess.Popen], words: list[str]) -> subprocess.Popen:
    started.append(
        subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    )
    return started[-1]


def wait_for_line(process: subprocess.Popen, words: str) -> None:
    assert process.stdout is not None
    while words not in (line := process.stdout.readline()):
        assert line


def wait_for_checkpoint(process: subprocess.Popen, folder: Path) -> None:
    while len(checkpoint.steps(folder)) < 2:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def test_a_signal_before_training_ends_promptly(started, text, tmp_path):
    # Minutes in a library that does not let Python's handlers run, as compiling does.
    program = (
        "import hashlib, sys, stages.train.run as t; from stages.train import __main__ as train; "
        "busy = lambda *_: print('busy', flush=True) or hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9); "
        "t.PreparedTraining.begin_steps = busy; "
        "sys.exit(train.main(sys.argv[1:]))"
    )
    process = start(started, [sys.executable, "-c", program, *tiny(text, tmp_path / "run", "--steps", 5)])
    wait_for_line(process, "busy")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143, output
    assert "Stopped" in output
    assert "Traceback" not in output


@pytest.mark.whole
def test_nobody_reading_saves_and_ends_quietly(started, text, tmp_path):
    reading, writing = os.pipe()
    words = typed("train", *tiny(text, tmp_path / "run", *LONG[:-1], 50))
    process = subprocess.Popen(words, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True)
    started.append(process)
    os.close(writing)
    wait_for_checkpoint(process, tmp_path / "run")
    os.close(reading)  # the next line finds the pipe closed
    _, complaint = process.communicate(timeout=PATIENCE)
    assert process.returncode == 141
    assert complaint == ""
    assert (
        manifest.verify(tmp_path / "run" / "checkpoints" / str(checkpoint.steps(tmp_path / "run")[-1])) == []
    )


@pytest.mark.parametrize(
    ("phase", "number", "code", "sentence"),
    [
        ("start", signal.SIGINT, 130, "before anything was begun"),
        ("end", signal.SIGHUP, 129, "after the command was over"),
    ],
)
def test_a_signal_while_python_starts_or_ends(started, tmp_path, monkeypatch, phase, number, code, sentence):
    busy = "print('busy', flush=True); import time; time.sleep(600)"
    if phase == "start":
        (tmp_path / "tyro.py").write_text(busy)  # imported before the flags are parsed
    else:
        (tmp_path / "sitecustomize.py").write_text(f"import atexit; atexit.register(lambda: exec({busy!r}))")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    process = start(started, typed("train", "--help"))
    wait_for_line(process, "busy")
    process.send_signal(number)
    output, _ = process.communicate(timeout=PATIENCE)
    assert (process.returncode, output.strip().splitlines()) == (code, [output.strip()])
    assert f"Stopped {sentence}" in output


@pytest.mark.parametrize("stage", ["", "runs.watch", *stages()])
def test_each_command_answers_signals_before_its_imports(stage, tmp_path, monkeypatch):
    (tmp_path / "tyro.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGTERM)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    ended = command(stage, "--help")
    assert (ended.returncode, ended.stderr.decode().strip()) == (143, "Stopped before anything was begun.")


@pytest.mark.whole
@pytest.mark.parametrize("again", [False, True])
def test_a_signal_while_a_checkpoint_is_written_beside_training(started, text, tmp_path, again):
    """The last save waits for that write; a second signal does not, and leaves the older checkpoint
    and no partial one.
    """
    folder = tmp_path / "run"
    assert train.main(tiny(text, folder, "--steps", 2, "--eval-every", 100)) == 0
    patch = (
        "import time; from engine.storage import checkpoint as c; w = c.write_files; "
        "c.write_files = lambda *args: (print('busy', flush=True), "
        f"time.sleep({600 if again else 1}), w(*args))"
    )
    run = (
        f"import sys; {patch}; from stages.train import __main__ as train; sys.exit(train.main(sys.argv[1:]))"
    )
    process = start(started, [sys.executable, "-c", run, *tiny(text, folder, *LONG)])
    wait_for_line(process, "busy")
    process.send_signal(signal.SIGTERM)
    wait_for_line(process, "Finishing this step")
    if again:
        process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143, output
    newest = checkpoint_reader.load_params(folder, lambda *_: None)
    assert newest.damaged == []
    assert (newest.step == 2) == again
    assert ("Stopped at step" in output) == (not again)


@pytest.mark.parametrize("unread", ["raise BrokenPipeError", "time.sleep(600)"], ids=["closed", "full"])
def test_a_second_signal_is_heard_though_nobody_reads_the_answer_to_the_first(unread):
    code = f"""
import os, signal, time
from stages.cli import signals
def unread(sentence): {unread}
with signals.handle_signals(), signals.defer_signals("Finishing.", unread) as deferral:
    os.kill(os.getpid(), signal.SIGTERM)
    deferral.answered.wait()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(600)
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
    )
    assert (ended.returncode, "Stopped at once" in ended.stderr) == (143, True)


def test_a_signal_ends_a_process_whose_stderr_is_full():
    code = """
import os, signal, time
from stages.cli import signals
with signals.handle_signals():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(600)
"""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, bytes(4096))
    os.set_blocking(writing, True)
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stderr=writing, timeout=PATIENCE)
    os.close(reading)
    os.close(writing)
    assert ended.returncode == 143


def test_a_signal_while_a_file_is_written_leaves_nothing_of_it(tmp_path):
    code = f"""
import os, signal, time
from pathlib import Path
from engine.files import atomic_file, atomic_folder
from stages.cli import signals
signals.set_phase("while it wrote.")
with signals.handle_signals(), atomic_file(Path({str(tmp_path / "a")!r})), atomic_folder(Path({str(tmp_path / "b")!r})):
    os.kill(os.getpid(), signal.SIGHUP)
    time.sleep(600)
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
    )
    assert (ended.returncode, ended.stderr) == (129, "\nStopped while it wrote.\n")
    assert [*tmp_path.iterdir()] == []


def test_under_nohup_a_command_goes_on_when_its_terminal_is_closed():
    code = """
import os, signal
from stages.cli import signals
from stages.cli.start import start_command
start_command()
with signals.handle_signals():
    os.kill(os.getpid(), signal.SIGHUP)
    print("it goes on")
"""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup has it
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "it goes on\n", "")


def test_a_deferred_signal_is_not_taken_for_one_after_the_block():
    code = """
import os, signal, time
from stages.cli import signals
read = os.read
os.read = lambda *arguments: (read(*arguments), time.sleep(0.3))[0]  # the second thread hears of it late
with signals.handle_signals():
    with signals.defer_signals("", print, [signal.SIGINT]) as deferral:
        os.kill(os.getpid(), signal.SIGINT)
        while not deferral.received: time.sleep(0.01)
    try:
        with signals.defer_signals("", print, [signal.SIGINT], interrupts=True):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(600)
    except KeyboardInterrupt:
        time.sleep(1)
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
    )
    assert (ended.returncode, ended.stderr) == (0, "")
