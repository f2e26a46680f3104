"""Writes files and folders atomically, locks folders, and finds the user's cache folder."""

import atexit
import contextlib
import fcntl
import hashlib
import io
import json
import os
import secrets
import shutil
import stat
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from engine.errors import UserError

UNFINISHED = ".unfinished"  # the end of the name of a file or folder that is being written
DAY = 24 * 60 * 60  # seconds
SHA256_BYTES = 32
# what this process is writing: each with the path at which it is to appear
_being_written: dict[Path, Path] = {}


def warn_of_cache(variable: str, folder: Path, problem: str) -> None:
    """Warns that a cache folder has a problem; `variable` is what the user may set to another."""
    sentence = f"The cache folder {folder} {problem}, so what is compiled or fetched now is not kept"
    warnings.warn(f"{sentence}: set {variable} to a folder that you alone can write.", stacklevel=2)


def cache_root() -> Path:
    """Returns `$THRICE_CACHE`, else `$XDG_CACHE_HOME/thrice`, else `~/.cache/thrice`, which need
    not exist.
    """
    root = os.environ.get("THRICE_CACHE")
    if root:
        return Path(root)
    # expanduser leaves "~" for a user without one
    home = os.path.expanduser("~/.cache").removeprefix("~")
    return Path(os.environ.get("XDG_CACHE_HOME") or home) / "thrice"


def cache_folder(name: str, room: int = 2**20) -> Path:
    """Makes and returns a folder in `cache_root()`.

    It is made private (mode 0700), for compiled programs are loaded from there as code. If others
    can write there or own it, if fewer than `room` bytes are free, or if it cannot be written, this
    warns and sets THRICE_CACHE to a temporary folder for this process and those it starts. Unless
    others could write it, what was cached is found there too.
    """
    root = cache_root()
    folder = root / name
    with contextlib.suppress(OSError):
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
    untrusted = trust_problem(root) or trust_problem(folder)
    problem = ""
    if untrusted:
        problem = f"is not used ({untrusted})"
    else:
        unwritable = write_problem(folder, room)
        if unwritable:
            problem = f"cannot be written ({unwritable})"
    if problem:
        if os.environ.get("THRICE_CACHE"):
            variable = "THRICE_CACHE"
        else:
            variable = "THRICE_CACHE or XDG_CACHE_HOME"
        warn_of_cache(variable, root, problem)
        root = _temporary_cache(root, room, links=not untrusted)
        os.environ["THRICE_CACHE"] = str(root)
        with contextlib.suppress(OSError):
            (root / name).mkdir(parents=True, exist_ok=True, mode=0o700)
    elif root.stat().st_mode & 0o077:
        with contextlib.suppress(PermissionError):
            root.chmod(0o700)
    return root / name


def trust_problem(path: Path | int) -> str:
    """Returns why another user may have written a file (a path, or an open one's number) or folder;
    empty if none can have.
    """
    try:
        status = os.stat(path)
    except OSError:
        return ""
    if status.st_uid not in (os.geteuid(), 0):
        return f"{path} belongs to another user"
    if status.st_mode & 0o022:
        return f"others can write to {path}"
    return ""


def write_problem(folder: Path, room: int = 2**20) -> str:
    """Makes a folder where there is none, and returns why `room` bytes cannot be written there;
    empty when they can.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
        disk = shutil.disk_usage(folder)
    except OSError as error:
        return error.strerror or str(error)
    if disk.total and disk.free < room:
        return f"{disk.free / 1e6:,.1f} MB are free of {room / 1e6:,.1f} needed"
    return ""


def _temporary_cache(root: Path, room: int, links: bool) -> Path:
    """Returns a folder, removed at exit, with `links` to all that lies two levels below `root`.

    If none can be made, returns `root`, or without `links` a path where nothing can be.
    """
    # the second can be written in a container whose root, with /tmp, cannot
    for parent in (None, "/dev/shm"):
        with contextlib.suppress(OSError):
            folder = Path(tempfile.mkdtemp(prefix="thrice-", dir=parent))
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            if not write_problem(folder, room):
                if links:
                    _link_entries(root, folder)
                return folder
    if links:
        return root
    return Path(os.devnull, "cache")


def _link_entries(root: Path, folder: Path) -> None:
    """Makes links in `folder` to all that lies two levels below `root`."""
    for entry in root.glob("*/*"):
        link = folder / entry.relative_to(root)
        link.parent.mkdir(exist_ok=True, mode=0o700)
        link.symlink_to(entry.absolute())


def sync(path: str | Path) -> None:
    """Writes a file, or a folder's renames, to the disk, so that they survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """Makes a folder and those above it, so that they survive a power cut."""
    if not path.exists():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def sync_and_drop(path: Path) -> None:
    """Writes a file to the disk and drops it from the page cache, so that reading it reads the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def open_regular(path: Path) -> io.BufferedReader:
    """Opens a file to read. Raises UserError for what is no file: a pipe would be waited for, and a
    device has no end.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if stat.S_ISREG(os.fstat(handle).st_mode):
        return os.fdopen(handle, "rb")
    os.close(handle)
    raise UserError(f"{path} is a folder, a pipe or a device; a file is needed.")


