"""A row of the stage table: one program, what it is expected to cost, and how to run it once."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from engine.counting.flops import Flops
from engine.counting.walk import Work, count
from engine.counting.xla import XlaCost, xla_cost, xla_peak


@dataclasses.dataclass(frozen=True)
class Row:
    """Everything about a row but its time. Work, bytes and operations are those of one call, for `tokens` tokens.

    `run` does the call and returns what to wait for; `weights` are the model's as they are now, by which it is seen whether
    running changed them. A number that cannot be known is None.
    """

    name: str
    stage: str  # training, fine-tuning, inference, decode, by hand
    run: Callable[[], Any]
    weights: Callable[[], Any]
    tokens: int
    formula: Flops
    peak_bytes: int | None  # that the compiled program needs, by XLA
    memory: dict[str, int]  # the same, predicted, by what it holds
    moved: int  # bytes at the least
    walker: Work | None = None
    update: int = 0  # operations outside the gradient: clipping, the optimizer, the guard
    xla: XlaCost | None = None
    slots: int | None = None
    series: str | None = None
    dtype: str = "bfloat16"  # what its products multiply: the ceiling it is held to
    products: Callable[[], Any] | None = None  # a call's products with weights, alone

    @property
    def bound(self) -> str:
        """Names a call's ceiling: how fast this machine multiplies (MFU), or how fast it reads (MBU)."""
        return "MBU" if self.stage == "decode" or not self.formula.total else "MFU"


def compiled(function: Any, static: tuple[Any, ...], *args: Any, calls: int = 1, steps: int = 1) -> tuple[Any, dict[str, Any]]:
    """Returns a jitted function compiled for its arguments, and the fields of a Row that its cost is, of so many calls.

    `static` are its first, static arguments. `steps`: those of its loop, whose body XLA's analysis counts once.
    """
    program = function.lower(*static, *args).compile()
    cost = xla_cost(program)
    return program, {
        "peak_bytes": xla_peak(program),
        "walker": count(functools.partial(function, *static), *args) * calls,
        "xla": XlaCost(*(calls * steps * each for each in (cost.flops, cost.transcendentals, cost.bytes_accessed))),
    }
