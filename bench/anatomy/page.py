"""Writes the anatomy of a model's steps as one self-contained page, for any screen, light or dark."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.anatomy.drawing import COLOURS, heat_map, roofline, stacked_areas
from bench.cli import Json
from bench.report.templates import environment
from engine.files import atomic_file

HERE = Path(__file__).parent


def write_page(folder: Path, document: Json) -> Path:
    """Writes `folder`/anatomy.html and returns its path."""
    text = environment(HERE).get_template("page.html.j2").render(document, pictures=layouts(document))
    with atomic_file(folder / "anatomy.html") as file:
        file.write(text.encode())
    return folder / "anatomy.html"


def layouts(document: Json) -> dict[str, Any]:
    """Returns what the macros of pictures.html.j2 draw, from the document of `measure.anatomy`."""
    roof, moved = document["roofline"], document["moved"]
    changes = [change for stage in moved for change in stage["changes"].values() if change]
    scale = min(changes), max(changes)
    return {
        "rows": document["rows"], "memory": _areas(document["rows"]), "by_hand": _areas(document["by_hand"]),
        "colours": COLOURS,
        "residuals": document["residuals"], "operations": document["operations"], "tied": document["config"]["tied"],
        "roof": roof, "roofline": [roofline(roof["flops"], roof["bytes"], roof["points"], width) for width in (560.0, 360.0)],
        "moved": [stage | heat_map(stage["changes"], scale) for stage in moved], "scale": scale,
    }  # fmt: skip


def _areas(rows: Sequence[Json]) -> list[tuple[Json, dict[str, Any]]]:
    """Returns (row, layout of its picture), all to one scale."""
    top, pictures = max(row["peak_bytes"] for row in rows) * 1.02, []
    for row in rows:
        starts = {"forward": 0, "backward": row["backward"], "update": row["update"]}
        phases = [(name, start) for name, start in starts.items() if start is not None]
        pictures.append((row, stacked_areas(row["bytes"], row["drawn_positions"], row["positions"], top, phases)))
    return pictures
