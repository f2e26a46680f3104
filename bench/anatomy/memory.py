"""Makes the memory of a compiled program over time: the bytes alive at each position of its schedule, by kind."""

import dataclasses
import itertools

import jax

from bench.anatomy.hlo import read_program
from bench.anatomy.liveness import Buffer, find_buffers, heap_bytes
from engine.counting.xla import xla_peak

KINDS = ("parameters", "optimizer state", "KV cache", "gradients", "residuals", "temporaries")
_BACKWARD, _OPTIMIZER = "transpose(jvp", "/optimizer/"


@dataclasses.dataclass(frozen=True)
class MemoryOverTime:
    """The memory of one call of a program, in bytes at each position of its schedule.

    `backward` and `update` are the positions at which backward begins and at which all gradients exist; None where there is
    no backward pass. `allocated` is the peak with the holes of a packed heap, `xla` the same by `memory_analysis()`.
    """

    bytes: dict[str, list[int]]  # by kind; each position's sum is what is alive
    backward: int | None
    update: int | None
    allocated: int
    xla: int

    @property
    def alive(self) -> list[int]:
        return [sum(column) for column in zip(*self.bytes.values())]

    @property
    def error(self) -> float:
        """How far `allocated` is from XLA's own figure, as a share of it."""
        return self.allocated / self.xla - 1


def memory_over_time(compiled: jax.stages.Compiled) -> MemoryOverTime:
    """Returns the memory of a compiled program. Its phases and kinds are known by the scopes of `engine/training/step.py`."""
    buffers, positions = find_buffers(read_program(compiled.as_text() or ""))
    after_loss = [each for each in buffers if _BACKWARD in each.label and "loss" in each.first_origins]
    backward = min((each.start for each in after_loss), default=None)
    update = max((each.start for each in after_loss), default=0) + 1 if after_loss else None
    changes = {kind: [0] * (positions + 2) for kind in KINDS}
    for buffer in buffers:
        column = changes[kind_of(buffer, backward)]
        column[buffer.start] += buffer.bytes
        column[max(buffer.start, buffer.end) + 1] -= buffer.bytes
    held = sum(buffer.bytes for buffer in buffers if buffer.place != "heap")
    return MemoryOverTime(
        {kind: list(itertools.accumulate(column))[:positions] for kind, column in changes.items()}, backward, update,
        held + heap_bytes(buffers), xla_peak(compiled),
    )  # fmt: skip


def kind_of(buffer: Buffer, backward: int | None) -> str:
    """Returns one of KINDS. A value made before `backward` and read after it is a residual; weights in another type, or with
    the norm's gain in them, are parameters still."""
    if buffer.place == "argument":
        return _argument_kind(buffer.label)
    if _OPTIMIZER in buffer.label:
        return "optimizer state"
    if backward is not None:
        if buffer.origins and all(_argument_kind(origin) == "parameters" for origin in buffer.origins):
            return "parameters"
        if _OPTIMIZER in buffer.last_label and _BACKWARD in buffer.label:
            return "gradients"
        if buffer.start < backward <= buffer.end:
            return "residuals"
    return "temporaries"


def _argument_kind(label: str) -> str:
    name = label.partition("[")[0]
    for start, kind in {
        "state.opt_state": "optimizer state", "state.trainable": "parameters", "params": "parameters",
        "frozen": "parameters", "cache": "KV cache",
    }.items():  # fmt: skip
        if name.startswith(start):
            return kind
    return "temporaries"


def thin(memory: MemoryOverTime, most: int) -> list[int]:
    """Returns at most `most` positions in order, of equal stretches of the schedule the one with most alive: peaks stay."""
    alive = memory.alive
    cuts = [len(alive) * part // most for part in range(most + 1)] if len(alive) > most else list(range(len(alive) + 1))
    return [max(range(low, high), key=alive.__getitem__) for low, high in itertools.pairwise(cuts)]
