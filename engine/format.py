"""Numbers as a person reads them: durations, counts, bytes, commands to type."""

import os
import shlex
from collections.abc import Sequence


def clock(seconds: float) -> str:
    """65 -> '1:05', 3725 -> '1:02:05'."""
    whole = max(0, round(seconds))
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def duration(seconds: float) -> str:
    """0.25 -> '0.25 s', 4.13 -> '4.1 s', 180 -> '3 min', 5400 -> '1 h 30 min'."""
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.1f} s".replace(".0 s", " s")
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if minutes else f"{hours:,} h"


def count(number: float) -> str:
    """950 -> '950', 4204800 -> '4.20 M': three figures."""
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            value = number / size
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"
    return f"{number:.3g}"


def size(bytes: float) -> str:
    """1.5e9 -> '1.5 GB' (powers of 1000)."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if bytes >= scale:
            return f"{bytes / scale:.{1 if bytes < 100 * scale else 0}f} {unit}"
    return f"{bytes:.0f} B"


def command(stage: str, *words: object) -> str:
    """What to type: through `uv run` when that is how we were started."""
    started = "uv run " if os.environ.get("UV") else ""
    return f"{started}python -m stages.{stage} {shlex.join(map(str, words))}".rstrip()


def listed(words: Sequence[str]) -> str:
    """['a', 'b', 'c'] -> 'a, b and c'."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)
