"""Lays out the pictures of a model's anatomy, in units of a phone's pixels."""

import math
from collections.abc import Sequence
from typing import Any

from bench.report.charts import decade_ticks, even_ticks, linear, logarithmic, separate, svg_path
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


def roofline(peak: float, bandwidth: float, points: Sequence[dict[str, Any]], width: float) -> dict[str, Any]:
    """Returns the layout of points (name, flops, bytes, seconds, whether it runs backward) under the two lines of a machine.

    `peak` in FLOP/s, `bandwidth` in bytes/s. Points are numbered from left to right, the numbers at the foot.
    """
    placed = [
        {"name": point["name"], "intensity": point["flops"] / point["bytes"], "rate": point["flops"] / point["seconds"],
         "colour": "rust" if point["backward"] else "blue"}
        for point in points
    ]  # fmt: skip
    placed.sort(key=lambda point: point["intensity"])
    corner = peak / bandwidth
    low, high = min(placed[0]["intensity"], corner) / 3, max(placed[-1]["intensity"], corner) * 3
    bottom_rate, top_rate = min(bandwidth * low, *(point["rate"] for point in placed)) / 4, peak * 2
    left, right, top, bottom = 58.0, width - 8, 26.0, 0.66 * width if width < 400 else 330.0
    x, y = logarithmic(low, high, left, right), logarithmic(bottom_rate, top_rate, bottom, top)
    numbers = separate([x(point["intensity"]) for point in placed], 16, left + 10, right - 10)
    for point, number in zip(placed, numbers):
        point |= {"x": x(point["intensity"]), "y": y(point["rate"]), "at": number}
        point["share"] = point["rate"] / min(peak, point["intensity"] * bandwidth)
        point["drop"] = svg_path([(point["x"], point["y"] + 5), (number, bottom - 20)])
    start = max(low, bottom_rate / bandwidth)
    return {
        "width": width, "height": bottom + 42, "left": left, "right": right, "top": top, "bottom": bottom, "points": placed,
        "corner": (x(corner), y(peak)),
        "roof": svg_path([(x(start), y(start * bandwidth)), (x(corner), y(peak)), (right, y(peak))]),
        "levels": [(y(value), si(value, "", short=True)) for value in decade_ticks(bottom_rate, top_rate, 8)],
        "ticks": [(x(value), f"{value:g}") for value in decade_ticks(low, high, 6)],
    }  # fmt: skip


def heat_map(changes: dict[str, float], scale: tuple[float, float]) -> dict[str, Any]:
    """Returns the layout of the relative change of each weight: blocks from left to right, their weights from top to bottom.

    What is in no block stands as a column of its own. `scale`: the smallest and the largest change that is not 0.
    """
    kinds = list(dict.fromkeys(path.split("/")[2] for path in changes if path.startswith("blocks/")))
    blocks = 1 + max(int(path.split("/")[1]) for path in changes if path.startswith("blocks/"))
    before = ["embed"]
    after = [path for path in changes if path in ("norm", "head")]
    left, gap, tall, top = 72.0, 8.0, 18.0, 2.0
    own = 26.0  # width of a column of its own
    right = WIDTH - len(after) * (own + gap)
    first = left + len(before) * (own + gap)
    wide = (right - first) / blocks
    shade = linear(math.log(scale[0]), math.log(scale[1]), 0.3, 1.0)
    bottom, cells = top + tall * len(kinds), []
    for path, change in changes.items():
        at = {"path": path, "change": change, "shade": shade(math.log(change)) if change else 0.0}
        if path.startswith("blocks/"):
            _, block, kind = path.split("/")
            space = 2 if wide > 6 else 1
            cells.append(at | {
                "x": first + int(block) * wide, "y": top + kinds.index(kind) * tall, "width": wide - space, "height": tall - 3,
            })  # fmt: skip
        else:
            x = left if path in before else right + gap + after.index(path) * (own + gap)
            cells.append(at | {"x": x, "y": top, "width": own, "height": bottom - top - 3})
    last = f"blocks 0 to {blocks - 1}" if blocks > 1 else "block 0"
    return {
        "cells": cells, "height": bottom + 20, "names": [(top + tall * n + 12, kind) for n, kind in enumerate(kinds)],
        "feet": [
            (left + own / 2, "embed"), ((first + right) / 2, last),
            *((right + gap + n * (own + gap) + own / 2, path) for n, path in enumerate(after)),
        ],
    }  # fmt: skip
