"""The four values of a run: Plan -> Prepared -> Steps -> RunReport; and LoopState, its progress.

A stage writes a class for each of Plan, Prepared and Steps, and what gives the next: a function that
prepares the Plan, and two methods of Prepared, which begin the Steps and report. `runs/run.py`
carries a run from one to the next, and `runs/loop.py` takes the steps.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, Self

from engine.storage.adapter import SavedAdapter
from engine.text.tokenizer import Tokenizer
from engine.training.step import NEXT_TOKEN, Objective, TrainState
from stages.cli.console import Console
from stages.runs.plan import RunPlan
from stages.runs.text_evaluators import Evaluator

INTERVALS = ("line", "log", "evaluate", "save")


@dataclasses.dataclass
class LoopState:
    """The progress of a run, beside weights and optimizer: saved in a checkpoint's state.json.

    When to evaluate, save, log and stop follows from this alone, so that a restart changes none of
    it. A field that an older checkpoint lacks has its default.
    """

    step: int = 0
    seconds: float = 0.0  # of training: without compiling, evaluating and saving
    refused: int = 0  # updates that were not finite
    refused_in_a_row: int = 0
    refused_batch: int | None = None  # of the last one
    validation: float | None = None  # the last quick one
    best: float | None = None  # the lowest quick validation, or the highest mean reward
    best_step: int | None = None
    since_best: int = 0  # quick validations
    evaluation_seconds: float = 0.0  # of the longest quick validation
    first_step_seconds: float | None = None  # from the start of the process
    # Steps and seconds of the whole run, by what its first steps took.
    predicted: tuple[int, float] | None = None
    # Name -> step and seconds it began at.
    intervals: dict[str, tuple[int, float]] = dataclasses.field(default_factory=dict)
    # The stage's own, replaced and never changed in place; `stage` of state.json.
    stage_state: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "LoopState":
        """Returns the state of a checkpoint's state.json. Raises KeyError, TypeError or ValueError
        for a damaged one."""
        known = {field.name: record[field.name] for field in dataclasses.fields(cls) if field.name in record}
        known["step"] = int(record["step"])
        known["seconds"] = float(record["seconds"])
        if "stage" in record:
            known["stage_state"] = record["stage"]
        state = cls(**known)
        state.intervals = {name: (step, seconds) for name, (step, seconds) in state.intervals.items()}
        return state

    def to_json(self) -> dict[str, Any]:
        """Returns the state of a checkpoint's state.json."""
        record = dataclasses.asdict(self)
        record["stage"] = record.pop("stage_state")
        return record

    def begin_intervals(self) -> None:
        """Begins now the intervals that an older checkpoint lacks."""
        for name in INTERVALS:
            self.intervals.setdefault(name, (self.step, self.seconds))

    def is_due(self, name: str, length: int | float) -> bool:
        """Whether an interval is over: `length` in steps (int) or in seconds (float)."""
        step, seconds = self.intervals[name]
        if isinstance(length, int):
            return self.step - step >= length
        return self.seconds - seconds >= length

    def begin(self, name: str) -> None:
        self.intervals = self.intervals | {name: (self.step, self.seconds)}

    def note_validation(self, value: float) -> None:
        """Notes a quick validation, and whether it is the best."""
        self.since_best += 1
        if not math.isfinite(value):
            self.validation = None  # JSON has no other
            return
        self.validation = value
        if self.best is None or value < self.best:
            self.best = value
            self.best_step = self.step
            self.since_best = 0

    def note_reward(self, reward: float) -> None:
        """Notes a round's reward: of the weights before its updates, which no checkpoint holds, so
        that no step is the best."""
        if self.best is None or reward > self.best:
            self.best = reward

    def forget_best(self) -> None:
        self.best = None
        self.best_step = None
        self.since_best = 0


class RunReport(NamedTuple):
    """The stage's part of run.json's result and of the summary."""

    result: dict[str, Any]
    texts: list[tuple[str, str]]  # under headings
    rows: list[tuple[str, str]]  # the first is the result in short
    saved: str
    next_stages: list[str]  # that take the model


class Plan(Protocol):
    """What a run will do, by its flags, its data and a model's architecture. No array of the run
    exists yet."""

    @property
    def plan(self) -> RunPlan: ...

    def rows(self, console: Console) -> list[tuple[str, str]]:
        """Returns the banner's rows between device and folder."""

    def print_example(self, console: Console) -> None:
        """Prints an example of the data below the banner, if the stage has any."""


