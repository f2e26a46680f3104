"""Writes the anatomy of a model's steps as one self-contained page, for any screen, light or dark."""

from pathlib import Path
from typing import Any

import jinja2

from bench.anatomy.drawing import COLOURS, stacked_areas
from bench.cli import Json
from bench.report.charts import svg_number
from engine.files import atomic_file
from engine.format import percent, si


def write_page(folder: Path, document: Json) -> Path:
    """Writes `folder`/anatomy.html and returns its path."""
    here = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([here, here.parent / "report"]), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        finalize=svg_number,
    )  # fmt: skip
    environment.filters |= {"si": si, "percent": percent}
    top = max(row["peak_bytes"] for row in document["rows"]) * 1.02
    pictures = [(row, _picture(row, top)) for row in document["rows"]]
    text = environment.get_template("page.html.j2").render(document, pictures=pictures, colours=COLOURS)
    with atomic_file(folder / "anatomy.html") as file:
        file.write(text.encode())
    return folder / "anatomy.html"


def _picture(row: Json, top: float) -> dict[str, Any]:
    phases = [("forward", 0), ("backward", row["backward"]), ("update", row["update"])] if row["backward"] else [("forward", 0)]
    return stacked_areas(row["bytes"], row["drawn_positions"], row["positions"], top, phases)
