"""An answer of the planner: intervals with where each comes from, what binds, and sentences; printed, or as JSON."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from bench.cli import print_table
from engine.errors import UserError
from engine.format import duration, format_bytes, in_words, money, si, significant

# Of the watts in the table, what runs drew: OLMo-3 on H100, 624 and 649 of 700 (muxup.com/2025q4); LLaMA on A100, 400 and a
# tenth for the building (2302.13971, table 15).
POWER = (0.89, 1.10)


class Interval(NamedTuple):
    """A quantity between two bounds, which are equal where it is exact; `origin`: where it comes from."""

    low: float
    middle: float
    high: float
    unit: str
    origin: str


class Answer(NamedTuple):
    """What was asked, the quantities by name, what binds, and notes."""

    question: str
    lines: dict[str, Interval]
    binding: str = ""
    notes: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """Returns the answer as JSON has it."""
        lines = {name: line._asdict() for name, line in self.lines.items()}
        return {"question": self.question, "answer": lines, "binding": self.binding, "notes": self.notes}

    def print(self) -> None:
        """Prints the quantities as a table, then what binds, and the notes."""
        rows = []
        for name, line in self.lines.items():
            low, middle, high = (write(bound, line.unit) for bound in line[:3])
            rows.append((name, middle, "" if line.low == line.high else f"{low} to {high}", line.origin))
        print_table(self.question, ("", "", "", ""), rows, left=4, sentences=True)
        for text in ([f"what binds: {self.binding}"] if self.binding else []) + [*self.notes]:
            print(text)


def interval(bounds: Iterable[float], unit: str, origin: str) -> Interval:
    """Returns the interval of low, middle and high."""
    low, middle, high = bounds
    return Interval(low, middle, high, unit, origin)


def around(middle: float, spread: float, unit: str, origin: str) -> Interval:
    """Returns the interval of a logarithm's spread each way; 0 for what is exact."""
    return Interval(middle * math.exp(-spread), middle, middle * math.exp(spread), unit, origin)


def costs(hours: Interval, d: Any) -> dict[str, Interval]:
    """Returns dollars and energy of device-hours, where the device has a price and watts."""
    lines = {}
    for name, unit, low, high, origin in (
        ("dollars", "dollars", d.low, d.high, f"${d.low:g} to ${d.high:g} a device-hour: {d.price}"),
        ("energy", "kWh", *(share * d.watts / 1000 for share in POWER), f"{d.watts:g} W, of which runs draw 89% to 110%"),
    ):
        if high:
            factors = (low, math.sqrt(low * high), high)
            lines[name] = interval((bound * factor for bound, factor in zip(hours[:3], factors)), unit, origin)
    return lines


def write(value: float, unit: str) -> str:
    """Writes a quantity as a person reads it: `8.21 days`, `$240`, `12.4 GB`, `37%`, `26.9 k tokens`."""
    match unit:
        case "seconds" if value < 3600:
            return si(value, "s") if value < 60 else duration(value)
        case "seconds":
            return f"{significant(value / 3600)} h" if value < 172800 else f"{significant(value / 86400)} days"
        case "dollars":
            return money(value)
        case "bytes":
            return format_bytes(value)
        case "share":
            return f"{100 * value:.0f}%"
        case "FLOP":
            return f"{value:.3g} FLOP"
        case "hours" | "kWh":
            return f"{significant(value)} {unit}"
        case _:
            return f"{in_words(value) if value >= 1000 else f'{value:.3g}'} {unit}"


_SCALES = {"k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}


def amount(flag: str, text: str | None) -> float:
    """Reads `100B`, `9T`, `5e9` or `1,000`. Raises UserError, naming the flag, for anything else or nothing above 0."""
    digits = (text or "").strip().replace(",", "")
    scale = _SCALES.get(digits[-1:], 1.0)
    try:
        value = float(digits.rstrip("".join(_SCALES)) if scale > 1 else digits) * scale
    except ValueError:
        value = math.nan
    if not 0 < value < 1e18:
        wrong = "is missing: give a number" if text is None else f"must be a number above 0 and below 1e18, not {text!r}"
        raise UserError(f"{flag} {wrong}, such as 100B, 5e9 or 1,000.")
    return value
