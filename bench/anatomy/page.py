"""Writes the anatomy of a model's steps as one self-contained page, for any screen, light or dark."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.anatomy.drawing import COLOURS, roofline, stacked_areas
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
    low, high = math.log(min(changes)), math.log(max(changes))
    shades = {change: 0.3 + 0.7 * (math.log(change) - low) / ((high - low) or 1) for change in changes}
    return {
        "rows": document["rows"], "memory": _areas(document["rows"]), "by_hand": _areas(document["by_hand"]),
        "by_hand_rows": document["by_hand"],
        "colours": COLOURS, "config": document["config"],
        "residuals": document["residuals"], "operations": document["operations"],
        "roof": roof, "roofline": [roofline(roof["flops"], roof["bytes"], roof["points"], width) for width in (560.0, 360.0)],
        "moved": moved, "shades": shades,
    }  # fmt: skip


def _areas(rows: Sequence[Json]) -> list[tuple[Json, dict[str, Any]]]:
    """Returns (row, layout of its picture), all to one scale."""
    top, pictures = max(row["peak_bytes"] for row in rows) * 1.02, []
    for row in rows:
        starts = {"forward": 0, "backward": row["backward"], "update": row["update"]}
        phases = [(name, start) for name, start in starts.items() if start is not None]
        pictures.append((row, stacked_areas(row["bytes"], row["drawn_positions"], row["positions"], top, phases)))
    return pictures
