"""A figure of a promise: a measured number and the bar it is held to; and the servers that a promise is tried on."""

import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

import pytest

from bench.serving.measure import tail

RELATIONS = {"≤": operator.le, "≥": operator.ge, "=": operator.eq}
WORDS = {"≤": "at most", "≥": "at least", "=": "wanted"}


class Figure(NamedTuple):
    """One measured number, and how it must relate to its bar; NaN, for what never came, meets none."""

    name: str
    value: float
    relation: str
    bar: float
    unit: str = ""

    @property
    def is_met(self) -> bool:
        return RELATIONS[self.relation](self.value, self.bar)

    @property
    def is_time(self) -> bool:
        return self.unit in (" s", " ms")

    def __str__(self) -> str:
        relation = "wanted" if self.bar == 0 else WORDS[self.relation]
        return f"{self.name} {self.value:,.4g}{self.unit} ({relation} {self.bar:,.4g})"


def none_of(name: str, examples: Sequence[object]) -> Figure:
    """Returns the count of what must not be, held to none; the name shows the first of them."""
    if examples:
        name += f", such as {examples[0]}"
    return Figure(name, len(examples), "≤", 0)


at_most = lambda name, value, bar, unit="": Figure(name, value, "≤", bar, unit)
at_least = lambda name, value, bar, unit="": Figure(name, value, "≥", bar, unit)
# bar in milliseconds
milliseconds = lambda name, seconds, bar: Figure(name, 1e3 * seconds, "≤", bar, " ms")


def slowest(name: str, seconds: Sequence[float], bar: float) -> Figure:
    """Returns the highest percentile that enough of the samples lie above, in milliseconds; the bar
    is in milliseconds too.
    """
    p, value = tail(seconds)
    return milliseconds(f"{name} p{p}", value, bar)


exactly = lambda name, value, bar: Figure(name, math.nan if value is None else value, "=", bar)


def servers(name: str, fixture: str = "server") -> pytest.MarkDecorator:
    """Tries a promise on the tiny server in the default run, and on the real one under `-m
    promises`; `fixture` makes both.
    """
    marks = pytest.mark.promises(name=name)
    return pytest.mark.parametrize(fixture, ["tiny", pytest.param("real", marks=marks)], indirect=True)
