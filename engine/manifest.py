"""Writes and verifies manifests: the size and SHA-256 of each file below a folder, to find damage."""

import concurrent.futures
import errno
import hashlib
import json
import mmap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import UserError
from engine.files import atomic_folder, open_regular, read_limited, sync_and_drop

NAME = "manifest.json"
MAX_BYTES = 16 * 2**20
BLOCK = 2**22  # bytes compared at a time
OTHER_BITS = "{} was read back with other bits than it has in memory"


def write_manifest(folder: Path) -> None:
    """Writes `folder/manifest.json` over all files below `folder`, without fsync."""
    (folder / NAME).write_bytes(make_manifest(folder, _files(folder)))


def make_manifest(folder: Path, names: Iterable[str]) -> bytes:
    """Returns a manifest of the files of these names below a folder."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        entries = {name: pool.submit(describe, folder / name) for name in names}
        return render({name: entry.result() for name, entry in entries.items()})


def write_read_back(path: Path, encode: Callable[[], Iterable[np.ndarray]]) -> dict[str, Any]:
    """Writes a file to the disk, reads it back from there, and returns its entry in a manifest.

    `encode()` yields the contents, uint8, and is called twice. Raises OSError when other bytes come
    back.
    """
    with path.open("wb") as file:
        for data in encode():
            file.write(data)
    sync_and_drop(path)
    hasher = hashlib.sha256()
    # Mapped, for training goes on: blocks in the heap could take a part of the place that a step's
    # buffer has just left.
    block_on_disk = np.frombuffer(mmap.mmap(-1, BLOCK), np.uint8)
    is_same = np.frombuffer(mmap.mmap(-1, BLOCK), bool)
    with open_regular(path) as file:
        for block in _blocks(encode()):
            size = len(block)
            is_whole = file.readinto(block_on_disk[:size]) == size
            if not is_whole or not np.equal(block_on_disk[:size], block, out=is_same[:size]).all():
                raise OSError(errno.EIO, OTHER_BITS.format(path.name))
            hasher.update(block_on_disk[:size])
        if file.read(1):
            raise OSError(errno.EIO, OTHER_BITS.format(path.name))
        return {"bytes": file.tell(), "sha256": hasher.hexdigest()}


def _blocks(arrays: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yields the arrays in pieces of at most BLOCK bytes."""
    for array in arrays:
        for start in range(0, len(array), BLOCK):
            yield array[start : start + BLOCK]


def verify(folder: Path, skip: str | None = None, *, extra: bool = True) -> list[str]:
    """Returns one line per damaged, missing or (unless `extra` is False) extra file; names that
    begin with `skip` are not read.

    The manifest holds its own SHA-256 and must be, byte for byte, as `write_manifest` writes it.
    """
    listing = folder / NAME
    if not listing.exists():
        return [f"{listing} is missing"]
    try:
        data = read_limited(listing, MAX_BYTES)
        entries = json.loads(data)["files"]
        if data != render(entries):
            raise ValueError
    except OSError as error:
        return [f"{listing} cannot be read: {error.strerror}"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return [f"{listing} is damaged"]

    def fault(name: str) -> str | None:
        path = folder / name
        if not path.is_file():  # a folder in its place too
            return f"{path} is missing"
        if name not in entries:
            return f"{path} does not belong there"
        try:
            size = path.stat().st_size
            if size != entries[name]["bytes"]:
                return f"{path} has {size:,} bytes instead of {entries[name]['bytes']:,}"
            if describe(path) == entries[name]:
                return None
            return f"{path} is damaged: its SHA-256 is another"
        except UserError as error:
            return str(error)
        except OSError as error:
            return f"{path} cannot be read: {error.strerror}"

    names = {*entries}
    if extra:
        names |= _files(folder)
    if skip:
        names = {name for name in names if not name.startswith(skip)}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return [line for line in pool.map(fault, sorted(names)) if line]


def build_once(
    folder: Path, build: Callable[[Path], None], damage: Callable[[Path], list[str]] = verify
) -> None:
    """Makes a folder of the cache by build(empty folder), unless it is there and `damage`, by
    default its manifest, finds none.

    Another process may build it meanwhile. Raises UserError when the files do not read back as they
    should be, else what `build` raises; the folder is then not there.
    """
    if not damage(folder):
        return
    try:
        with atomic_folder(folder) as building:
            build(building)
            lines = damage(building)
            if lines:
                raise UserError(
                    f"The files made for {folder} are not as they should be, "
                    f"so they were not kept: {lines[0]}."
                )
    except OSError:
        if damage(folder):
            raise


def _files(folder: Path) -> set[str]:
    """Returns the names of all files below a folder but its manifest."""
    files = [path for path in folder.rglob("*") if not path.is_dir()]
    return {path.relative_to(folder).as_posix() for path in files} - {NAME}


def describe(path: Path) -> dict[str, Any]:
    """Returns a file's entry in a manifest."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def sha256_of(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def render(files: dict[str, Any]) -> bytes:
    """Returns the bytes of a manifest with these entries."""
    body = json.dumps(files, indent=1, sort_keys=True)
    own = hashlib.sha256(body.encode()).hexdigest()
    return json.dumps({"sha256": own, "files": files}, indent=1, sort_keys=True).encode() + b"\n"
