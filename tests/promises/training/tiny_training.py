"""A tiny run that dies again and again: its command, and what must be true of its folder each time."""

import collections
import contextlib
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from engine import manifest
from engine.storage import checkpoint
from tests.promises.training.fork_server import ForkServer

SAVE_EVERY = 3
# Runs before each command: a save that begins leaves its step.
NOTE_SAVES = """
from engine.storage.checkpoint import BackgroundSaver
begin = BackgroundSaver.save
def begun(self, step, *rest):
    with open({file!r}, "a") as file:
        print(step, file=file)
    return begin(self, step, *rest)
BackgroundSaver.save = begun
"""
# seconds after which a command is ended: at a load of 15 one that measures the machine took more
# than 90
HANGS = 900.0


class Fault(NamedTuple):
    """A fault of faults.c: at change `at`, ends the process if `error` is 0, else refuses it, `once` or from there on."""

    at: int = 0
    error: int = 0
    once: bool = False


NO_FAULT = Fault()


class TinyRun:
    """Runs of one command in `work`, one after another; `problems` gathers what should not be."""

    def __init__(
        self, server: ForkServer, work: Path, stage: str, *words: object, hardware: Path | None = None
    ) -> None:
        self.server, self.work, self.stage = server, work, stage
        self.folder, self.cache, self.output = work / "run", work / "cache", work.with_suffix(".txt")
        self.words = [*map(str, words), "--out-dir", str(self.folder)]
        self.finished: list[Path] = []
        self.problems: list[str] = []
        # of changes at which a fault happened
        self.kinds: collections.Counter[str] = collections.Counter()
        self.losses = [0]  # steps since the newest checkpoint, at each end
        self.newest = self.unsaved = (
            0  # unsaved: the most steps from a checkpoint until the save after it began
        )
        self.cache.mkdir(parents=True)
        if hardware and hardware.is_dir():  # measuring the machine takes seconds
            shutil.copytree(hardware, self.cache / "hardware")

    def start(self, fault: Fault = NO_FAULT, patch: str = "") -> int:
        log = self.work.with_suffix(".log")
        place = (str(self.work), *fault, str(log))
        patch = f"{NOTE_SAVES.format(file=str(self.work.with_suffix('.saves')))}\n{patch}"
        return self.server.start(
            self.stage, self.words, self.output, place, patch, THRICE_CACHE=str(self.cache)
        )

    def live(self, fault: Fault = NO_FAULT) -> int:
        """Runs the command to its end, however it comes; returns the exit code."""
        timer = threading.Timer(HANGS, os.kill, (self.start(fault), signal.SIGKILL))
        timer.start()
        code = self.server.wait()
        timer.cancel()
        return code

    def changes(self) -> list[list[str]]:
        """The changes on disk of the last command: [kind, path, former path]."""
        lines = self.work.with_suffix(".log").read_text().splitlines()
        return [line.split("\t") for line in lines]

    def rows(self) -> list[dict[str, Any]]:
        """The whole lines of metrics.jsonl."""
        with contextlib.suppress(OSError):
            lines = (self.folder / "metrics.jsonl").read_text().splitlines()
            return [json.loads(line) for line in lines if line.endswith("}")]
        return []

    def examine(self, code: int, wanted: Iterable[int], doing: object) -> None:
        """Notes a wrong exit code, a traceback, a damaged or lost checkpoint; archives the folder
        of a run that finished.
        """
        note = lambda problem: self.problems.append(f"{doing}: {problem}")
        text = self.output.read_text(errors="replace")
        if (
            code not in wanted
            or "Traceback" in text
            or (code == 2 and not re.search("^error: .", text, re.M))
        ):
            note(f"code {code}: {text.strip()[-300:]}")
        steps = checkpoint.steps(self.folder)
        for step in steps:
            for line in manifest.verify(self.folder / "checkpoints" / str(step)):
                note(line)
        newest = max(steps, default=0)
        if newest < self.newest:
            note(f"the newest checkpoint is {newest}, and was {self.newest}")
        self.newest = newest
        logged = max((row["step"] for row in self.rows() if "loss" in row), default=0)
        with contextlib.suppress(OSError):
            begun = map(int, self.work.with_suffix(".saves").read_text().split())
            self.unsaved = max(
                self.unsaved, min([step for step in begun if step > newest], default=logged) - newest
            )
        self.losses.append(logged - newest)
        if code == 0:
            self.archive()

    def archive(self) -> None:
        """Sets a finished run aside; the next one begins with nothing cached but the machine's
        ceilings.
        """
        self.finished.append(
            self.folder.rename(self.work.with_name(f"{self.work.name}-{len(self.finished)}"))
        )
        self.newest = 0
        self.work.with_suffix(".saves").unlink(missing_ok=True)
        for name in ("tokens", "tokenizers"):
            shutil.rmtree(self.cache / name, ignore_errors=True)

    def survive(self, faults: Iterable[Fault], wanted: Iterable[int]) -> int:
        """Runs the command with one fault after another, then to its end; returns how many
        happened.

        Each process goes on from what the one before left. A new run that a fault comes too late
        for is the last.
        """
        count = 0
        for fault in faults:
            new = not self.folder.exists()
            self.examine(self.live(fault), {0, *wanted}, fault)
            if len(changes := self.changes()) >= fault.at:
                count += 1
                self.kinds[changes[fault.at - 1][0]] += 1
            elif new:
                break
        self.finish()
        return count

    def finish(self) -> None:
        if self.folder.exists():
            self.examine(self.live(), {0}, "the last")


def bits(folder: Path) -> dict[str, Any]:
    """What a run logged, as hex, and the digests of the newest checkpoint's arrays."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    value = lambda row, name: row[name].hex() if isinstance(row[name], float) else row[name]
    compared = lambda row: [
        name for name in row if name not in ("step", "seconds", "tokens_per_second", "refused")
    ]
    values = [(row["step"], name, value(row, name)) for row in rows for name in compared(row)]
    return {"rows": values, **saved_bits(folder)}


def saved_bits(folder: Path) -> dict[str, Any]:
    """The newest checkpoint's step and the digests of its arrays, read by the safetensors library."""
    from safetensors.flax import load_file

    from engine.model.paths import unflatten
    from engine.storage.digest import digest

    newest = folder.absolute() / "checkpoints" / str(checkpoint.steps(folder)[-1])
    found = {"step": newest.name}
    for part in ("params", "optimizer"):
        files = map(load_file, sorted(newest.glob(f"{part}.*safetensors")))
        found[part] = digest(unflatten({name: leaf for file in files for name, leaf in file.items()}))
    return found


def differing(run: TinyRun, reference: dict[str, Any]) -> int:
    """How many of the runs that finished differ from the uninterrupted one in any bit."""
    return sum(bits(folder) != reference for folder in run.finished)
