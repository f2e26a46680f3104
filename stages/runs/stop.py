"""Stop: whether a loop ends early, for a signal or a line that cannot be written, and its exit code."""

import contextlib
from collections.abc import Iterator

from engine.mesh import processes
from stages.cli import signals
from stages.cli.command import NOBODY_READS


class Stop:
    """Whether a loop ends early: for a signal, or a line that cannot be written.

    `code` is the exit code that the loop ends with, or 0 if it goes on. `poll` and `exchange` set it.
    """

    def __init__(self, deferral: signals.Deferral) -> None:
        self.deferral = deferral
        self.failure: OSError | None = None  # of the first line that could not be written
        self.code = 0

    @contextlib.contextmanager
    def noting_failure(self) -> Iterator[None]:
        """Has the run end, saved, when a line cannot be written: the other processes must hear of
        it."""
        try:
            yield
        except OSError as error:
            if self.failure is None:
                self.failure = error

    def poll(self) -> bool:
        """Sets `code` where this process is the only one, and returns whether the loop ends early.

        Of several processes each ends once all know of it, and only `exchange` sets `code`.
        """
        if processes.process_count() == 1:
            self.code = self._own_code()
        return bool(self.code)

    def exchange(self, seconds: float) -> float:
        """Sets `code` to the highest of all processes, and returns process 0's `seconds`, so that
        all decide alike. One message between processes carries both.
        """
        rows = processes.gather_numbers(seconds, self._own_code())
        self.code = int(max(code for _, code in rows))
        return rows[0][0]

    def _own_code(self) -> int:
        if self.failure:
            if isinstance(self.failure, BrokenPipeError):
                return NOBODY_READS
            return processes.MISTAKE
        if self.deferral.received:
            return 128 + self.deferral.received
        return 0
