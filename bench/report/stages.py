"""The lines of the stage table as the page shows them: one prefix a column, and numbered notes for what is explained."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from engine.format import Column, column, number, percent, times

DEVIATION = 0.15  # beyond which a measured time is explained in words

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Note:
    """A numbered remark below the table: the row's name, what of it is off, and why."""

    name: str
    of: str
    why: str


@dataclasses.dataclass(frozen=True)
class Line:
    """One row: `off` is its time over the predicted one, less 1; `note` and `peak_note` number its remarks, 0 for none."""

    row: Row
    off: float | None
    loud: bool
    note: int
    peak_note: int


def deviation(off: float | None) -> str:
    """Writes `+12%`, or how many times as long from three times up."""
    return percent(off, signed=True) if off is None or off < 2 else times(off + 1, 1)


def lines_and_notes(rows: Sequence[Row]) -> tuple[list[list[Line]], list[Note]]:
    """Returns the lines, a list for each run of rows of one stage, and their notes in order."""
    groups: list[list[Line]] = []
    notes: list[Note] = []

    def note(row: Row, of: str, why: Any) -> int:
        """Adds a note where there is something to say, and returns its number."""
        if why:
            notes.append(Note(row["name"], of, why))
        return len(notes) if why else 0

    for index, row in enumerate(rows):
        seconds, predicted = number(row.get("seconds_per_token")), number(row.get("predicted_seconds_per_token"))
        off = seconds / predicted - 1 if seconds and predicted else None
        first = note(row, deviation(off) if off is not None else "", row.get("explanation"))
        line = Line(row, off, off is not None and abs(off) > DEVIATION, first, note(row, "peak", row.get("peak_explanation")))
        if not index or row.get("stage") != rows[index - 1].get("stage"):
            groups.append([])
        groups[-1].append(line)
    return groups, notes


def columns(rows: Sequence[Row]) -> dict[str, Column]:
    """Chooses the prefix and the decimals of each column."""
    counted = [row.get("flops_per_token") or {} for row in rows]
    return {
        "flops": column(each.get(counter) for each in counted for counter in ("formula", "walker", "xla")),
        "time": column(row.get(name) for row in rows for name in ("seconds_per_token", "predicted_seconds_per_token")),
        "peak": column((row.get("peak_bytes") for row in rows), digits=2),
        "moved": column((row.get("bytes_per_token") for row in rows), digits=2),
        # What multiplies nothing costs next to nothing, and would stretch the column with its zeros.
        "price": column(
            (row.get("usd_per_million_tokens") for row, each in zip(rows, counted) if each.get("formula") != 0),
            digits=2, prefixed=False,
        ),
    }  # fmt: skip


def agreement(rows: Sequence[Row]) -> tuple[int, int]:
    """Returns in how many rows the formula and the walker agree, and how many have both."""
    counted = [row.get("flops_per_token") or {} for row in rows]
    both = [(number(each.get("formula")), number(each.get("walker"))) for each in counted]
    both = [pair for pair in both if None not in pair]
    return sum(formula == walker for formula, walker in both), len(both)
