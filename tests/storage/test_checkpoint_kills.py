"""Checkpoints outlive a kill at any instant (T1) and a disk that refuses (T8): older ones stay, and no partial one appears."""

import contextlib
import errno
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import timeit
from pathlib import Path

import numpy as np
import pytest
from tiny_checkpoints import hidden, is_step, load_tiny, save_model, save_tiny

from engine.errors import UserError
from engine.files import UNFINISHED, folder_lock, remove_unfinished
from engine.storage import checkpoint
from engine.storage.checkpoint import steps
from engine.storage.manifest import verify

# T1: a kill at any instant


class Killed(BaseException):
    """The process is gone: nothing it would do afterwards happens."""


class Shim:
    """Sees every open, mkdir, rename, remove, chmod and fsync below a folder; from the k-th on, `error` is raised.

    With `once` only the k-th fails, as on a disk that refuses; otherwise all that follow fail too, so that what lies on
    disk afterwards is what a killed process would have left: no `except` or `finally` can tidy up.
    """

    def __init__(self):
        self.folder, self.at, self.seen, self.error, self.once = "", 0, 0, Killed, False
        self.lock = threading.Lock()
        sys.addaudithook(self.hear)

    def hear(self, event, args):
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod") and self.folder:
            below = str(args[0]).startswith(self.folder)
            if below or (event in ("os.remove", "os.rmdir") and args[1] != -1):  # rmtree names a file by its folder's handle
                self.count()

    def count(self):
        with self.lock:
            self.seen += 1
            failing = self.seen == self.at if self.once else self.seen >= self.at > 0
        if failing:
            raise self.error

    @contextlib.contextmanager
    def armed(self, folder, at, error=Killed, once=False):
        self.folder, self.at, self.seen, self.error, self.once = str(folder), at, 0, error, once
        fsync = os.fsync
        os.fsync = lambda handle: (self.count(), fsync(handle))[1]
        try:
            yield self
        finally:
            os.fsync = fsync
            self.folder, self.at = "", 0


@pytest.fixture(scope="module")
def shim():
    return Shim()  # an audit hook stays for the life of the process


def swept_clean(folder: Path) -> bool:
    """A real kill stops every thread; here those of Orbax may write a little longer into what is being swept."""
    for _ in range(200):
        remove_unfinished(folder / "checkpoints")
        if not hidden(folder):
            return True
        time.sleep(0.01)
    return False


# Threads of Orbax that are stopped so rudely complain into the void.
rude = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::RuntimeWarning")


@rude
@pytest.mark.parametrize("replaced", [False, True])
def test_a_kill_at_any_instant_leaves_whole_checkpoints_only(tmp_path, shim, replaced):
    before = tmp_path / "before"
    save_tiny(before, 1)
    save_tiny(before, 2)
    newest = 2 if replaced else 3
    with shim.armed(shutil.copytree(before, tmp_path / "unharmed"), 0) as unharmed:
        save_tiny(tmp_path / "unharmed", newest, keep=2)
    # Every instant of making folders and of committing; every second one of the many alike (hash a file, sync a file).
    last = unharmed.seen
    first = last - 45 if replaced else 1
    instants = [at for at in range(first, last + 1) if at < 35 or at % 2 or at > last - 45]
    outcomes = set()
    for instant in instants:
        run = shutil.copytree(before, tmp_path / str(instant))
        with shim.armed(run, instant), pytest.raises(Killed):
            save_tiny(run, newest, keep=2)
        assert swept_clean(run), instant
        outcome = tuple(steps(run))
        assert outcome[-1] == newest or outcome == (1, 2), instant
        assert all(verify(run / "checkpoints" / str(step)) == [] for step in outcome), instant
        if instant % 30 == 0 or outcome not in outcomes:
            loaded = load_tiny(run)
            assert is_step(loaded, outcome[-1]), instant
            assert loaded.damaged == []
        outcomes.add(outcome)
    assert last > 100  # the shim saw the save
    assert outcomes == ({(1, 2)} if replaced else {(1, 2), (1, 2, 3), (2, 3)})


@rude
def test_the_save_after_a_kill_sweeps_and_succeeds(tmp_path, shim):
    save_tiny(tmp_path, 1)
    with shim.armed(tmp_path, 45), pytest.raises(Killed):
        save_tiny(tmp_path, 2)
    assert hidden(tmp_path) != []
    save_tiny(tmp_path, 2)
    assert hidden(tmp_path) == []
    assert is_step(load_tiny(tmp_path), 2)


