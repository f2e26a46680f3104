"""Lays out the two kinds of chart, stacked bars and lines over two logarithmic axes, for a page or a phone.

Units are a page's pixels; `charts.svg.j2` draws the layouts.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

Point = tuple[float, float]

PAGE, PHONE = 1000.0, 360.0  # widths
LETTER = 6.7  # an average letter's width at 13 units


@dataclasses.dataclass(frozen=True)
class Bar:
    """One stacked bar: (colour, name, size) from left to right, two `labels` at its end.

    A gap, without a heading, divides bars of different `group`.
    """

    name: str
    group: str | None
    parts: tuple[tuple[str, str, float], ...]
    labels: tuple[str, str]

    @property
    def length(self) -> float:
        """The sum of the sizes."""
        return sum(size for _, _, size in self.parts)


@dataclasses.dataclass(frozen=True)
class Line:
    """A curve of (x, y) in data units. Points with `spreads` are dots with their values written above, or `below`, them.

    `name` and `note` stand beside it.
    """

    points: tuple[Point, ...]
    style: str
    name: str
    note: str = ""
    spreads: tuple[float, ...] = ()
    below: bool = False


@dataclasses.dataclass(frozen=True)
class Axis:
    """A logarithmic axis: name, ends, how to write values, and ticks, by default decades."""

    name: str
    low: float
    high: float
    write: Callable[[float], str]
    ticks: tuple[float, ...] = ()


def stacked_bars(
    bars: Sequence[Bar], key: Sequence[tuple[str, str]], tick: Callable[[float], str], wide: bool
) -> dict[str, Any]:
    """Lays out bars from one zero, with a gap between groups; `key` holds the (colour, name) pairs of the legend.

    Names are left of the bars on a page, above them on a phone.
    """
    width = PAGE if wide else PHONE
    left = min(280.0, 16 + LETTER * max(len(bar.name) for bar in bars)) if wide else 1.0
    right = width - (165 if wide else 1)
    step, thick, drop = (27.0, 17.0, 4.0) if wide else (41.0, 13.0, 20.0)
    top = max(bar.length for bar in bars)
    x = linear(0, top, left, right)
    legend = _legend(key, left, width)
    begin = at = legend[-1]["y"] + 34
    rows = []
    for index, bar in enumerate(bars):
        at += 9 if index and bar.group != bars[index - 1].group else 0
        starts = itertools.accumulate((size for _, _, size in bar.parts), initial=0.0)
        room = left - 12 if wide else right - LETTER * (sum(map(len, bar.labels)) + 3)
        rows.append({
            "bar": bar, "y": at, "top": at + drop, "name": truncate(bar.name, room),
            "parts": [
                (colour, name, size / bar.length, x(start), max(0.6, x(start + size) - x(start)))
                for start, (colour, name, size) in zip(starts, bar.parts) if size > 0
            ],
        })  # fmt: skip
        at += step
    anchor = lambda value: "middle" if wide or 0 < value < top * 0.93 else "end" if value else "start"
    ticks = [(value, x(value), tick(value), anchor(value)) for value in even_ticks(top, 6 if wide else 4)]
    return {
        "wide": wide, "width": width, "height": at + 4, "left": left, "right": right, "top": begin,
        "bottom": at, "thick": thick, "legend": legend, "rows": rows, "ticks": ticks,
    }  # fmt: skip


def _legend(key: Sequence[tuple[str, str]], left: float, width: float) -> list[dict[str, Any]]:
    x, y, places = left, 10.0, []
    for colour, name in key:
        needs = 18 + LETTER * len(name)
        if x > left and x + needs > width:
            x, y = left, y + 20
        places.append({"colour": colour, "name": name, "x": x, "y": y})
        x += needs + 18
    return places


def curves(
    lines: Sequence[Line], x_axis: Axis, y_axis: Axis, wide: bool,
    *, shade: Sequence[Point] = (), shade_name: str = "", rings: Sequence[Point] = (),
) -> dict[str, Any]:  # fmt: skip
    """Lays out lines over two logarithmic axes, named at their right ends on a page, in a key above the plot on a phone.

    The region below `shade` is filled and named; `rings` are marked points.
    """
    width = PAGE if wide else PHONE
    room = min(290.0, LETTER * max(max(len(line.name), len(line.note)) for line in lines))
    rises = [36 if line.note else 20 for line in lines]
    top = 28.0 if wide else 42.0 + sum(rises)
    levels = [(value, y_axis.write(value)) for value in y_axis.ticks or decade_ticks(y_axis.low, y_axis.high, 8)]
    left = max(72.0 if wide else 58.0, 12 + LETTER * max((len(text) for _, text in levels), default=0))
    right = width - (room + 34 if wide else 4)
    bottom = top + (380 if wide else 300)
    x, y = logarithmic(x_axis.low, x_axis.high, left, right), logarithmic(y_axis.low, y_axis.high, bottom, top)
    place = lambda points: [(x(a), y(b)) for a, b in points]
    ends = place([line.points[-1] for line in lines])
    if wide:  # labels right of each line's end, with a thin line that leads there
        heights = separate([y for _, y in ends], 38.0 if 36 in rises else 20.0, top + 4, bottom - 16)
        leaders = [
            [(x + (7 if line.spreads else 1), y), (right + 8, y), (right + 18, at), (right + 24, at)]
            for line, (x, y), at in zip(lines, ends, heights)
        ]
    else:
        heights = list(itertools.accumulate(rises[:-1], initial=10.0))
        leaders = [[(0.0, at), (26.0, at)] for at in heights]
    name_room, note_room = (room, room) if wide else (width - 36, (width - 36) * LETTER / 6.2)
    anchor = lambda at: "end" if not wide and at > right - 12 else "middle"
    return {
        "wide": wide, "width": width, "height": bottom + 50, "left": left, "right": right, "top": top,
        "bottom": bottom, "x_name": x_axis.name, "y_name": y_axis.name, "rings": place(rings), "lines": [
            {
                "line": line, "path": svg_path(place(line.points)), "at": at, "leader": svg_path(leader),
                "name": truncate(line.name, name_room), "note": truncate(line.note, note_room), "dots": [
                    {"x": x(a), "y": y(b), "text": y_axis.write(b),
                     "whisker": (y(b - spread / 2), y(b + spread / 2)) if 0 < spread < 2 * b else None}
                    for (a, b), spread in zip(line.points, line.spreads)
                ],
            }
            for line, at, leader in zip(lines, heights, leaders)
        ],
        "levels": [(y(value), text) for value, text in levels],
        "ticks": [
            (x(value), x_axis.write(value), anchor(x(value)))
            for value in x_axis.ticks or decade_ticks(x_axis.low, x_axis.high, 9 if wide else 4)
        ],
        "shade": shade and svg_path([*place(shade), (right, bottom), (left, bottom)]) + "Z", "shade_name": shade_name,
    }  # fmt: skip


def svg_path(points: Sequence[Point]) -> str:
    """Returns a line through the points as an SVG path's `d`."""
    return "M" + "L".join(f"{svg_number(x)} {svg_number(y)}" for x, y in points)


