"""A run folder: the files of one training run, and the lock that holds it for one process.

Beside what engine/storage/run_folder.py lists it holds metrics.jsonl, a line every few steps,
starts.json, samples/STEP.txt, and perhaps tensorboard/. A folder with files but no run.json is never written to.
"""

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engine import manifest
from engine.errors import UserError
from engine.files import atomic_file, folder_lock, make_folder, open_regular, remove_unfinished
from engine.mesh import processes
from engine.model.paths import leaf_paths
from engine.storage import checkpoint
from engine.storage.run_folder import RUNS, read_json

RUN_FILES = (
    manifest.NAME,
    "config.json",
    "metrics.jsonl",
    "starts.json",
    "tensorboard",
    "tokenizer",
    "checkpoints",
    "samples",
    "run.json",
)


def default_folder(model: str, data: str) -> Path:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(data).stem).strip("-.") or "text"
    return RUNS / f"{model}-{name}"


def holds_run(folder: Path) -> bool:
    """Whether a run is in the folder. Raises UserError for a file, or a folder that holds something
    else."""
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; a run needs a folder. Give another --out-dir.")
    if (folder / "run.json").exists():
        return True
    if any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise UserError(
            f"{folder} holds files but no run.json, so it is not a run folder. Give another --out-dir."
        )
    return False


def recorded_batch(folder: Path, overwrite: bool) -> int | None:
    if overwrite or not checkpoint.steps(folder):
        return None
    return leaf_paths(read_json(folder / "run.json")).get("recipe/batch")


def clear_run(folder: Path) -> None:
    """Removes a run's files and nothing else; run.json last, so that a kill in between leaves a run
    folder."""
    for name in RUN_FILES:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Makes the run folder and holds it for this process; puts right what killed writers left
    there.

    At the end an empty folder is removed. Raises UserError when another process holds it.
    """
    make_folder(folder)
    try:
        with contextlib.ExitStack() as lock:
            try:
                lock.enter_context(folder_lock(folder, wait=False))
            except BlockingIOError:
                raise UserError(
                    f"Another process trains in {folder}. Wait for it, or give another --out-dir."
                ) from None
            for place in (folder, folder / "checkpoints"):
                remove_unfinished(place)
            yield
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # where it is empty


@contextlib.contextmanager
def updating(folder: Path) -> Iterator[None]:
    """Writes the manifest of a run's own files after the block, which writes them; a kill in
    between leaves no manifest."""
    listing = folder / manifest.NAME
    listing.unlink(missing_ok=True)
    yield
    # A name that begins with a dot is what a kill left.
    tokenizer = (f"tokenizer/{path.name}" for path in (folder / "tokenizer").glob("[!.]*"))
    with atomic_file(listing) as file:
        file.write(manifest.make_manifest(folder, ("config.json", "run.json", *tokenizer)))


def replace_nonfinite(value: Any, replace: Callable[[float], Any]) -> Any:
    if isinstance(value, dict):
        return {name: replace_nonfinite(inner, replace) for name, inner in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return replace(value)
    return value


class JsonLines:
    """Writes lines of JSON in process 0, each with its `step`.

    Opened at a step, it drops later lines, whose steps run again; at step 0 it drops all. Raises
    UserError for what is no file.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        if not processes.is_first():
            return
        earlier_lines: list[bytes] = []
        if self._path.exists():
            with open_regular(self._path) as file:
                if step:
                    earlier_lines = file.read().splitlines()
        lines = []
        for line in earlier_lines:
            # A line may be half written when a run is killed.
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                if json.loads(line)["step"] <= step:
                    lines.append(line + b"\n")
        with atomic_file(self._path) as file:
            file.writelines(lines)

    def add(self, **fields: Any) -> None:
        """Adds a line, with null for numbers that are not finite. Tries twice, then raises OSError."""
        if not processes.is_first():
            return
        clean = replace_nonfinite(fields, lambda _: None)
        try:
            size = self._path.stat().st_size
            try:
                self.append(clean)
            except OSError:
                with contextlib.suppress(OSError):
                    os.truncate(self._path, size)
                self.append(clean)
        except OSError as error:
            # A full disk does not name the file.
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def append(self, fields: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(fields) + "\n")
