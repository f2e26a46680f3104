"""A few words of SVG: elements, scales, ticks, and labels that keep out of each other's way.

Colours and type sizes are classes that `page.css` defines, so one drawing serves light and dark. Text is text: it is
read aloud, selected and searched.
"""

import html
import math
from collections.abc import Callable, Sequence
from typing import Any

Scale = Callable[[float], float]


def element(tag: str, content: str = "", /, **attributes: Any) -> str:
    """One element; a trailing underscore is dropped from an attribute's name, others become dashes; `content` is markup."""
    said = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(_plain(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    return f"<{tag}{said}>{content}</{tag}>" if content else f"<{tag}{said}/>"


def text(x: float, y: float, said: str, **attributes: Any) -> str:
    """A line of text with its baseline at (x, y); what is said is escaped."""
    return element("text", html.escape(said, quote=False), x=x, y=y, **attributes)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> str:
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def path(points: Sequence[tuple[float, float]], class_: str, *, closed: bool = False) -> str:
    """A polyline through the points, or the polygon they enclose."""
    return element(
        "path", d="M" + "L".join(f"{_plain(x)} {_plain(y)}" for x, y in points) + ("Z" if closed else ""), class_=class_
    )


def titled(said: str) -> str:
    """The name of the element it stands in: shown to whoever points at it, read aloud."""
    return element("title", html.escape(said, quote=False))


def drawing(name: str, width: float, height: float, title: str, description: str, marks: Sequence[str], *, wide: bool) -> str:
    """A whole SVG for a page or a phone: what it shows and what it says come first, for a screen reader."""
    kind = "wide" if wide else "narrow"
    name = f"{name}-{kind}"  # unique in a page where `name` is
    head = (
        element("title", html.escape(title, quote=False), id=f"{name}-title"),
        element("desc", html.escape(description, quote=False), id=f"{name}-desc"),
    )
    return element(
        "svg", "\n".join([*head, *marks]),
        xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {_plain(width)} {_plain(height)}", class_=kind, role="img",
        aria_labelledby=f"{name}-title {name}-desc",
    )  # fmt: skip


def linear(low: float, high: float, start: float, end: float) -> Scale:
    """low..high onto start..end; a single point lies at the start."""
    return lambda value: start + (value - low) / ((high - low) or 1) * (end - start)


def logarithmic(low: float, high: float, start: float, end: float) -> Scale:
    """The same for positive values by their logarithms."""
    inner = linear(math.log10(low), math.log10(high), start, end)
    return lambda value: inner(math.log10(value))


def even_ticks(high: float, most: int) -> list[float]:
    """0 and the multiples of 1, 2, 2.5 or 5 times a power of ten up to `high`, at most `most` of them after 0."""
    if high <= 0:
        return [0.0]
    power = 10.0 ** math.floor(math.log10(high / most))
    step = next(nice * power for nice in (1, 2, 2.5, 5, 10, 20) if nice * power * most >= high * (1 - 1e-9))
    return [step * index for index in range(math.floor(high / step * (1 + 1e-9)) + 1)]


def decade_ticks(low: float, high: float, most: int) -> list[float]:
    """Powers of ten within low..high, every k-th when there are more than `most`; 1, 2 and 5 times them when there are few."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    if last - first >= 2:
        return [10.0**power for power in range(first, last + 1, max(1, math.ceil((last - first + 1) / most)))]
    found = [nice * 10.0**power for power in range(first - 1, last + 1) for nice in (1, 2, 5)]
    return [tick for tick in found if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]


def apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Where labels go that want to be at `wanted`: in the same order, `gap` apart, within low..high as long as they fit."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    placed: list[float] = []
    for index in order:
        placed.append(max(wanted[index], placed[-1] + gap if placed else low))
    limit = high
    for rank in reversed(range(len(placed))):
        placed[rank] = min(placed[rank], limit)
        limit = placed[rank] - gap
    found = [0.0] * len(wanted)
    for rank, index in enumerate(order):
        found[index] = placed[rank]
    return found


def shortened(said: str, room: float, each: float = 6.7) -> str:
    """The text, cut with an ellipsis when it is wider than `room` at about `each` units a character."""
    fits = max(1, int(room / each))
    return said if len(said) <= fits else said[: fits - 1].rstrip(" ,") + "…"


def _plain(value: Any) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
