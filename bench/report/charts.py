"""The two kinds of chart: stacked bars, one a row, and lines over two logarithmic axes; each for a page and for a phone."""

import dataclasses
from collections.abc import Callable, Sequence

from bench.report.svg import (
    Scale,
    apart,
    decade_ticks,
    drawing,
    element,
    even_ticks,
    line,
    linear,
    logarithmic,
    path,
    shortened,
    text,
    titled,
)
from engine.format import percent

Point = tuple[float, float]

_PAGE, _PHONE = 1000.0, 360.0  # widths, in units that a page shows as pixels
_LETTER = 6.7  # an average letter's width at 13 units


@dataclasses.dataclass(frozen=True)
class Bar:
    """One row of stacked bars: (colour, what, size) from left to right, two figures at its end, perhaps a mark on its scale."""

    name: str
    group: str
    parts: tuple[tuple[str, str, float], ...]
    figures: tuple[str, str]
    mark: float | None = None

    @property
    def length(self) -> float:
        """The sum of the parts."""
        return sum(size for _, _, size in self.parts)


@dataclasses.dataclass(frozen=True)
class Line:
    """One line, (x, y) in data units, and the two lines of words beside it; `dots` are measurements with their spreads,
    whose figures stand above them or `below`."""

    points: tuple[Point, ...]
    style: str
    name: str
    note: str = ""
    dots: bool = False
    spreads: tuple[float, ...] = ()
    below: bool = False


@dataclasses.dataclass(frozen=True)
class Axis:
    """What a logarithmic axis shows, from where to where, and how its values are said; ticks are decades unless given."""

    name: str
    low: float
    high: float
    say: Callable[[float], str]
    ticks: tuple[float, ...] = ()


def stacked_bars(
    name: str,
    described: tuple[str, str],
    bars: Sequence[Bar],
    key: Sequence[tuple[str, str]],
    tick: Callable[[float], str],
    *,
    wide: bool,
) -> str:
    """Bars from one zero, apart where the group changes; names stand left of them on a page, above them on a phone.

    `described` is the title and the description for a screen reader, `key` the (colour, name) pairs.
    """
    width = _PAGE if wide else _PHONE
    left = min(280.0, 16 + _LETTER * max(len(bar.name) for bar in bars)) if wide else 1.0
    right = width - 165 if wide else width - 1
    step, thick, drop = (27.0, 17.0, 4.0) if wide else (41.0, 13.0, 20.0)
    top = max(max(bar.length, bar.mark or 0) for bar in bars)
    scale = linear(0, top, left, right)
    legend, at = _legend(key, left, width)
    begin = at = at + 22
    rows = []
    for index, bar in enumerate(bars):
        at += 9 if index and bar.group != bars[index - 1].group else 0
        rows.append(element("g", _stack(bar, scale, at + drop, thick) + _words(bar, left, right, at, wide)))
        at += step
    marks = []
    for value in even_ticks(top, 6 if wide else 4):
        anchor = "middle" if wide or 0 < value < top * 0.93 else "end" if value else "start"
        if value:
            marks.append(line(scale(value), begin - 3, scale(value), at, "grid"))
        marks.append(text(scale(value), begin - 9, tick(value), class_="tick", text_anchor=anchor))
    zero = [line(left, begin - 3, left, at, "axis")] if wide else []  # it would run through a phone's names
    return drawing(name, width, at + 4, *described, [legend, *marks, *rows, *zero], wide=wide)


def _stack(bar: Bar, scale: Scale, top: float, thick: float) -> str:
    pieces, x = [], 0.0
    for colour, what, size in bar.parts:
        if size > 0:
            told = titled(f"{what}: {percent(size / bar.length)} of {bar.figures[0]}")
            wide = max(0.6, scale(x + size) - scale(x))
            pieces.append(element("rect", told, x=scale(x), y=top, width=wide, height=thick, class_=colour))
        x += size
    if bar.mark:
        pieces.append(line(scale(bar.mark), top - 3, scale(bar.mark), top + thick + 3, "mark"))
    return "".join(pieces)


def _words(bar: Bar, left: float, right: float, at: float, wide: bool) -> str:
    first, second = bar.figures
    if wide:
        return (
            text(left - 10, at + 17, shortened(bar.name, left - 12), class_="name", text_anchor="end")
            + text(right + 70, at + 17, first, class_="figure", text_anchor="end")
            + text(right + 84, at + 17, second, class_="muted")
        )
    ends = element("tspan", first, class_="figure") + (f"\u2002{second}" if second else "")
    room = right - _LETTER * (len(first) + len(second) + 3)
    return text(0, at + 14, shortened(bar.name, room), class_="name") + element(
        "text", ends, x=right, y=at + 14, class_="muted", text_anchor="end"
    )


