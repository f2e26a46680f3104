"""Checkpoints outlive an end at any change on disk (T1) and a disk that refuses any (T8)."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.files import UNFINISHED, folder_lock, remove_unfinished
from engine.manifest import verify
from engine.storage import checkpoint
from engine.storage.checkpoint import steps
from tests import faults
from tests.storage.tiny_checkpoints import hidden, is_step, load_tiny, write_tiny

# Forks a process for each change on disk of a save, with a fault at that change, until one saves
# before it.
SAVES = """
import json, os, shutil, sys
from pathlib import Path
from tests import faults
from engine.errors import UserError
from tests.storage.tiny_checkpoints import write_tiny
os.environ.pop("LD_PRELOAD")
place, step, error, once = Path(sys.argv[1]), *map(int, sys.argv[2:])
codes = []
while True:
    at = len(codes) + 1
    run = shutil.copytree(place / "before", place / str(at))
    if not (pid := os.fork()):
        faults.arm(run, at, error, bool(once), place / f"{at}.log")
        try:
            write_tiny(run, step, keep=2)
        except UserError as refused:
            os._exit(2 if f"{run}/checkpoints/{step} could not be written" in str(refused) else 3)
        os._exit(0)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    if len((place / f"{at}.log").read_text().splitlines()) < at:
        break
print(json.dumps(codes))
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return str(faults.build(tmp_path_factory.mktemp("faults")))


@pytest.fixture
def saves(library, tmp_path):
    """saves(step, error=0, once=0): the exit codes of saves of `step` with a fault at change 1, 2,
    ..., each in its folder.
    """
    for step in (1, 2):
        write_tiny(tmp_path / "before", step)

    def run(step: int, error: int = 0, once: int = 0) -> list[int]:
        path = str(Path(__file__).parents[2])
        env = os.environ | {"PYTHONPATH": path, "LD_PRELOAD": library, "FAULTS": library}
        command = [sys.executable, "-c", SAVES, *map(str, (tmp_path, step, error, once))]
        return json.loads(subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE).stdout)

    return run


def check(run: Path, newest: int) -> tuple[int, ...]:
    """Checks that a folder holds whole checkpoints only, after a sweep; returns their steps."""
    remove_unfinished(run / "checkpoints")
    assert hidden(run) == []
    found = tuple(steps(run))
    assert found[-1] == newest or found == (1, 2), run
    assert all(verify(run / "checkpoints" / str(step)) == [] for step in found), run
    loaded = load_tiny(run)
    assert is_step(loaded, found[-1]), run
    assert loaded.damaged == []
    return found


@pytest.mark.law("resume")
@pytest.mark.parametrize("newest", [2, 3])
def test_an_end_at_any_change_leaves_whole_checkpoints_only(tmp_path, saves, newest):
    codes = saves(newest)
    assert codes == [faults.ENDED] * (len(codes) - 1) + [0]
    assert len(codes) > 25  # the changes were seen
    outcomes = {check(tmp_path / str(at), newest) for at in range(1, len(codes) + 1)}
    assert outcomes == ({(1, 2)} if newest == 2 else {(1, 2), (1, 2, 3), (2, 3)})
    write_tiny(tmp_path / "20", newest)  # the save after a kill succeeds
    assert is_step(load_tiny(tmp_path / "20"), newest)
    if newest == 3:
        check_synced((tmp_path / f"{len(codes)}.log").read_text())


@pytest.mark.parametrize(
    ("error", "once"),
    [(errno.ENOSPC, 0), pytest.param(errno.EROFS, 0, marks=pytest.mark.night), (errno.EIO, 1)],
)
def test_a_refusal_of_any_change_is_said_and_harms_nothing_older(tmp_path, saves, error, once):
    codes = saves(3, error, once)
    assert {*codes} <= {0, 2}
    assert codes.count(2) > 15
    for at, code in enumerate(codes, 1):
        assert check(tmp_path / str(at), 3)[-1] == 3 if code == 0 else check(tmp_path / str(at), 3), at


def check_synced(log: str) -> None:
    """All that a new checkpoint relies on is synced before it appears: after a power cut only what
    was synced is there.
    """
    changes = [line.split("\t") for line in log.splitlines()]
    commit = next(at for at, (_, path, old) in enumerate(changes) if path.endswith("/checkpoints/3") and old)
    building, dirty = changes[commit][2], set[str]()
    for kind, path, _ in changes[:commit]:
        dirty |= {path} if kind in ("open", "write", "truncate") else set()
        dirty |= {os.path.dirname(path)} if kind in ("open", "mkdir") else set()
        dirty -= {path} if kind == "fsync" else set()
    assert not {path for path in dirty if path.startswith(building)}
    after = [(kind, path) for kind, path, _ in changes[commit + 1 :]]
    root = os.path.dirname(changes[commit][1])
    assert after.index(("fsync", root)) < next(
        at for at, (kind, path) in enumerate(after) if kind == "rename"
    )


def test_what_another_process_is_writing_is_not_swept(tmp_path):
    write_tiny(tmp_path, 1)
    building = tmp_path / "checkpoints" / f".2.abcdefgh{UNFINISHED}"
    building.mkdir()
    with folder_lock(building):
        remove_unfinished(tmp_path / "checkpoints")
        assert building.exists()
        assert load_tiny(tmp_path).step == 1
    remove_unfinished(tmp_path / "checkpoints")
    assert not building.exists()


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(checkpoint.UserError, match=os.strerror(errno.ENOTDIR)):
        write_tiny(tmp_path / "file", 2)
