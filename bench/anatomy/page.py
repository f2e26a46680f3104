"""Writes the anatomy of a model's steps as one self-contained page, for any screen, light or dark."""

from pathlib import Path
from typing import Any

import jinja2

from bench.anatomy.drawing import COLOURS, stacked_areas
from bench.cli import Json
from bench.report.charts import svg_number
from engine.files import atomic_file
from engine.format import si


def write_page(folder: Path, document: Json) -> Path:
    """Writes `folder`/anatomy.html and returns its path."""
    here = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([here, here.parent / "report"]), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        finalize=svg_number,
    )  # fmt: skip
    environment.filters |= {"si": si}
    pictures = {part: _pictures(document[part]) for part in ("rows", "by_hand")}
    text = environment.get_template("page.html.j2").render(document, pictures=pictures, colours=COLOURS)
    with atomic_file(folder / "anatomy.html") as file:
        file.write(text.encode())
    return folder / "anatomy.html"


def _pictures(rows: list[Json]) -> list[tuple[Json, dict[str, Any]]]:
    """Returns (row, layout of its picture), all to one scale."""
    top, pictures = max(row["peak_bytes"] for row in rows) * 1.02, []
    for row in rows:
        starts = {"forward": 0, "backward": row["backward"], "update": row["update"]}
        phases = [(name, start) for name, start in starts.items() if start is not None]
        pictures.append((row, stacked_areas(row["bytes"], row["drawn_positions"], row["positions"], top, phases)))
    return pictures