def test_what_another_process_is_writing_is_not_swept(tmp_path):
    save_tiny(tmp_path, 1)
    building = tmp_path / "checkpoints" / f".2.abcdefgh{UNFINISHED}"
    building.mkdir()
    with folder_lock(building):
        remove_unfinished(tmp_path / "checkpoints")
        assert building.exists()
        assert load_tiny(tmp_path).step == 1
    remove_unfinished(tmp_path / "checkpoints")
    assert not building.exists()


def test_sigkill_of_a_real_process_at_random_times(tmp_path):
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(checkpoint.__file__).parents[2])])
    writer = (
        "import sys; from tiny_checkpoints import save_tiny\n"
        "for step in range(int(sys.argv[2]), 10**9): save_tiny(sys.argv[1], step, keep=2); print(step, flush=True)"
    )
    for delay in np.random.default_rng(0).uniform(0, 0.2, 2):
        command = [sys.executable, "-c", writer, str(tmp_path), str(max(steps(tmp_path), default=0) + 1)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}) as process:
            reported = int(process.stdout.readline())
            time.sleep(delay)
            process.kill()
            reported = max([reported, *map(int, process.stdout.read().split())])
        loaded = load_tiny(tmp_path)
        assert loaded.step >= reported
        assert loaded.damaged == []
        assert is_step(loaded, loaded.step)


def test_an_interrupt_at_any_time_leaves_older_checkpoints(tmp_path, capfd):
    save_tiny(tmp_path, 1)
    span = min(timeit.repeat(lambda: save_tiny(tmp_path, 2), number=1, repeat=3))

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    interrupted = 0
    try:
        for fraction in np.linspace(0.05, 1.0, 15):
            try:
                signal.setitimer(signal.ITIMER_REAL, span * fraction)
                save_tiny(tmp_path, 3)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupted += 1
            loaded = load_tiny(tmp_path)
            assert loaded.step in (2, 3)
            assert is_step(loaded, loaded.step)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 5
    save_tiny(tmp_path, 4)
    assert hidden(tmp_path) == []
    assert capfd.readouterr() == ("", "")


# T8: a disk that refuses


def refused(folder: Path, step: int, megabytes: str, reason: str):
    where = re.escape(f"{folder}/checkpoints/{step}")
    return pytest.raises(UserError, match=rf"{where} could not be written \({megabytes} MB wanted\): .*{reason}.* untouched")


def test_a_full_disk_is_said_before_it_is_filled(tmp_path, monkeypatch):
    save_tiny(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=20))
    with refused(tmp_path, 2, r"0\.0", r"0\.0 MB are free"):
        save_tiny(tmp_path, 2)
    assert is_step(load_tiny(tmp_path), 1)


def test_a_write_that_fails_in_tensorstore_is_said(tmp_path, capfd, caplog):
    save_tiny(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with refused(tmp_path, 2, r"0\.1", os.strerror(errno.EFBIG)):
            save_model(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert is_step(load_tiny(tmp_path), 1)
    assert swept_clean(tmp_path)
    assert (capfd.readouterr(), caplog.records) == (("", ""), [])


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with refused(tmp_path / "file", 2, r"0\.0", os.strerror(errno.ENOTDIR)):
        save_tiny(tmp_path / "file", 2)


@rude
def test_any_single_refusal_harms_nothing_older(tmp_path, shim, capfd):
    save_tiny(tmp_path / "before", 1)
    failed = 0
    for instant in range(1, 112, 3):
        run = shutil.copytree(tmp_path / "before", tmp_path / str(instant))
        with shim.armed(run, instant, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), once=True):
            try:
                save_tiny(run, 2, keep=1)
                saved = True
            except UserError as error:
                saved = False
                failed += 1
                assert f"{run}/checkpoints/2 could not be written" in str(error)  # noqa: PT017
        assert steps(run) == [2] if saved else steps(run)[0] == 1, instant
        assert all(verify(run / "checkpoints" / str(step)) == [] for step in steps(run)), instant
        if instant % 9 == 1:
            loaded = load_tiny(run)
            assert is_step(loaded, steps(run)[-1])
            assert loaded.damaged == []
    assert failed > 25
    assert capfd.readouterr() == ("", "")
