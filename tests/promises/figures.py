"""A figure of a promise: a measured number and the bar it is held to."""

import dataclasses
import math
import operator

RELATIONS = {"≤": operator.le, "≥": operator.ge, "=": operator.eq}


@dataclasses.dataclass(frozen=True)
class Figure:
    """One measured number, and how it must relate to its bar; NaN meets none."""

    name: str
    value: float
    relation: str
    bar: float
    unit: str = ""

    @property
    def met(self) -> bool:
        return RELATIONS[self.relation](self.value, self.bar)

    @property
    def wanted(self) -> str:
        return f"{self.name} {self.relation} {_number(self.bar)}{self.unit}"

    def __str__(self) -> str:
        return f"{self.name} {_number(self.value)}{self.unit}"


at_most = lambda name, value, bar, unit="": Figure(name, value, "≤", bar, unit)
at_least = lambda name, value, bar, unit="": Figure(name, value, "≥", bar, unit)
milliseconds = lambda name, seconds, bar: Figure(name, 1e3 * seconds, "≤", bar, " ms")  # bar in milliseconds


def exactly(name: str, value: float | None, bar: float) -> Figure:
    """A count or a code that must be `bar`; None, for one that never came, is not."""
    return Figure(name, math.nan if value is None else value, "=", bar)


def _number(value: float) -> str:
    if math.isnan(value):
        return "none"
    return f"{value:,.0f}" if math.isinf(value) or value == int(value) else f"{value:,.3g}"
