"""Prepares the lines of the page's stage table: one prefix a column, and numbered notes."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from engine.format import Column, column, number, percent, times

DEVIATION = 0.15  # of a measured time from the predicted one, beyond which it is explained

Row = Mapping[str, Any]
Note = tuple[str, str, str]  # the row's name, what of it is off, and why


def deviation(off: float | None) -> str:
    """Writes `+12%`, or from three times up `3.1×`."""
    return percent(off, signed=True) if off is None or off < 2 else times(off + 1, 1)


def lines_and_notes(rows: Sequence[Row]) -> tuple[list[list[dict[str, Any]]], list[Note]]:
    """Returns the lines, a list for each stage, and their notes in order.

    A line has its row; `off`, its time over the predicted one, less 1; and the numbers of its notes, 0 for none.
    """
    lines: list[dict[str, Any]] = []
    notes: list[Note] = []

    def note(row: Row, of: str, why: Any) -> int:
        notes.extend([(row["name"], of, why)] if why else [])
        return len(notes) if why else 0

    for row in rows:
        seconds, predicted = number(row.get("seconds_per_token")), number(row.get("predicted_seconds_per_token"))
        off = seconds / predicted - 1 if seconds and predicted else None
        lines.append({
            "row": row, "off": off, "note": note(row, "" if off is None else deviation(off), row.get("explanation")),
            "peak_note": note(row, "peak", row.get("peak_explanation")),
        })  # fmt: skip
    return [list(group) for _, group in itertools.groupby(lines, key=lambda line: line["row"].get("stage"))], notes


def columns(rows: Sequence[Row]) -> dict[str, Column]:
    """Returns the prefix and the decimals of each column."""
    counted = [row.get("flops_per_token") or {} for row in rows]
    return {
        "flops": column(each.get(counter) for each in counted for counter in ("formula", "walker", "xla")),
        "time": column(row.get(name) for row in rows for name in ("seconds_per_token", "predicted_seconds_per_token")),
        "peak": column((row.get("peak_bytes") for row in rows), digits=2),
        "moved": column((row.get("bytes_per_token") for row in rows), digits=2),
        # A row without products costs next to nothing, and its zeros would stretch the column.
        "price": column(
            (row.get("usd_per_million_tokens") for row, each in zip(rows, counted) if each.get("formula") != 0),
            digits=2, prefixed=False,
        ),
    }  # fmt: skip


def agreement(rows: Sequence[Row]) -> tuple[int, int]:
    """Returns in how many rows the formula and the walker agree, and how many have both."""
    pairs = [[number((row.get("flops_per_token") or {}).get(counter)) for counter in ("formula", "walker")] for row in rows]
    both = [pair for pair in pairs if None not in pair]
    return sum(formula == walker for formula, walker in both), len(both)
