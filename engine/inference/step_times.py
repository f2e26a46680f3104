"""StepTimes: which program an engine runs, since when, and the longest that each of its programs has taken."""

import time
from typing import NamedTuple


class RunningProgram(NamedTuple):
    """A program that an engine runs. `steps`: how many tokens it decodes for each row, else 1.
    `since`: by time.monotonic.
    """

    name: str
    steps: int
    since: float


class StepTimes:
    """The times of an engine's programs. The engine's thread writes them, and any thread may read
    them.

    A program that `Engine.warm` has not compiled is compiled in its first run, which counts.

    `running`: None between two steps of the engine. `changed`: when a program last began or ended,
    by time.monotonic.
    """

    def __init__(self) -> None:
        self.running: RunningProgram | None = None
        self.changed = time.monotonic()
        self._longest: dict[str, float] = {}  # seconds of a run of each program
        self._longest_step: dict[str, float] = {}  # seconds of one of its steps

    def begin(self, program: str, steps: int = 1) -> None:
        """Ends what runs, and begins a program."""
        self.end()
        self.changed = time.monotonic()
        self.running = RunningProgram(program, steps, self.changed)

    def end(self) -> None:
        running = self.running
        if running is None:
            return
        self.changed = time.monotonic()  # first, for who reads meanwhile
        self.running = None
        seconds = self.changed - running.since
        self._longest[running.name] = max(seconds, self._longest.get(running.name, 0.0))
        self._longest_step[running.name] = max(
            seconds / running.steps, self._longest_step.get(running.name, 0.0)
        )

    def longest(self, running: RunningProgram) -> float | None:
        """Returns the seconds that a run has taken at most so far; None for a program that has not
        run yet.

        Of runs of fewer steps the longest step counts, times the steps of the run that is asked
        about.
        """
        seconds = self._longest.get(running.name)
        if seconds is None:
            return None
        return max(seconds, running.steps * self._longest_step[running.name])
