"""Prints tables on stdout and lines of progress on stderr, on a terminal or into a pipe."""

import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

PIPED_WIDTH = 160  # of a pipe: the widest table fits
ERASE_LINE = "\x1b[2K"


def progress(text: str, replace: bool = False) -> None:
    """Prints a line of progress on stderr; on a terminal, the next line replaces one with
    `replace`.
    """
    if not sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)
        return
    end = "\r" if replace else "\n"
    print(f"{ERASE_LINE}{text}", end=end, file=sys.stderr, flush=True)


def console() -> Any:
    """Returns a rich console on stdout; off a terminal, a plain one that is wide enough for the
    tables.
    """
    from rich.console import Console

    terminal = sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
    return Console(highlight=False, width=None if terminal else PIPED_WIDTH, force_terminal=terminal)


def print_table(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> None:
    """Prints a table whose first `left` columns are aligned left, the others right. What is too
    wide is folded, never cut.
    """
    from rich import box
    from rich.table import Table

    grid = Table(
        title=title,
        box=box.SIMPLE_HEAD if any(heads) else None,
        title_justify="left",
        pad_edge=False,
        title_style="bold",
    )
    for index, head in enumerate(heads):
        grid.add_column(head, justify="left" if index < left else "right", overflow="fold")
    for row in rows:
        grid.add_row(*row)
    console().print(grid)
