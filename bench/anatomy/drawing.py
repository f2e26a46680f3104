"""Lays out one picture: stacked areas over the positions of a program, in units of a phone's pixels."""

from collections.abc import Sequence
from typing import Any

from bench.report.charts import even_ticks, linear, svg_path
from engine.format import si

WIDTH, HEIGHT = 360.0, 230.0
COLOURS = {
    "parameters": "blue", "optimizer state": "grey", "KV cache": "teal", "gradients": "rust", "residuals": "amber",
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
    bounds = [*(start for _, start in phases), count]
    return {
        "width": WIDTH, "height": HEIGHT, "left": left, "right": right, "upper": upper, "lower": lower, "areas": areas,
        "levels": [(y(value), si(value, "B", short=True)) for value in even_ticks(top, 4)],
        "phases": [
            (name, x(start), (x(start) + x(end)) / 2, x(end) - x(start) > 7.5 * len(name))
            for (name, start), end in zip(phases, bounds[1:])
        ],
    }  # fmt: skip
