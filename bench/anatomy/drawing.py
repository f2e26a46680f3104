"""Lays out the pictures of a model's anatomy, in units of a phone's pixels."""

from collections.abc import Sequence
from typing import Any

from bench.report.charts import decade_ticks, even_ticks, linear, logarithmic, separate, svg_path
from engine.format import si

WIDTH, HEIGHT = 360.0, 230.0
COLOURS = {
    "parameters": "green", "optimizer state": "grey", "KV cache": "teal", "gradients": "rust", "residuals": "pink",
    "temporaries": "violet",
}  # fmt: skip


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

    `peak` in FLOP/s, `bandwidth` in bytes/s. Points are numbered from left to right, the numbers at the foot.
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
    numbers = separate([x(point["intensity"]) for point in placed], 16, left + 10, right - 10)
    for point, number in zip(placed, numbers):
        point |= {"x": x(point["intensity"]), "y": y(point["rate"]), "at": number}
        point["share"] = point["rate"] / min(peak, point["intensity"] * bandwidth)
        point["drop"] = svg_path([(point["x"], point["y"] + 5), (number, bottom - 20)])
    start = max(low, bottom_rate / bandwidth)
    foot, knee = (x(start), y(start * bandwidth)), (x(corner), y(peak))
    return {
        "width": width, "height": bottom + 42, "left": left, "right": right, "top": top, "bottom": bottom, "points": placed,
        "start": foot, "corner": knee, "roof": svg_path([foot, knee, (right, y(peak))]),
        "levels": [(y(value), si(value, "", short=True)) for value in decade_ticks(bottom_rate, top_rate, 8)],
        "ticks": [(x(value), f"{value:g}") for value in decade_ticks(low, high, 6)],
    }  # fmt: skip
