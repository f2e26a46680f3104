"""Files appear whole, with the modes that the umask says; what killed writers left is removed, and nothing of live ones."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from engine import files
from engine.errors import UserError
from engine.files import (
    UNFINISHED,
    atomic_file,
    atomic_folder,
    folder_lock,
    open_regular,
    remove_unfinished,
    write_json,
)

WRITER = """
import sys, time
from pathlib import Path
from engine.files import atomic_file, atomic_folder
folder = Path(sys.argv[1])
with atomic_file(folder / "file") as file, atomic_folder(folder / "folder") as building:
    file.write(b"half")
    (building / "half").write_text("half")
    print("writes", flush=True)
    time.sleep(60)
"""


def unfinished(folder: Path) -> list[str]:
    return sorted(path.name.split(".")[1] for path in folder.iterdir() if path.name.endswith(UNFINISHED))


def test_what_a_killed_writer_left_is_removed_by_the_next_and_a_live_ones_is_not(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, tmp_path], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout.readline() == "writes\n"
        write_json(tmp_path / "other", 1)
        with atomic_folder(tmp_path / "folder") as building:
            (building / "whole").touch()
        assert unfinished(tmp_path) == ["file", "folder"]
        os.kill(writer.pid, signal.SIGKILL)
    write_json(tmp_path / "other", 2)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder", "other", "whole"]


def test_a_writer_that_begins_while_another_removes_is_left_alone(tmp_path, monkeypatch):
    """What was found without a lock is removed under one: a writer that locks it in between would
    write into nothing.
    """
    leftover, discard, seen = tmp_path / f".folder.01234567{UNFINISHED}", files.discard, []

    def look(temporary: Path, path: Path) -> None:
        with pytest.raises(BlockingIOError), folder_lock(temporary, wait=False):
            pass
        seen.append(temporary)
        discard(temporary, path)

    monkeypatch.setattr(files, "discard", look)
    leftover.mkdir()
    remove_unfinished(tmp_path)
    assert seen == [leftover]
    assert not leftover.exists()


def test_a_folder_that_was_about_to_be_replaced_is_put_back(tmp_path):
    with atomic_folder(tmp_path / "a.b") as building:
        (building / "old").touch()
    leftover = tmp_path / f".a.b.01234567{UNFINISHED}"
    (leftover / "new").mkdir(parents=True)
    (tmp_path / "a.b").rename(leftover / "old")
    write_json(tmp_path / "other", 1)
    assert (tmp_path / "a.b" / "old").exists()
    assert not leftover.exists()


def test_a_folder_that_another_thread_replaces_while_a_signal_discards_the_new_one_stays(
    tmp_path, monkeypatch
):
    target, remove = tmp_path / "a", shutil.rmtree
    with atomic_folder(target) as building:
        (building / "old").touch()

    def remove_while_the_writer_goes_on(folder: Path, **options: bool) -> None:
        os.replace(target, building.parent / "old")
        remove(folder, **options)

    with contextlib.suppress(FileNotFoundError), atomic_folder(target) as building:
        (building / "new").touch()
        with monkeypatch.context() as patch:
            patch.setattr(files.shutil, "rmtree", remove_while_the_writer_goes_on)
            files.discard_unfinished()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["a", "a/old"]


def test_other_hidden_files_stay(tmp_path):
    names = [".file.swp", ".file.abcdefgh", f"file{UNFINISHED}", f".file{UNFINISHED}"]
    for name in names:
        (tmp_path / name).touch()
    write_json(tmp_path / "file", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "file"])


@pytest.mark.parametrize("umask", [0o077, 0o027, 0o022, 0o002, 0])
def test_modes_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        with atomic_file(tmp_path / "file") as file:
            file.write(b"a")
        with atomic_folder(tmp_path / "folder") as building:
            (building / "file").touch()
    finally:
        os.umask(before)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("file", "folder", "folder/file")]
    assert modes == [0o666 & ~umask, 0o777 & ~umask, 0o666 & ~umask]


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(UserError, match=f"{path} is a folder, a pipe or a device"):
            open_regular(path)


def test_no_file_comes_in_the_place_of_a_pipe_or_a_device(tmp_path):
    pipe, device = tmp_path / "pipe", tmp_path / "device"
    os.mkfifo(pipe)
    device.symlink_to("/dev/full")
    for path in (pipe, device):
        with pytest.raises(UserError, match="a pipe or a device"), atomic_file(path):
            pass
    assert pipe.is_fifo()
    assert device.is_symlink()
