"""The promises of serving as a table: what is promised, what figure is wanted, what was measured, whether it was kept.

Each promise is measured by doing it to the project's own server, a process of its own, over its own loopback. None is
taken on trust: what could not be done here is said to be unmeasured and does not count as kept.
"""

import asyncio
import dataclasses
import random
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from bench.serving.http_client import Answer
from bench.serving.load import completion, words
from bench.serving.server import Server
from engine.counting.hardware import clock
from engine.errors import UserError, nearest

MS = 1e3


@dataclasses.dataclass(frozen=True)
class Figure:
    """One measured number, the bar it is held to, and whether it may not be above it or not below."""

    name: str
    value: float
    bar: float
    unit: str = ""
    most: bool = True  # the bar is the most it may be, not the least

    @property
    def met(self) -> bool:
        return self.value <= self.bar if self.most else self.value >= self.bar  # NaN meets nothing

    @property
    def wanted(self) -> str:
        return f"{self.name} {'≤' if self.most else '≥'} {_number(self.bar)}{self.unit}"

    def __str__(self) -> str:
        return f"{self.name} {_number(self.value)}{self.unit}"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a promise: its figures, over how much, and perhaps what could not be done (then it is not kept)."""

    figures: tuple[Figure, ...]
    over: str
    missing: str = ""

    @property
    def kept(self) -> bool:
        """Whether every figure meets its bar, and there are figures."""
        return bool(self.figures) and not self.missing and all(figure.met for figure in self.figures)


@dataclasses.dataclass
class Trial:
    """What a promise is tried on: a server at work, how large its promises are to be tried, and what others found."""

    model: str
    server: Server
    quick: bool
    slots: int
    capacity: int  # tokens of prompt and completion together
    flags: tuple[str, ...] = ()  # what its server was started with
    rng: random.Random = dataclasses.field(default_factory=lambda: random.Random(0))
    asked: int = 0  # requests that have been sent by all

    def count(self, full: int, quick: int) -> int:
        """How often, by how thorough this is."""
        return quick if self.quick else full

    def drawn(self, tokens: int = 12, **options: Any) -> dict[str, Any]:
        """The body of some request: no two are alike."""
        return completion(words(self.rng, self.rng.randint(3, 40)), self.rng.randint(1, tokens), **options)

    def another(self, *flags: str, **options: Any) -> Server:
        """A second server of the same model."""
        return Server(self.model, [*self.flags, *flags], **options)


Promise = Callable[[Trial], Awaitable[Outcome]]


@dataclasses.dataclass(frozen=True)
class Line:
    """A row of the table."""

    name: str
    says: str
    outcome: Outcome
    seconds: float

    def as_json(self) -> dict[str, Any]:
        figures = [
            {"name": f.name, "value": f.value if f.value == f.value else None, "bar": f.bar, "unit": f.unit, "met": f.met}
            for f in self.outcome.figures
        ]
        return {
            "promise": self.name, "says": self.says, "figures": figures, "over": self.outcome.over,
            "missing": self.outcome.missing, "kept": self.outcome.kept, "seconds": round(self.seconds, 1),
        }  # fmt: skip


def chosen(names: str) -> list[tuple[str, str, Promise]]:
    """The promises with these names (`S1,S4`), or all; (name, what it says, how it is tried), in the order they are tried.

    Raises UserError for a name that is none.
    """
    from bench import promises_door, promises_input, promises_life, promises_load, promises_same

    every = [
        *promises_same.PROMISES, *promises_load.PROMISES, *promises_input.PROMISES, *promises_door.PROMISES,
        *promises_life.PROMISES, *promises_same.LAST,
    ]  # fmt: skip
    known = [name for name, _, _ in every]
    wanted = [name.strip().upper() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in known:
            raise UserError(
                f"There is no promise {name}; there are {', '.join(sorted(known, key=_place))}.{nearest(name, known)}"
            )
    return [promise for promise in every if not wanted or promise[0] in wanted]


async def kept(trial: Trial, promises: Sequence[tuple[str, str, Promise]]) -> list[Line]:
    """Tries each promise, and says on stderr what it found; in the order of their names.

    A promise whose trial breaks is one that is not kept: how it broke is in its line.
    """
    lines = []
    for name, says, promise in promises:
        begin = clock()
        try:
            outcome = await promise(trial)
        except (UserError, OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
            outcome = Outcome((), "", f"its trial broke: {type(error).__name__}: {error}")
        line = Line(name, says, outcome, clock() - begin)
        verdict = "kept" if outcome.kept else "NOT KEPT"
        print(f"{name:<4} {verdict:<8} {line.seconds:5.1f} s  {_measured(line)}", file=sys.stderr, flush=True)
        lines.append(line)
    return sorted(lines, key=lambda line: _place(line.name))


def show(lines: Sequence[Line]) -> None:
    """Prints the table."""
    from rich import box
    from rich.table import Table

    from bench.table.print import console

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("", "promise", "figure wanted", "figure measured", "kept?"):
        table.add_column(head, no_wrap=head in ("", "kept?"))
    for line in lines:
        wanted = "; ".join(figure.wanted for figure in line.outcome.figures) or "-"
        verdict = "[green]yes[/]" if line.outcome.kept else "[bold red]NO[/]"
        table.add_row(line.name, line.says, wanted, _measured(line), verdict)
    console().print(table)


def _measured(line: Line) -> str:
    outcome = line.outcome
    parts = [*map(str, outcome.figures), *([outcome.missing] if outcome.missing else [])]
    return "; ".join(parts) + (f" ({outcome.over})" if outcome.over else "")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) and abs(value) < 1e15 else f"{value:,.3g}" if value == value else "none"


def _place(name: str) -> tuple[str, int]:
    return name[0], int(name[1:])


def server_errors(answers: Sequence[Answer]) -> int:
    """How many were answered as if the server had failed."""
    return sum(answer.status >= 500 for answer in answers)


async def settled(server: Server, seconds: float = 5.0) -> float:
    """Seconds until nobody has a slot and nobody waits; NaN when somebody still does after so long."""
    begin = clock()
    while clock() - begin < seconds:
        found = await server.gauges()
        if not found.get(RUNNING, 0) and not found.get(WAITING, 0):
            return clock() - begin
        await asyncio.sleep(0.01)
    return float("nan")


RUNNING, WAITING = "vllm:num_requests_running", "vllm:num_requests_waiting"
GENERATED = "vllm:generation_tokens_total"
