"""Writes what `python -m bench` measured as one self-contained page, for any screen, light or dark, and for paper."""

import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from bench.anatomy.page import layouts
from bench.cli import Json
from bench.report.figures import CEILING_OF, Figure, Rows, decode_rows, figures, first_training_row, flops_figure
from bench.report.templates import HERE, environment
from bench.stages.claims import GENERATED_CHEAPER
from engine.errors import UserError
from engine.files import atomic_file
from engine.format import Column, column, finite, percent, times

Document = Mapping[str, Any]
Note = tuple[str, str, str]  # row, what is off, why
DEVIATION = 0.15  # of measured from predicted time, above which it is explained
KINDS = {"true": "holds", "false": "fails", "undecided": "open"}  # by a verdict's first word; else "partly"


def write_report(folder: Path, document: Document) -> Path:
    """Writes the stage table's document to `folder`/report.html and returns that path.

    Beside it go the first figure, stages.svg, the way of numbers through each stage, passes.svg, and table and claims in
    Markdown, stages.md, each file whole or not at all.
    Rows, claims and their fields may be absent or None: a missing number is a dash, a figure without numbers is left out.
    Raises UserError when the folder cannot be made or written.
    """
    files = {"report.html": page(document)}
    if "command" in document:
        files["stages.md"] = _environment().get_template("stages.md.j2").render(document)
    if figure := flops_figure(document.get("rows") or []):
        files["stages.svg"] = figure_svg(figure)
        files["passes.svg"] = _environment().get_template("passes.svg.j2").render(document, style=_drawing_style())
    try:
        for name, content in files.items():
            with atomic_file(folder / name) as file:
                file.write(content.encode())
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written: {error.strerror or error}. Choose another folder.") from error
    return folder / "report.html"


def page(document: Document) -> str:
    """Returns the page as HTML."""
    rows = document.get("rows") or []
    groups, notes = lines_and_notes(rows)
    pictures = layouts(document["anatomy"] | {"roofline": _roof(document)}) if document.get("anatomy") else None
    numbers = {claim.get("claim"): claim.get("numbers") or {} for claim in document.get("claims") or []}
    return _environment().get_template("page.html.j2").render(
        document, style=_style(), trained=first_training_row(rows) or {}, groups=groups, notes=notes, columns=columns(rows),
        figures=figures(rows, document.get("ceilings") or {}, document.get("model") or {}), limit=DEVIATION,
        served=sorted((row for row in decode_rows(rows) if finite(row.get("slots"))), key=lambda row: row["slots"]),
        lone=(numbers.get(GENERATED_CHEAPER, {}).get("time") or {}).get("ratio"), agreement=flops_agreement(rows),
        json=json.dumps(dict(document) | {"anatomy": None}, indent=1, ensure_ascii=False, default=str), pictures=pictures,
    )  # fmt: skip


def _roof(document: Document) -> Json:
    """Returns the rows of the table as points of the roofline: those whose products are of the model's own type."""
    rates = (
        (row, row["flops_per_token"]) for row in document["rows"] if row["stage"] != "by hand" and not row.get("series")
    )  # fmt: skip
    return {
        "flops": 1e9 * document["ceilings"][CEILING_OF.get(document["model"]["dtype"], "bf16_gflops")],
        "bytes": 1e9 * document["ceilings"]["read_gbs"],
        "points": [
            {"name": row["name"], "flops": flops["formula"], "bytes": row["bytes_per_token"],
             "seconds": row["seconds_per_token"], "backward": bool(flops["dx"] or flops["dw"])}
            for row, flops in rates if flops["formula"]
        ],
    }  # fmt: skip


def figure_svg(figure: Figure) -> str:
    """Returns a figure as an SVG file of its own, with the page's colours and rules for drawings."""
    charts: Any = _environment().get_template("charts.svg.j2").module
    opening, rest = str(charts.drawing(figure, True)).split(">", 1)
    return f"{opening}>\n<style>\n{_drawing_style()}\n</style>{rest}"


def _drawing_style() -> str:
    colours, _ = _style().split("* {", 1)
    rules = [line for line in _style().splitlines() if line.startswith("svg")]
    return "\n".join([colours.strip(), *rules, "svg { background: var(--page); }"])


def _environment() -> jinja2.Environment:
    templates = environment()
    templates.filters |= {"deviation": deviation, "kind": _kind}
    templates.tests["measured"] = lambda value: bool(finite(value))
    return templates


def _style() -> str:
    return (HERE / "page.css").read_text(encoding="utf-8")


def _kind(verdict: Any) -> str:
    return KINDS.get(re.split(r"\W+", str(verdict).strip().lower(), maxsplit=1)[0], "partly")


def deviation(off: float | None) -> str:
    """Writes `+12%`, or from three times up `3.1×`."""
    return percent(off, signed=True) if off is None or off < 2 else times(off + 1, 1)


def lines_and_notes(rows: Rows) -> tuple[list[list[dict[str, Any]]], list[Note]]:
    """Returns the table's lines (each its row, deviation and numbers of notes), a list for each stage, and the notes in order.

    A line is {row: the row of the document; off: its time over the predicted one, less 1; note: the number of its note, 0
    for none}. The template formats the cells.
    """
    lines: list[dict[str, Any]] = []
    notes: list[Note] = []

    def note(row: Json, of: str, why: Any) -> int:
        notes.extend([(row["name"], of, why)] if why else [])
        return len(notes) if why else 0

    for row in rows:
        seconds, predicted = finite(row.get("seconds_per_token")), finite(row.get("predicted_seconds_per_token"))
        off = seconds / predicted - 1 if seconds and predicted else None
        lines.append({
            "row": row, "off": off, "note": note(row, "" if off is None else deviation(off), row.get("explanation")),
        })  # fmt: skip
    return [list(group) for _, group in itertools.groupby(lines, key=lambda line: line["row"].get("stage"))], notes


def columns(rows: Rows) -> dict[str, Column]:
    """Returns the number format of each column: its SI prefix and decimals."""
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


def flops_agreement(rows: Rows) -> tuple[int, int]:
    """Returns how many rows have the same FLOPs by formula and walker, and how many have both."""
    pairs = [[finite((row.get("flops_per_token") or {}).get(counter)) for counter in ("formula", "walker")] for row in rows]
    both = [pair for pair in pairs if None not in pair]
    return sum(formula == walker for formula, walker in both), len(both)
