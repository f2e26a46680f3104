"""The progress of a run: steps, seconds and intervals, as a checkpoint holds them."""

import dataclasses
from typing import Any


@dataclasses.dataclass
class LoopState:
    """The progress of a run, beside weights and optimizer: saved in a checkpoint's state.json.

    When to evaluate, save, log and stop follows from this alone, so that a restart changes none of it. A field that an
    older checkpoint lacks has its default.
    """

    step: int = 0
    seconds: float = 0.0  # of training: without compiling, evaluating and saving
    refused: int = 0  # updates that were not finite
    refused_in_a_row: int = 0
    refused_batch: int | None = None  # of the last one
    validation: float | None = None  # the last quick one
    best: float | None = None  # the lowest quick validation, or the highest mean reward
    best_step: int | None = None
    evaluation_seconds: float = 0.0  # of the longest quick validation
    first_step_seconds: float | None = None  # from the start of the process
    predicted: tuple[int, float] | None = None  # steps and seconds of the whole run, by what its first steps took
    intervals: dict[str, tuple[int, float]] = dataclasses.field(default_factory=dict)  # name -> step and seconds it began at
    stage: dict[str, Any] = dataclasses.field(default_factory=dict)  # the stage's own, replaced and never changed in place

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "LoopState":
        """Returns the state of a checkpoint's state.json. Raises KeyError, TypeError or ValueError for a damaged one."""
        known = {field.name: record[field.name] for field in dataclasses.fields(cls) if field.name in record}
        state = cls(**known | {"step": int(record["step"]), "seconds": float(record["seconds"])})
        state.intervals = {name: (step, seconds) for name, (step, seconds) in state.intervals.items()}
        return state

    def is_due(self, name: str, length: int | float) -> bool:
        """Whether the named interval of `length` steps (int) or seconds of training (float) is over."""
        step, seconds = self.intervals[name]
        return (self.step - step if isinstance(length, int) else self.seconds - seconds) >= length

    def begin(self, name: str) -> None:
        """Begins the named interval here."""
        self.intervals = self.intervals | {name: (self.step, self.seconds)}
