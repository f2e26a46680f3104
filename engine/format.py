"""Formats numbers for people: durations, counts, bytes, money, ratios. An absent number is a dash."""

import math
from collections.abc import Sequence
from typing import Any

_PREFIXES = {-12: "p", -9: "n", -6: "µ", -3: "m", 0: "", 3: "k", 6: "M", 9: "G", 12: "T", 15: "P", 18: "E"}
_WORDS = {3: "thousand", 6: "million", 9: "billion", 12: "trillion"}
_SPACE = "\u202f"  # narrow, and never the end of a line
ABSENT = "–"


def clock_time(seconds: float) -> str:
    """Formats seconds as a clock: 65 -> '1:05', 3725 -> '1:02:05'."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{seconds:02}"
    return f"{minutes}:{seconds:02}"


def duration(seconds: float) -> str:
    """Formats seconds in words: 0.25 -> '0.25 s', 4.13 -> '4.1 s', 180 -> '3 min', 5400 -> '1 h 30 min'."""
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.1f} s".replace(".0 s", " s")
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        if rest:
            return f"{minutes} min {rest} s"
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if minutes:
        return f"{hours:,} h {minutes} min"
    return f"{hours:,} h"


def quantity(number: int, noun: str) -> str:
    """Formats a count of things: (1, 'step') -> '1 step', (1200, 'step') -> '1,200 steps'."""
    if number == 1:
        return f"1 {noun}"
    return f"{number:,} {noun}s"


def format_count(number: float) -> str:
    """Formats three figures with a prefix: 950 -> '950', 4204800 -> '4.20 M'."""
    if number >= 999.5:
        return si(number, "").replace(_SPACE, " ")
    return f"{number:.3g}"


def format_bytes(bytes: float) -> str:
    """Formats bytes: 1.5e9 -> '1.5 GB' (powers of 1000)."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if bytes >= 100 * scale:
            return f"{bytes / scale:.0f} {unit}"
        if bytes >= scale:
            return f"{bytes / scale:.1f} {unit}"
    return f"{bytes:.0f} B"


def join_words(words: Sequence[str]) -> str:
    """Joins words: ['a', 'b', 'c'] -> 'a, b and c'."""
    if len(words) > 1:
        return " and ".join([", ".join(words[:-1]), words[-1]])
    return "".join(words)


def finite(value: Any) -> float | None:
    """Returns a finite number as a float, and None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def si(value: Any, unit: str) -> str:
    """Formats with an SI prefix: `21.3 MFLOP`, `612 µs`."""
    value = finite(value)
    if value is None:
        return ABSENT
    power = _power(value)
    return f"{significant(value / 10.0**power)}{_SPACE}{_PREFIXES[power]}{unit}".rstrip(_SPACE)


def in_words(value: Any) -> str:
    """Formats a count in words: `96.2 million`, `12.3 thousand`, `640`."""
    value = finite(value)
    if value is None:
        return ABSENT
    power = max(0, min(_power(value), 12))
    return " ".join(filter(None, [significant(value / 10.0**power), _WORDS.get(power)]))


def money(value: Any) -> str:
    """Formats dollars: `$0.0417`, `$0.10`, `$0.256`, `$12.50`, `$240`, `$1,240`."""
    value = finite(value)
    if value is None:
        return ABSENT
    cents = 1 <= abs(value) < 100 or (0.01 <= abs(value) < 1 and value == round(value, 2))
    if cents:
        return f"${value:.2f}"
    return f"${significant(value)}"


def times(value: Any) -> str:
    """Formats a ratio: `3.00×`, or `14.2×` from ten up."""
    value = finite(value)
    if value is None:
        return ABSENT
    if abs(value) < 9.95:  # what one decimal would not round to 10.0
        return f"{value:,.2f}×"
    return f"{value:,.1f}×"


def percent(value: Any) -> str:
    """Formats a share as `59%`."""
    value = finite(value)
    if value is None:
        return ABSENT
    return f"{round(100 * value)}%".replace("-", "−")


def significant(value: float) -> str:
    """Formats three significant digits without an exponent, thousands apart: `0.0417`, `7.11`, `1,240`."""
    if value == 0:
        return "0"
    decimals = max(0, 2 - math.floor(math.log10(abs(float(f"{value:.3g}")))))
    return f"{value:,.{decimals}f}"


def _power(value: float) -> int:
    """Returns the power of ten of a value's prefix; what rounds up to 1000 counts as 1000."""
    if value == 0:
        return 0
    power = 3 * math.floor(math.log10(abs(value) * 1.0005) / 3)
    return min(max(power, min(_PREFIXES)), max(_PREFIXES))
