"""Lays out the pictures of a model's anatomy, in units of a phone's pixels, and writes them as one self-contained page."""

import cmath
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.cli import Json
from bench.report.charts import decade_ticks, even_ticks, linear, logarithmic, svg_path
from bench.report.templates import environment
from engine.files import atomic_file
from engine.format import si

WIDTH, HEIGHT = 360.0, 230.0
COLOURS = {
    "parameters": "green", "optimizer state": "grey", "KV cache": "teal", "gradients": "rust", "residuals": "pink",
    "temporaries": "violet",
}  # fmt: skip
HERE = Path(__file__).parent


def stacked_areas(
    stacks: dict[str, Sequence[int]], positions: Sequence[int], count: int, top: float, phases: Sequence[tuple[str, int]]
) -> dict[str, Any]:
    """Returns the layout of `stacks`, bytes at each of `positions` out of `count`, on an axis up to `top` bytes.

    `phases`: (name, first position) in order. An area is stepped: what is alive at a position is so until the next one.
    """
    left, right, upper, lower = 46.0, WIDTH - 2, 26.0, HEIGHT - 22
    x, y = linear(0, count, left, right), linear(0, top, lower, upper)
    ends = [*positions[1:], count]
    starts = [0, *positions[1:]]
    below, areas = [0] * len(positions), []
    for kind, values in stacks.items():
        above = [low + size for low, size in zip(below, values)]
        if any(values):
            steps = lambda heights: [
                (x(place), y(height)) for start, end, height in zip(starts, ends, heights) for place in (start, end)
            ]
            areas.append({"kind": kind, "colour": COLOURS[kind], "path": svg_path(steps(above) + steps(below)[::-1]) + "Z"})
        below = above
    top_place = below.index(max(below))
    bounds = [*(start for _, start in phases), count]
    return {
        "width": WIDTH, "height": HEIGHT, "left": left, "right": right, "upper": upper, "lower": lower, "areas": areas,
        "peak": ((x(starts[top_place]) + x(ends[top_place])) / 2, y(below[top_place])),
        "levels": [(y(value), si(value, "B", short=True)) for value in even_ticks(top, 4)],
        "phases": [
            (name, x(start), (x(start) + x(end)) / 2, x(end) - x(start) > 7.5 * len(name))
            for (name, start), end in zip(phases, bounds[1:])
        ],
    }  # fmt: skip


def roofline(peak: float, bandwidth: float, points: Sequence[dict[str, Any]], width: float) -> dict[str, Any]:
    """Returns the layout of points (name, flops, bytes, seconds, whether it runs backward) under the two lines of a machine.

    `peak` in FLOP/s, `bandwidth` in bytes/s. Points are numbered from left to right, each number beside its dot.
    """
    placed = [
        {"name": point["name"], "intensity": point["flops"] / point["bytes"], "rate": point["flops"] / point["seconds"],
         "colour": "ink" if point["backward"] else "blue"}
        for point in points
    ]  # fmt: skip
    placed.sort(key=lambda point: point["intensity"])
    corner = peak / bandwidth
    low, high = min(placed[0]["intensity"], corner) / 3, max(placed[-1]["intensity"], corner) * 3
    rates = [point["rate"] for point in placed]
    bottom_rate, top_rate = min(bandwidth * low, *rates) / 4, max(peak, *rates) * 2
    left, right, top, bottom = 58.0, width - 8, 26.0, 0.66 * width if width < 400 else 330.0
    x, y = logarithmic(low, high, left, right), logarithmic(bottom_rate, top_rate, bottom, top)
    dots = [complex(x(point["intensity"]), y(point["rate"])) for point in placed]
    inside = lambda place: left + 8 < place.real < right - 8 and top + 8 < place.imag < bottom - 8
    for point, dot, number in zip(placed, dots, _beside(dots, inside)):
        point |= {"x": dot.real, "y": dot.imag, "at": (number.real, number.imag)}
        point["share"] = point["rate"] / min(peak, point["intensity"] * bandwidth)
        point["drop"] = svg_path([(point["x"], point["y"]), point["at"]]) if abs(number - dot) > 14 else ""
    start = max(low, bottom_rate / bandwidth)
    foot, knee = (x(start), y(start * bandwidth)), (x(corner), y(peak))
    return {
        "width": width, "height": bottom + 42, "left": left, "right": right, "top": top, "bottom": bottom, "points": placed,
        "start": foot, "corner": knee, "roof": svg_path([foot, knee, (right, y(peak))]),
        "levels": [(y(value), si(value, "", short=True)) for value in decade_ticks(bottom_rate, top_rate, 8)],
        "ticks": [(x(value), f"{value:g}") for value in decade_ticks(low, high, 6)],
    }  # fmt: skip


def _beside(dots: Sequence[complex], inside: Callable[[complex], bool]) -> list[complex]:
    """Returns a place for each dot's number: the nearest inside that covers no dot and no number before it, and
    is no more than 4 nearer to another dot."""
    numbers: list[complex] = []
    for dot in dots:
        tried = (dot + cmath.rect(radius, turn * cmath.pi / 8) for radius in range(13, 400, 6) for turn in range(16))
        occupied = [(other, 12) for other in dots] + [(other, 16) for other in numbers]
        free = [
            place
            for place in filter(inside, tried)
            if all(abs((place - at).real) >= wide or abs((place - at).imag) >= 12 for at, wide in occupied)
        ]
        own = [place for place in free if abs(place - dot) < 4 + min(abs(place - other) for other in dots)]
        numbers.append((own or free or [dot])[0])
    return numbers


def write_page(folder: Path, document: Json) -> Path:
    """Writes `folder`/anatomy.html and returns its path."""
    text = environment(HERE).get_template("page.html.j2").render(document, pictures=layouts(document))
    with atomic_file(folder / "anatomy.html") as file:
        file.write(text.encode())
    return folder / "anatomy.html"


def layouts(document: Json) -> dict[str, Any]:
    """Returns what the macros of pictures.html.j2 draw, from the document of `measure.anatomy`."""
    roof = document["roofline"]
    return {
        "rows": document["rows"], "memory": _areas(document["rows"]), "by_hand": _areas(document["by_hand"]),
        "by_hand_rows": document["by_hand"],
        "colours": COLOURS, "config": document["config"],
        "residuals": document["residuals"], "operations": document["operations"],
        "roof": roof, "roofline": [roofline(roof["flops"], roof["bytes"], roof["points"], width) for width in (560.0, 360.0)],
    }  # fmt: skip


def _areas(rows: Sequence[Json]) -> list[tuple[Json, dict[str, Any]]]:
    """Returns (row, layout of its picture), all to one scale."""
    top, pictures = max(row["peak_bytes"] for row in rows) * 1.02, []
    for row in rows:
        starts = {"forward": 0, "backward": row["backward"], "update": row["update"]}
        phases = [(name, start) for name, start in starts.items() if start is not None]
        pictures.append((row, stacked_areas(row["bytes"], row["drawn_positions"], row["positions"], top, phases)))
    return pictures
