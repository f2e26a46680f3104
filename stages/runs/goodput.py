"""Goodput: the share of a run's time, restarts and what lay between them included, that trained what is kept.

Kept in the run folder's starts.json, an entry for each start of the command, by process 0.
"""

import contextlib
import dataclasses
import itertools
import json
import time
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.files import write_json
from engine.format import duration, join_words, percent, quantity
from engine.mesh import processes
from engine.storage.run_folder import read_json
from stages.cli.command import process_start

NAME = "starts.json"


@dataclasses.dataclass
class Start:
    """A start of the command: seconds since 1970 at its begin and at its last sign of life, and what its
    seconds were for.
    """

    began: float
    last_sign: float
    trained_before: float  # seconds of training in the checkpoint that it went on from
    trained: float = 0.0
    starting: float = 0.0  # until its first step: loading, and compiling
    evaluating: float = 0.0
    saving: float = 0.0  # that steps waited for


@dataclasses.dataclass(frozen=True)
class Goodput:
    """What a run's seconds were for, from its first start until now. `kept`: trained, and not again."""

    total: float
    kept: float
    lost: float  # trained, and then again, as no checkpoint had it
    starting: float
    evaluating: float
    saving: float
    waiting: float  # between the last sign of a start and the next start
    restarts: int

    def describe(self) -> str:
        parts = [f"{duration(self.kept)} trained"]
        for seconds, what in (
            (self.starting, "starting and compiling"),
            (self.evaluating, "evaluating"),
            (self.saving, "saving"),
            (self.lost, "lost"),
            (self.waiting, "waiting"),
        ):
            if seconds >= 0.05:
                parts.append(f"{duration(seconds)} {what}")
        restarts = ""
        if self.restarts:
            restarts = f", over {quantity(self.restarts, 'restart')}"
        return f"{percent(self.kept / self.total)} of {duration(self.total)}{restarts}: {join_words(parts)}"


class Starts:
    """The starts of a run, of which `current` is this one: a loop adds to its seconds.

    `trained`: seconds of training in the checkpoint that this start goes on from; `is_new`: whether it
    begins the run. To be made before metrics.jsonl drops the lines of steps that run again.
    """

    def __init__(self, folder: Path, trained: float, is_new: bool) -> None:
        self._path = folder / NAME
        self._earlier: list[Start] = []
        if processes.is_first() and not is_new:
            self._earlier = _read(self._path)
        if self._earlier:
            _add_last_signs(self._earlier[-1], folder / "metrics.jsonl")
        now = time.time()
        age = time.perf_counter() - process_start()
        self.current = Start(began=now - age, last_sign=now, trained_before=trained)
        self.write()

    def write(self) -> None:
        """Writes starts.json. A disk that refuses it is met by what the run needs, which says so."""
        self.current.last_sign = time.time()
        if processes.is_first():
            entries = [dataclasses.asdict(start) for start in (*self._earlier, self.current)]
            with contextlib.suppress(OSError):
                write_json(self._path, {"starts": entries})

    def goodput(self, kept: float) -> Goodput:
        """Returns what all seconds were for; `kept`: those of training in the run's last state."""
        starts = [*self._earlier, self.current]
        trained = sum(start.trained for start in starts)
        waiting = 0.0
        for before, after in itertools.pairwise(starts):
            waiting += max(0.0, after.began - before.last_sign)
        return Goodput(
            total=max(time.time() - starts[0].began, kept),
            kept=kept,
            lost=max(0.0, trained - kept),
            starting=sum(start.starting for start in starts),
            evaluating=sum(start.evaluating for start in starts),
            saving=sum(start.saving for start in starts),
            waiting=waiting,
            restarts=len(starts) - 1,
        )


def _read(path: Path) -> list[Start]:
    """Returns the starts in the file; none where it is missing or damaged: a run goes on without."""
    entries: Any = ()
    with contextlib.suppress(UserError, OSError):
        entries = read_json(path).get("starts", ())
    starts = []
    try:
        for entry in entries:
            numbers = {field.name: float(entry[field.name]) for field in dataclasses.fields(Start)}
            starts.append(Start(**numbers))
    except (KeyError, TypeError, ValueError):
        return []
    return starts


def _add_last_signs(start: Start, metrics: Path) -> None:
    """Adds to a start what its last lines of metrics tell: a killed one wrote nothing else."""
    try:
        changed = metrics.stat().st_mtime
        *_, last = metrics.read_bytes().splitlines()
        seconds = float(json.loads(last)["seconds"])
    except (OSError, ValueError, KeyError, TypeError):  # no line, or one that is half written
        return
    start.last_sign = max(start.last_sign, changed)
    start.trained = max(start.trained, seconds - start.trained_before)
