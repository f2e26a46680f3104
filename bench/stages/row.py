"""A row of the stage table: one program, its expected cost, and how to run it once."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from engine.counting.flops import Flops
from engine.counting.jaxpr import JaxprCost, jaxpr_cost
from engine.counting.xla import XlaCost, xla_cost, xla_peak


@dataclasses.dataclass(frozen=True)
class Row:
    """A row before it is timed: `run` makes a call on `tokens` tokens and returns what the caller must wait for.

    Operations and bytes are those of one call. `weights` returns the model's weights, which it may have changed.
    """

    name: str
    stage: str  # training, fine-tuning, inference, decode, by hand
    run: Callable[[], Any]
    weights: Callable[[], Any]
    tokens: int
    formula: Flops
    peak_bytes: int | None  # that the compiled program needs, by XLA
    memory: dict[str, int]  # the same, predicted, by component
    traffic: int  # bytes that it must read and write
    walker: JaxprCost | None = None
    update: int = 0  # operations outside the gradient: clipping, the optimizer, the guard
    xla: XlaCost | None = None
    slots: int | None = None
    series: str | None = None
    dtype: str = "bfloat16"  # that its products multiply: decides its ceiling
    products: Callable[[], Any] | None = None  # runs a call's products with weights alone

    @property
    def utilisation_of(self) -> str:
        """Returns 'MBU' (share of bytes/s) for the stage `decode` and calls without products, else 'MFU' (share of FLOP/s)."""
        return "MBU" if self.stage == "decode" or not self.formula.total else "MFU"


def compile_program(
    function: Any, static: tuple[Any, ...], *args: Any, calls: int = 1, steps: int = 1, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """Compiles a jitted function for its arguments; returns the program, and the cost of `calls` as fields of a Row.

    `static` are its first arguments; `options` are static too. `steps` are those of its loop, whose body XLA counts once.
    """
    program = function.lower(*static, *args, **options).compile()
    cost = xla_cost(program)
    return program, {
        "peak_bytes": xla_peak(program),
        "walker": jaxpr_cost(functools.partial(function, *static, **options), *args) * calls,
        "xla": XlaCost(*(calls * steps * each for each in cost)),
    }