def read_limited(path: Path, limit: int) -> bytes:
    """Reads a file of at most `limit` bytes. Raises UserError for a larger one, and where there is none."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise UserError(
                    f"{path} has {size:,} bytes; {limit:,} are the most that is read of such a file."
                )
            return file.read(size)  # `limit` would be allocated at once
    except FileNotFoundError:
        raise UserError(f"There is no {path}.") from None


def read_checked(path: Path, limit: int) -> bytes:
    """Returns what `write_checked` wrote there; nothing if it did not, it is damaged, or another
    user can have written it.
    """
    with contextlib.suppress(OSError, UserError), open_regular(path) as file:
        data = file.read(limit)
        content = data[:-SHA256_BYTES]
        digest = data[-SHA256_BYTES:]
        if _digest(path, content) == digest and not trust_problem(file.fileno()):
            return content
    return b""


def write_checked(path: Path, data: bytes) -> None:
    """Writes data for this user alone, and behind it the SHA-256 of the file's name and the data.

    It replaces whatever is there: see `remove_unless_file`.
    """
    remove_unless_file(path)
    with atomic_file(path) as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(data + _digest(path, data))


def remove_unless_file(path: Path) -> None:
    """Removes what lies where a file of the cache is to be written, such as a folder, a pipe or a
    link to nothing.
    """
    if not path.is_file():
        remove(path)


def remove(path: Path) -> None:
    """Removes a file, a pipe, a link, or a folder with all that is in it, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _digest(path: Path, data: bytes) -> bytes:
    return hashlib.sha256(path.name.encode() + data).digest()


def decode_utf8(data: bytes, where: object) -> str:
    """Returns the text in `data`, without a byte order mark. Raises UserError when it is not UTF-8."""
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8: byte 0x{data[error.start]:02X} at position {error.start}. "
            "Convert it (for example with iconv), or leave it out."
        ) from None


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a binary file that appears at `path`, complete and on disk, when the block ends; after
    an error, nothing.

    Raises UserError for a pipe or a device, such as /dev/stdout, in whose place the file would
    come.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f"{path} is a pipe or a device; a file is needed.")
    with _unfinished(path, Path.touch) as temporary:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    sync(path.parent)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Makes a folder that appears at `path`, or replaces one, when the block ends, its files
    synced; on an error, nothing.
    """
    with _unfinished(path, Path.mkdir) as temporary:
        building = temporary / "new"
        building.mkdir()
        yield building
        for root, _, names in os.walk(building):
            for name in (*names, ""):  # the last is the folder itself
                sync(os.path.join(root, name))
        if os.path.lexists(path):
            os.replace(path, temporary / "old")
        os.replace(building, path)
    sync(path.parent)


@contextlib.contextmanager
def _unfinished(path: Path, make: Callable[[Path], object]) -> Iterator[Path]:
    """Makes a hidden file or folder beside `path`, to write in, and removes it when the block ends.

    It is locked for the block, by which `remove_unfinished` knows that its writer lives.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished(path.parent)
    with contextlib.ExitStack() as lock:
        while True:
            temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{UNFINISHED}")
            make(temporary)
            with contextlib.suppress(FileNotFoundError):
                lock.enter_context(folder_lock(temporary))
            if temporary.exists():  # nobody removed it before it was locked
                break
        _being_written[temporary] = path
        try:
            yield temporary
        finally:
            discard(temporary, path)
            del _being_written[temporary]


def remove_unfinished(folder: Path) -> None:
    """Removes what killed writers left unfinished in a folder; where the file system has no locks,
    only what is a day old.
    """
    for leftover in folder.glob(f".*.*{UNFINISHED}"):
        # until it is gone: a writer may be about to lock it
        with contextlib.suppress(OSError), contextlib.ExitStack() as lock:
            handle = os.open(leftover, os.O_RDONLY | os.O_NONBLOCK)
            lock.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if isinstance(error, BlockingIOError) or time.time() - os.fstat(handle).st_mtime < DAY:
                    continue  # its writer lives
            discard(leftover, folder / leftover.name[1:].rsplit(".", 2)[0])
            # a folder that was not made by `atomic_folder`
            shutil.rmtree(leftover, ignore_errors=True)


def discard_unfinished() -> None:
    """Removes what this process is writing, before it ends in the middle of it; on Linux also what
    huggingface_hub is.
    """
    for temporary, path in [*_being_written.items()]:
        with contextlib.suppress(OSError):
            discard(temporary, path)
    for descriptor in Path("/proc/self/fd").glob("*"):
        with contextlib.suppress(OSError):
            open_file = os.readlink(descriptor)
            if open_file.endswith(".incomplete"):
                os.unlink(open_file)


def discard(temporary: Path, path: Path) -> None:
    """Removes what was to appear at `path`; puts back a folder that it was about to replace.

    The thread that writes it may go on meanwhile: nothing half removed can get to `path`, and `old`
    is removed only once the new folder is in place.
    """
    if not temporary.is_dir():
        temporary.unlink(missing_ok=True)
        return
    new = temporary / "new"
    if new.exists():
        with contextlib.suppress(OSError):  # its writer was faster
            os.replace(new, temporary / "dropped")
    old = temporary / "old"
    if os.path.lexists(old):  # first: from here on `path` stays as it is
        if path.exists():
            with contextlib.suppress(OSError):
                remove(old)
        else:
            os.replace(old, path)
    shutil.rmtree(temporary / "dropped", ignore_errors=True)
    # where the writer has just moved something here; its own end, or the next, puts it back
    with contextlib.suppress(OSError):
        temporary.rmdir()


@contextlib.contextmanager
def folder_lock(folder: Path, wait: bool = True) -> Iterator[None]:
    """Locks a folder for the block, if its file system has locks. Unless `wait`, raises
    BlockingIOError if another holds it.
    """
    mode = fcntl.LOCK_EX
    if not wait:
        mode |= fcntl.LOCK_NB
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, mode)
        except BlockingIOError:
            raise
        except OSError:  # the file system has no locks
            pass
        yield
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())


def write_cached_json(path: Path, value: Any) -> None:
    """Writes a JSON file of the cache, in the place of whatever is there."""
    remove_unless_file(path)
    write_json(path, value)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