def _legend(key: Sequence[tuple[str, str]], left: float, width: float) -> tuple[str, float]:
    """The colours and their names, in as many lines as they need, and where the next thing may start."""
    x, y, pieces = left, 10.0, []
    for colour, name in key:
        needs = 18 + _LETTER * len(name)
        if x > left and x + needs > width:
            x, y = left, y + 20
        if colour == "mark":
            pieces.append(line(x + 6, y - 7, x + 6, y + 7, "mark"))
        else:
            pieces.append(element("rect", x=x, y=y - 6, width=12, height=12, class_=colour))
        pieces.append(text(x + 18, y + 4.5, name, class_="name"))
        x += needs + 18
    return element("g", "".join(pieces)), y + 12


def curves(
    name: str,
    described: tuple[str, str],
    lines: Sequence[Line],
    across: Axis,
    up: Axis,
    *,
    wide: bool,
    shade: Sequence[Point] = (),
    shade_says: str = "",
    rings: Sequence[Point] = (),
) -> str:
    """Lines over two logarithmic axes: named at their right ends on a page, in a key above the plot on a phone.

    The region below `shade` is filled and says `shade_says`; `rings` are points to look at.
    """
    width = _PAGE if wide else _PHONE
    room = min(290.0, _LETTER * max(max(len(each.name), len(each.note)) for each in lines))
    heading = [] if wide else _key_of_lines(lines, width)
    top = 28.0 if wide else 26.0 + sum(36 if each.note else 20 for each in lines) + 16
    left, right = (72.0, width - room - 34) if wide else (58.0, width - 4)
    bottom = top + (380 if wide else 300)
    x, y = logarithmic(across.low, across.high, left, right), logarithmic(up.low, up.high, bottom, top)
    at = lambda point: (x(point[0]), y(point[1]))

    marks = [*heading, text(0, top - 14, up.name, class_="axis-name")]
    for value in up.ticks or decade_ticks(up.low, up.high, 8):
        marks.append(line(left, y(value), right, y(value), "grid"))
        marks.append(text(left - 8, y(value) + 4.5, up.say(value), class_="tick", text_anchor="end"))
    if shade:
        marks.append(path([*map(at, shade), (right, bottom), (left, bottom)], "shade", closed=True))
        marks.append(text(left + 12, bottom - 11, shade_says, class_="shade-name"))
    for value in across.ticks or decade_ticks(across.low, across.high, 9 if wide else 4):
        marks.append(line(x(value), bottom, x(value), bottom + 5, "axis"))
        anchor = "end" if not wide and x(value) > right - 12 else "middle"
        marks.append(text(x(value), bottom + 20, across.say(value), class_="tick", text_anchor=anchor))
    marks.append(line(left, bottom, right, bottom, "axis"))
    marks.append(text(right, bottom + 42, across.name, class_="axis-name", text_anchor="end"))
    marks += [path([*map(at, each.points)], f"line {each.style}") for each in lines]
    marks += [_dots(each, x, y, up.say) for each in lines if each.dots]
    marks += [element("circle", cx=x(a), cy=y(b), r=5, class_="ring") for a, b in rings]
    if wide:
        marks += _names_beside(lines, at, right, top, bottom, room)
    return drawing(name, width, bottom + 50, *described, marks, wide=wide)


def _dots(each: Line, x: Scale, y: Scale, say: Callable[[float], str]) -> str:
    pieces = []
    for (a, b), spread in zip(each.points, each.spreads or (0.0,) * len(each.points)):
        if 0 < spread < 2 * b:
            pieces.append(line(x(a), y(b - spread / 2), x(a), y(b + spread / 2), f"whisker {each.style}"))
        pieces.append(element("circle", cx=x(a), cy=y(b), r=4.5, class_=f"dot {each.style}"))
        pieces.append(text(x(a) + 7, y(b) + (18 if each.below else -9), say(b), class_="figure"))
    return "".join(pieces)


def _names_beside(
    lines: Sequence[Line], at: Callable[[Point], Point], right: float, top: float, bottom: float, room: float
) -> list[str]:
    """Each line's words right of its end, as near to it as the others allow, with a thin line that leads there."""
    marks = []
    ends = [at(each.points[-1]) for each in lines]
    gap = 38.0 if any(each.note for each in lines) else 20.0
    for each, end, placed in zip(lines, ends, apart([y for _, y in ends], gap, top + 4, bottom - 16)):
        marks.append(
            path(
                [(end[0] + (7 if each.dots else 1), end[1]), (right + 8, end[1]), (right + 18, placed), (right + 24, placed)],
                "leader",
            )
        )
        marks.append(text(right + 30, placed + 4.5, shortened(each.name, room), class_="name"))
        if each.note:
            marks.append(text(right + 30, placed + 20, shortened(each.note, room), class_="muted"))
    return marks


def _key_of_lines(lines: Sequence[Line], width: float) -> list[str]:
    marks, at = [], 10.0
    for each in lines:
        marks.append(path([(0, at), (26, at)], f"line {each.style}"))
        if each.dots:
            marks.append(element("circle", cx=13, cy=at, r=4.5, class_=f"dot {each.style}"))
        marks.append(text(36, at + 4.5, shortened(each.name, width - 36), class_="name"))
        at += 20
        if each.note:
            marks.append(text(36, at + 0.5, shortened(each.note, width - 36, 6.2), class_="muted"))
            at += 16
    return marks
