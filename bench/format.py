"""Numbers as a reader meets them: three significant digits, a prefix, a unit; or one prefix for a whole column."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

_PREFIXES = {-12: "p", -9: "n", -6: "µ", -3: "m", 0: "", 3: "k", 6: "M", 9: "G", 12: "T", 15: "P", 18: "E"}
_WORDS = {3: "thousand", 6: "million", 9: "billion", 12: "trillion"}
_SPACE = "\u202f"  # narrow, and never the end of a line
ABSENT = "–"


def number(value: Any) -> float | None:
    """The value as a finite float, or None for what is absent, not a number, or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def positive(value: Any) -> float | None:
    """The value as a finite float above zero, or None: what a bar or a logarithmic axis can show."""
    found = number(value)
    return found if found is not None and found > 0 else None


def si(value: Any, unit: str) -> str:
    """`21.3 MFLOP`, `612 µs`; a dash for what is absent."""
    found = number(value)
    if found is None:
        return ABSENT
    power = _power(found)
    return f"{significant(found / 10.0**power)}{_SPACE}{_PREFIXES[power]}{unit}".rstrip(_SPACE)


def brief(value: float, unit: str) -> str:
    """The same with as few digits as a round value needs, for an axis: `50 µs`, `0`."""
    power = _power(value)
    said = f"{value / 10.0**power:.3g}"
    return f"{said}{_SPACE}{_PREFIXES[power]}{unit}".rstrip(_SPACE) if value else "0"


def spoken(value: Any) -> str:
    """A count in words: `96.2 million`, `1.92 billion`, `640`; a dash for what is absent."""
    found = number(value)
    return ABSENT if found is None else _worded(found, significant)


def spoken_tick(value: float) -> str:
    """The same for a round value on an axis: `10 million`."""
    return _worded(value, lambda size: f"{size:,.3g}")


def _worded(value: float, say: Callable[[float], str]) -> str:
    power = min(_power(value), 12)
    return f"{say(value / 10.0**power)} {_WORDS[power]}" if power > 0 else say(value)


def money(value: Any) -> str:
    """`$0.0417`, `$0.10`, `$12.50`, `$1,240`; a dash for what is absent."""
    found = number(value)
    if found is None:
        return ABSENT
    if 1 <= abs(found) < 100 or (0.01 <= abs(found) < 1 and found == round(found, 2)):
        return f"${found:.2f}"
    return f"${significant(found)}"


def times(value: Any, digits: int = 2) -> str:
    """`3.00×`, or `14.2×` from ten up; a dash for what is absent."""
    found = number(value)
    return ABSENT if found is None else f"{found:,.{digits if abs(found) < 9.95 else max(0, digits - 1)}f}×"


def percent(value: Any, *, signed: bool = False) -> str:
    """A share as `59%`, or a deviation as `+12%` and `−4%`; a dash for what is absent."""
    found = number(value)
    return (
        ABSENT
        if found is None
        else f"{100 * found:{'+' if signed else ''}.0f}%".replace("-", "−").replace("−0%", "0%").replace("+0%", "0%")
    )


def significant(value: float) -> str:
    """Three significant digits without an exponent, thousands apart: `0.0417`, `7.11`, `1,240`."""
    if value == 0:
        return "0"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{decimals}f}"
    return f"{value:,.{max(0, decimals - 1)}f}" if sum(map(str.isdigit, text.lstrip("-0."))) > 3 and decimals else text


@dataclasses.dataclass(frozen=True)
class Column:
    """How the numbers of one column are written: over 10^power, with the same decimals, so that they compare by eye."""

    power: int
    decimals: int

    def unit(self, unit: str) -> str:
        """The unit with the column's prefix, for its heading."""
        return f"{_PREFIXES[self.power]}{unit}"

    def text(self, value: Any) -> str:
        """One cell; a dash for what is absent."""
        found = number(value)
        return ABSENT if found is None else f"{found / 10.0**self.power:,.{self.decimals}f}"


def column(values: Iterable[Any], *, digits: int = 3, prefixed: bool = True) -> Column:
    """The prefix of the middle value, and decimals that show `digits` digits of the smallest number: at most as many
    decimals, and none beside numbers of a thousand and more. Without prefixes the smallest keeps its digits."""
    sizes = sorted(abs(found) for found in map(number, values) if found)
    if not sizes:
        return Column(0, 0)
    power = _power(sizes[len(sizes) // 2]) if prefixed else 0
    smallest = math.floor(math.log10(sizes[0] / 10.0**power))
    decimals = max(0, digits - 1 - smallest)
    return Column(power, 0 if sizes[-1] / 10.0**power >= 1000 else min(decimals, digits) if prefixed else decimals)


def _power(value: float) -> int:
    """The power of 1000 below a value, as a power of ten that has a prefix; what would round up to 1000 counts as 1000."""
    if value == 0:
        return 0
    return min(max(3 * math.floor(math.log10(abs(value) * 1.0005) / 3), min(_PREFIXES)), max(_PREFIXES))