class StepResult(NamedTuple):
    """What a step comes to."""

    state: TrainState  # may take the memory of the state before
    refused: list[bool]  # whether each update was
    metrics: Any = None  # the stage's own, of which its Steps make a line of metrics.jsonl and the live line
    trained_batch: Any = None  # that of the first update; None where there was none
    stage_state: dict[str, Any] | None = None  # the next LoopState.stage_state, where it changes
    reward: float | None = None  # the mean of a round

    def is_refused_whole(self) -> bool:
        return bool(self.refused) and all(self.refused)


class Steps(Protocol):
    """The compiled program of a run, and its data: state -> state, metrics."""

    evaluator: Evaluator | None
    buffer_bytes: int  # a step's temporary buffer, which must not be held twice; 0 where that does not matter
    lines_stay: bool  # whether every few seconds a line stays on a terminal

    def step(self, state: TrainState, loop_state: LoopState) -> StepResult:
        """Runs a step: a batch through a compiled program, or a round of rollouts and updates.
        Leaves `loop_state` as it is."""

    def is_exhausted(self, loop_state: LoopState) -> bool:
        """Whether there is nothing more to learn, which ends the loop."""

    def log_fields(self, metrics: list[Any], loop_state: LoopState, step_seconds: float) -> dict[str, float]:
        """Returns the fields of a line of metrics.jsonl, by the metrics of all steps since the last
        line."""

    def live_fields(self, metrics: Any, loop_state: LoopState, step_seconds: float) -> list[str]:
        """Returns this stage's own fields of the live line, by the metrics of the last step, None
        before the first."""


class Finished(NamedTuple):
    """What a run has come to, of which its stage makes the report."""

    state: TrainState
    loop_state: LoopState
    warm_rate: float | None  # steps a second after the first, if there were any
    before: Any  # what `measure` returned before training


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a run begins with: weights, tokenizer, data. A stage adds fields of its own, and writes
    the methods that raise."""

    plan: RunPlan
    metadata: dict[str, Any]  # the stage's own entries of run.json
    advice: str  # the end of "Lower --learning-rate ...", for updates that are not finite
    tokenizer: Tokenizer
    stop_token_ids: tuple[int, ...]  # ids that end a completion
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # recommended for the trained model
    trainable: Any = None  # the parameters that steps change, as loaded; None where they begin random
    frozen: Any  # those beside them, as steps read them
    frozen_as_loaded: Any = None  # those that a checkpoint holds beside them
    objective: Objective = NEXT_TOKEN

    def placed(self) -> Self:
        """Returns it spread over the mesh, if there is one."""
        return self

    def rows(self, console: Console) -> list[tuple[str, str]]:
        """Returns the banner's rows between device and folder, of what is now known."""
        raise NotImplementedError

    def print_example(self, console: Console) -> None:
        """Prints an example of the data below the banner, if the stage has any."""

    def begin_compiling(self, beside_reading: bool) -> Any:
        """Begins to compile the step, where that needs no state, and returns what `begin_steps`
        gets of it.

        `beside_reading`: whether a checkpoint is read next.
        """
        return None

    def initial_state(self, trainable: Any) -> TrainState:
        """Returns the state before the first step, of `trainable`; can be traced."""
        raise NotImplementedError

    def to_saved(self, trainable: Any) -> Any:
        """Returns the params of a checkpoint."""
        return trainable

    def from_saved(self, params: Any) -> Any:
        """Returns the trainable parameters among those of a checkpoint."""
        return params

    @property
    def adapted(self) -> SavedAdapter | None:
        """What a checkpoint says of the adapter that trains; None where weights do."""
        return None

    def prompt(self) -> tuple[str, list[int]]:
        """Returns a prompt, as text and as tokens, that shows what the model has learned; only a
        recording asks for it."""
        raise NotImplementedError

    def measure(self, trainable: Any, console: Console) -> Any:
        """Measures the model, if the stage compares it before and after training."""
        return None

    def begin_steps(
        self, state: TrainState, loop_state: LoopState, compiling: Any, console: Console
    ) -> Steps:
        """Compiles the step, and returns what the loop takes."""
        raise NotImplementedError

    def report(self, finished: Finished, console: Console) -> RunReport:
        """Measures at the end, saves what no checkpoint holds, and returns the report."""
        raise NotImplementedError
