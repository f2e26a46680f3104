"""Writes files and folders atomically, locks folders, and finds the user's cache folder."""

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO


def cache_folder(*parts: str) -> Path:
    """Makes and returns a folder below `$THRICE_CACHE`, else `$XDG_CACHE_HOME/thrice`, else `~/.cache/thrice`.

    Compiled programs and weights read from there are trusted, so it is made private (mode 0700).
    """
    root = os.environ.get("THRICE_CACHE")
    base = Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "thrice"
    folder = base.joinpath(*parts)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if base.stat().st_mode & 0o077:
        with contextlib.suppress(PermissionError):
            base.chmod(0o700)
    return folder


def sync(path: str | Path) -> None:
    """Writes a file, or a folder's renames, to the disk, so that they survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a binary file that appears at `path`, complete and on disk, when the block ends; after an error, nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        with open(name, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    sync(path.parent)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Makes a folder that appears at `path`, or replaces one, when the block ends, its files synced; on an error, nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield building
        for root, _, names in os.walk(building):
            for name in (*names, ""):  # the last is the folder itself
                sync(os.path.join(root, name))
        os.chmod(building, 0o755)
        if replaced := path.exists():
            old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
            os.replace(path, old / path.name)
        os.replace(building, path)
        if replaced:
            shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    sync(path.parent)


@contextlib.contextmanager
def folder_lock(folder: Path, wait: bool = True) -> Iterator[None]:
    """Locks a folder (flock on itself) for the block; raises BlockingIOError if another holds it and `wait` is False.

    Does nothing where the file system has no locks.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError:
            pass
        yield
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Writes one JSON document atomically, ending in a newline."""
    with atomic_file(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n")