def svg_number(value: Any) -> Any:
    """Writes a float with at most two decimals; returns anything else as it is."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


def linear(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Returns the map of low..high onto start..end."""
    return lambda value: start + (value - low) / ((high - low) or 1) * (end - start)


def logarithmic(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Returns `linear` of logarithms."""
    inner = linear(math.log10(low), math.log10(high), start, end)
    return lambda value: inner(math.log10(value))


def even_ticks(high: float, most: int) -> list[float]:
    """Returns 0 and at most `most` multiples, up to `high`, of 1, 2, 2.5 or 5 times a power of ten."""
    if high <= 0:
        return [0.0]
    power = 10.0 ** math.floor(math.log10(high / most))
    step = next(nice * power for nice in (1, 2, 2.5, 5, 10, 20) if nice * power * most >= high * (1 - 1e-9))
    return [step * index for index in range(math.floor(high / step * (1 + 1e-9)) + 1)]


def decade_ticks(low: float, high: float, most: int) -> list[float]:
    """Returns at most `most` powers of ten in low..high, evenly spaced; where they are few, 1, 2 and 5 times them."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    if last - first >= 2:
        return [10.0**power for power in range(first, last + 1, max(1, math.ceil((last - first + 1) / most)))]
    every = [nice * 10.0**power for power in range(first - 1, last + 1) for nice in (1, 2, 5)]
    return [tick for tick in every if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]


def separate(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Moves positions `gap` apart and into low..high, as far as they fit; their order stays."""
    places, order = list(wanted), sorted(range(len(wanted)), key=wanted.__getitem__)
    for index in order:
        places[index] = low = max(places[index], low)
        low += gap
    for index in reversed(order):
        places[index] = high = min(places[index], high)
        high -= gap
    return places


def truncate(text: str, room: float) -> str:
    """Ends a text with an ellipsis where it is wider than `room`, at LETTER a character."""
    fits = max(1, int(room / LETTER))
    return text if len(text) <= fits else text[: fits - 1].rstrip(" ,") + "…"
