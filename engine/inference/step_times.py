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
        """Ends the program that runs, if any, and begins another."""
        self.end()
        self.changed = time.monotonic()
        self.running = RunningProgram(program, steps, self.changed)

    def end(self) -> None:
        running = self.running
        if running is None:
            return
        # Another thread may read between these two lines. `changed` is set first, so that a thread that
        # finds nothing running also finds the time of this end.
        self.changed = time.monotonic()
        self.running = None
        seconds = self.changed - running.since
        self._longest[running.name] = max(seconds, self._longest.get(running.name, 0.0))
        self._longest_step[running.name] = max(
            seconds / running.steps, self._longest_step.get(running.name, 0.0)
        )

    def longest(self, running: RunningProgram) -> float | None:
        """Returns the seconds that the longest run of this program has taken so far; None if the
        program has not run yet.

        A run of more steps than any before it may take longer: as many times the longest step as it
        has steps.
        """
        seconds = self._longest.get(running.name)
        if seconds is None:
            return None
        return max(seconds, running.steps * self._longest_step[running.name])
