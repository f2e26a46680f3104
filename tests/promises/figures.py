"""A figure of a promise: a measured number and the bar it is held to; and the servers that a promise is tried on."""

import math
import operator
from typing import NamedTuple

import pytest

RELATIONS = {"≤": operator.le, "≥": operator.ge, "=": operator.eq}
WORDS = {"≤": "at most", "≥": "at least", "=": "wanted"}
PROMISES = {  # in the words of README.md
    "S1": "The same request gives the same bits, whoever else is there.",
    "S2": "No request sees another's text.",
    "S3": "Serving changes no weight, and no route could.",
    "S4": "A disconnect frees its slot.",
    "S5": "Overload is refused at once, and costs no throughput.",
    "S6": "No request compiles, breaks or blocks anything.",
    "S7": "Tokenizing is linear: a megabyte in a second.",
    "S8": "SIGTERM lets running requests finish.",
    "S9": "/health replies 503 once the engine hangs.",
    "S10": "OpenAI's own client works, and so does every request that our OpenAPI allows.",
    "S11": "A short prompt beside long ones has its first token soon.",
    "S17": "A request gets what it gets alone, under any schedule on a simulated device.",
    "X3": "Every route but liveness and health needs the key.",
    "X4": "A page of another site cannot use a local server.",
    "X5": "A start unpickles nothing, runs nothing foreign and opens no connection.",
    "T1": "A kill at any instant leaves whole checkpoints only.",
    "T2": "A damaged newest checkpoint is named, and the one before it is used.",
    "T3": "A resumed run is the uninterrupted one to the bit.",
    "T5": "Ctrl-C, SIGTERM and a closed terminal save, in any phase.",
    "T7": "The same configuration gives the same bits.",
    "T8": "A full, broken or read-only disk is reported, and harms no older checkpoint.",
    "T9": "One of several processes dies: all end, and the same command resumes.",
    "T11": "Saving runs beside training.",
    "T14": "Memory stays within the plan.",
}


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


at_most = lambda name, value, bar, unit="": Figure(name, value, "≤", bar, unit)
at_least = lambda name, value, bar, unit="": Figure(name, value, "≥", bar, unit)
milliseconds = lambda name, seconds, bar: Figure(name, 1e3 * seconds, "≤", bar, " ms")  # bar in milliseconds
exactly = lambda name, value, bar: Figure(name, math.nan if value is None else value, "=", bar)


def servers(name: str, fixture: str = "server") -> pytest.MarkDecorator:
    """Tries a promise on the tiny server in the default run, and on the real one under `-m promises`; `fixture` makes both."""
    marks = pytest.mark.promises(name=name)
    return pytest.mark.parametrize(fixture, ["tiny", pytest.param("real", marks=marks)], indirect=True)
