"""Writes files and folders atomically, locks folders, and finds the user's cache folder."""

import atexit
import contextlib
import fcntl
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO


def warn_of_cache(variable: str, folder: Path, problem: str) -> None:
    """Warns that a cache folder cannot be written, and to set the environment variable `variable`."""
    sentence = f"The cache folder {folder} cannot be written ({problem}), so what is compiled or fetched now is not kept"
    warnings.warn(f"{sentence}: set {variable} to a folder that can.", stacklevel=2)


def cache_root() -> Path:
    """Returns `$THRICE_CACHE`, else `$XDG_CACHE_HOME/thrice`, else `~/.cache/thrice`, which need not exist."""
    if root := os.environ.get("THRICE_CACHE"):
        return Path(root)
    home = os.path.expanduser("~/.cache").removeprefix("~")  # expanduser leaves "~" for a user without one
    return Path(os.environ.get("XDG_CACHE_HOME") or home) / "thrice"


def cache_folder(*parts: str, room: int = 2**20) -> Path:
    """Makes and returns a folder below `cache_root()`.

    Compiled programs and weights read from there are trusted, so it is made private (mode 0700). If it has no `room`, bytes, or
    cannot be written, warns, and sets THRICE_CACHE to a temporary folder for this process and those it starts, in which what
    was cached is found too; if there is no room for that either, what is there can still be read.
    """
    root = cache_root()
    if problem := write_problem(root.joinpath(*parts), room):
        warn_of_cache("THRICE_CACHE" if os.environ.get("THRICE_CACHE") else "THRICE_CACHE or XDG_CACHE_HOME", root, problem)
        root = _temporary_cache(root, room)
        os.environ["THRICE_CACHE"] = str(root)
        with contextlib.suppress(OSError):
            root.joinpath(*parts).mkdir(parents=True, exist_ok=True)
    elif root.stat().st_mode & 0o077:
        with contextlib.suppress(PermissionError):
            root.chmod(0o700)
    return root.joinpath(*parts)


def write_problem(folder: Path, room: int = 2**20) -> str:
    """Makes a folder where there is none, and returns why `room` bytes cannot be written there; empty when they can."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
        disk = shutil.disk_usage(folder)
    except OSError as error:
        return error.strerror or str(error)
    return f"{disk.free / 1e6:,.1f} MB are free of {room / 1e6:,.1f} needed" if disk.total and disk.free < room else ""


def _temporary_cache(root: Path, room: int) -> Path:
    """Returns a folder, removed at exit, with links to all that lies two levels below `root`; or `root` if none can be made."""
    for place in (None, "/dev/shm"):  # the second can be written in a container whose root, with /tmp, cannot
        with contextlib.suppress(OSError):
            folder = Path(tempfile.mkdtemp(prefix="thrice-", dir=place))
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            if not write_problem(folder, room):
                for entry in root.glob("*/*"):
                    link = folder / entry.relative_to(root)
                    link.parent.mkdir(exist_ok=True)
                    link.symlink_to(entry.absolute())
                return folder
    return root


def sync(path: str | Path) -> None:
    """Writes a file, or a folder's renames, to the disk, so that they survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """Makes a folder and those above it, and syncs each into its parent, so that they survive a power cut."""
    if not path.exists():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def sync_and_drop(folder: Path) -> None:
    """Writes all files below a folder to the disk and drops them from the page cache, so that reading them reads the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


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
