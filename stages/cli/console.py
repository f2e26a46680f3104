"""Prints the output of a command: a banner, tasks that take a while, one live line, a summary.

On a terminal the live line stays in place and fits its width; elsewhere it becomes a plain line
every few seconds. rich, 0.07 s to import, is imported only for a terminal.
"""

import contextlib
import itertools
import operator
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

from engine.format import duration

ReportProgress = Callable[[int, int], None]

BETWEEN_LINES = 5.0  # seconds, where lines stay
BETWEEN_FRAMES = 0.15  # seconds, on a terminal
BETWEEN_TASK_LINES = 30.0  # seconds, where lines stay, of a task under way
SILENT = 2.0  # seconds: a shorter task gets no line
MOST_COUNTED = 10_000  # parts of a task, of which more are a percentage


class Console(contextlib.AbstractContextManager["Console"]):
    """Prints to `stream`. As a context it leaves the terminal as it was, whatever happens."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.terminal = self.stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
        self._rich: Any = None
        self._live: Any = None
        self._last_shown = -BETWEEN_LINES  # on time.perf_counter
        self._lock = threading.RLock()  # of the live line, which a task's thread draws too
        self._tasks: list[threading.Event] = []
        if self.terminal:
            import rich.console

            self._rich = rich.console.Console(file=self.stream, highlight=False)

    def __exit__(self, *_: object) -> None:
        self.close_live()

    def print(self, text: str = "", style: str | None = None) -> None:
        if self._rich:
            self._rich.print(text, style=style, markup=False, soft_wrap=True)
        else:
            print(text, file=self.stream, flush=True)

    def print_notes(self, *notes: str | None) -> None:
        for note in filter(None, notes):
            self.print(note, style="yellow")

    def print_rows(self, rows: Sequence[tuple[str, str]]) -> None:
        """Prints labels beside their values, without those of no value; a terminal wraps long
        values below themselves.
        """
        rows = [row for row in rows if row[1]]
        width = max(len(label) for label, _ in rows)
        if not self._rich:
            self.print("\n".join(f"{label:<{width}}  {value}" for label, value in rows))
            return
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(style="dim", no_wrap=self._rich.width > 2 * width + 10)
        table.add_column()
        for label, value in rows:
            table.add_row(Text(label), Text(value))
        self._rich.print(table)

    def print_marked(self, pieces: Sequence[tuple[str, bool]]) -> None:
        """Prints (text, is it marked) pieces as one text. A terminal shows marked ones on green; elsewhere
        they stand in [[ ]].
        """
        if not self._rich:
            line = ""
            for mark, group in itertools.groupby(pieces, operator.itemgetter(1)):
                text = "".join(piece for piece, _ in group)
                line += f"[[{text}]]" if mark else text
            self.print(line)
            return
        from rich.text import Text

        styled = Text()
        for piece, mark in pieces:
            styled.append(piece, "black on green" if mark else "dim")
        self._rich.print(styled, soft_wrap=True)

    @contextlib.contextmanager
    def task(self, label: str, always: bool = False) -> Iterator[ReportProgress]:
        """Prints `label ... 4.1 s` around a task, and meanwhile the seconds so far and the progress
        that is reported.

        A terminal shows those in its live line every second, a pipe in a line every
        BETWEEN_TASK_LINES. The last line stays if `always` or if the task took long. Of tasks
        within tasks the innermost is shown.
        """
        begin = time.perf_counter()
        over = threading.Event()
        progress = ""
        open_line = False

        def show() -> None:
            nonlocal open_line
            elapsed = duration(time.perf_counter() - begin) + progress
            line = f"{label} ... {elapsed}"
            if self.terminal:
                self._draw(line)
                return
            if open_line:
                print(elapsed, file=self.stream, flush=True)  # behind the label, which stands there
            else:
                print(line, file=self.stream, flush=True)
            open_line = False

        def keep_showing() -> None:
            between = BETWEEN_TASK_LINES
            if self.terminal:
                between = 1.0
            # These are raised when the stream is closed. The main thread's next line raises them too.
            with contextlib.suppress(OSError, ValueError):
                while not over.wait(between):
                    with self._lock:
                        if self._tasks[-1:] == [over] and not over.is_set():
                            show()

        def report(done: int, total: int) -> None:
            nonlocal progress
            if total <= MOST_COUNTED:
                progress = f", {done:,} of {total:,}"
            else:
                progress = f", {done / total:.0%}"
            with self._lock:
                if self.terminal and self._is_due(BETWEEN_FRAMES):
                    self._last_shown = time.perf_counter()
                    show()

        if self.terminal:
            self._draw(f"{label} ...")  # in place, gone when it is done
        elif always:
            print(f"{label} ...", end=" ", file=self.stream, flush=True)
            open_line = True
        thread = threading.Thread(target=keep_showing, daemon=True)
        self._tasks.append(over)
        thread.start()
        try:
            yield report
        except BaseException:
            if open_line:
                self.print()
            raise
        finally:
            with self._lock:
                over.set()
                self._tasks.remove(over)
                self.close_live()
            thread.join()
        elapsed = time.perf_counter() - begin
        if open_line:
            self.print(duration(elapsed))
        elif always or elapsed > SILENT:
            self.print(f"{label} ... {duration(elapsed)}")

    def show_live(self, fields: Callable[[], Sequence[str]], important: bool = False) -> None:
        """Shows the fields in the live line when a new one is due. An `important` line is always
        shown, and stays.
        """
        between = BETWEEN_FRAMES if self.terminal else BETWEEN_LINES
        if not (important or self._is_due(between)):
            return
        self._last_shown = time.perf_counter()
        if not self.terminal:
            self.print("  ".join(fields()))
            return
        frame = "\n".join(wrap(fields(), self._rich.width))
        if important:
            self.close_live()
            self.print(frame)
        else:
            self._draw(frame)

    def close_live(self) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    def _is_due(self, interval: float) -> bool:
        return time.perf_counter() - self._last_shown >= interval

    def _draw(self, text: str) -> None:
        from rich.live import Live
        from rich.text import Text

        frame = Text(text, overflow="ellipsis", no_wrap=True)
        if self._live is None:
            self._live = Live(
                frame, console=self._rich, auto_refresh=False, transient=True, redirect_stderr=False
            )
            self._live.start()
        self._live.update(frame, refresh=True)


def wrap(fields: Sequence[str], width: int) -> list[str]:
    """Joins fields by two spaces in lines of at most `width`, and cuts those that alone are wider."""
    lines: list[str] = []
    for field in fields:
        if lines and len(lines[-1]) + 2 + len(field) <= width:
            lines[-1] += "  " + field
        else:
            lines.append(field[:width])
    return lines
