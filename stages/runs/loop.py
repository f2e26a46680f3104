"""The loop of every run: steps until the plan is done or a signal comes; saving, logging and evaluating between them."""

import collections
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from engine.allocator import return_freed_memory
from engine.errors import UserError
from engine.storage import checkpoint
from engine.training.step import TrainState
from stages.cli import signals
from stages.cli.console import Console
from stages.cli.process import process_start
from stages.runs.estimate import RunPlan
from stages.runs.folder import MetricsLog

REFUSED_IN_A_ROW = 10
RECENT = 20  # steps over which speed is averaged
EVALUATING = 0.04  # of the time at most, unless --eval-every says otherwise
STAYS = 5.0  # seconds between lines that stay on a terminal


@dataclasses.dataclass
class LoopState:
    """Where a run stands, beside weights and optimizer: it is saved in a checkpoint's state.json."""

    step: int = 0
    seconds: float = 0.0  # of training: without compiling, evaluating and saving
    refused: int = 0
    best: float | None = None  # the lowest quick validation, or the highest mean reward
    first_step_seconds: float | None = None  # after the start of the process


@dataclasses.dataclass(frozen=True)
class Intervals:
    """How often things are done, int for steps and float for seconds; and how many checkpoints are kept.

    `evaluate` None: a tenth of the run, or more where an evaluation takes longer than EVALUATING of the time.
    """

    save: int | float
    keep: int
    log: int = 1
    evaluate: int | float | None = None


class Interval:
    """Tells whether it is time again, in steps or in seconds of training."""

    def __init__(self, length: int | float, state: LoopState) -> None:
        self.length = length
        self.step, self.seconds = state.step, state.seconds

    def is_due(self, state: LoopState) -> bool:
        """Whether the interval is over; the next one then begins."""
        past = state.step - self.step if isinstance(self.length, int) else state.seconds - self.seconds
        if past >= self.length:
            self.step, self.seconds = state.step, state.seconds
        return past >= self.length


class StepTimer:
    """Seconds of the recent steps, and of all but the first, which touches its memory for the first time."""

    def __init__(self) -> None:
        self.recent: collections.deque[float] = collections.deque(maxlen=RECENT)
        self.count, self.warm_seconds = 0, 0.0

    def add(self, seconds: float) -> None:
        self.count += 1
        if self.count == 2:
            self.recent.clear()
        if self.count > 1:
            self.warm_seconds += seconds
        self.recent.append(seconds)

    def mean(self) -> float:
        return max(sum(self.recent) / max(len(self.recent), 1), 1e-9)

    def warm_rate(self) -> float | None:
        """Returns steps a second over all but the first; None before there are any."""
        return (self.count - 1) / self.warm_seconds if self.count > 1 else None


class Evaluator(Protocol):
    """A quick evaluation, and what its number is called on screen (`unit`) and in metrics.jsonl (`key`)."""

    @property
    def unit(self) -> str: ...
    @property
    def key(self) -> str: ...
    def evaluate(self, trainable: Any, stopped: Callable[[], bool]) -> float | None:
        """Returns the number; None when it was `stopped` in between."""


class Steps(Protocol):
    """The work that a loop repeats: a batch through a compiled program, or a round of rollouts and updates."""

    noun: str  # "step" or "round"
    advice: str  # the end of "Lower --learning-rate ...", for updates that are not finite
    evaluator: Evaluator | None
    buffer: int  # bytes a step takes while it runs, where they must not be held twice; 0 where that does not matter
    lines_stay: bool  # whether every STAYS seconds a line stays on a terminal

    def run(self, state: TrainState, loop_state: LoopState) -> tuple[TrainState, list[bool]]:
        """Returns the next state, which may take `state`'s place in memory, and for each update whether it was refused."""

    def metrics(self, loop_state: LoopState, timer: StepTimer) -> dict[str, float]:
        """Returns the fields of a line of metrics.jsonl, about the steps since the last one."""

    def fields(self, loop_state: LoopState, timer: StepTimer, evaluation: str) -> list[str]:
        """Returns the live line. `evaluation` is the newest one in words."""


class Loop:
    """One part of a run, from where it stands to its end or to a signal.

    `record` goes into state.json beside LoopState; `to_saved` gives a checkpoint's params.
    """

    def __init__(
        self, plan: RunPlan, folder: Path, intervals: Intervals, record: dict[str, Any], to_saved: Callable[[Any], Any],
        loop_state: LoopState, console: Console,
    ) -> None:  # fmt: skip
        self.plan, self.folder, self.intervals, self.record, self.to_saved = plan, folder, intervals, record, to_saved
        self.loop_state, self.console = loop_state, console
        self.timer = StepTimer()
        self.log = MetricsLog(folder, loop_state.step)
        self.evaluation = "val -"
        self.refused_in_a_row = 0

    def run(self, steps: Steps, state: TrainState) -> tuple[TrainState, int | None]:
        """Trains to the end of the plan, or until a signal. -> the last state, saved, and the signal's number if any.

        Raises UserError after too many refused updates in a row; the last checkpoint then stays as it is.
        """
        loop_state, plan, intervals = self.loop_state, self.plan, self.intervals
        save, log, stay = (Interval(length, loop_state) for length in (intervals.save, intervals.log, STAYS))
        evaluate = Interval(intervals.evaluate or plan.share_of(10), loop_state)
        saved = logged = loop_state.step
        done = lambda: plan.progress(loop_state.step, loop_state.seconds) >= 1
        answer = f"Finishing this {steps.noun}, then saving (once more: stop at once)."
        with signals.deferred(answer, self.console.print) as signal_state:
            begin = time.perf_counter()
            try:
                while not done() and not signal_state.received:
                    state, refused = steps.run(state, loop_state)
                    end = time.perf_counter()
                    self._count(steps, refused, end - begin)
                    begin = end
                    important = steps.lines_stay and (stay.is_due(loop_state) or self.timer.count == 1 or done())
                    self.console.show_live(lambda: steps.fields(loop_state, self.timer, self.evaluation), important)
                    if log.is_due(loop_state):
                        self._log(steps)
                        logged = loop_state.step
                    if steps.evaluator and evaluate.is_due(loop_state) and not done():
                        with _apart_from_steps(steps.buffer):
                            evaluate.length = self._evaluate(steps, state, evaluate.length, signal_state)
                        begin = time.perf_counter()
                    if save.is_due(loop_state):
                        with _apart_from_steps(steps.buffer):
                            self.save(state)
                        saved = loop_state.step
                        begin = time.perf_counter()
            except BrokenPipeError:
                self.save(state)  # nobody reads on, but nothing is lost
                raise
            if logged != loop_state.step:
                self._log(steps)
            if saved != loop_state.step:
                self.save(state)
            return state, signal_state.received

    def save(self, state: TrainState) -> None:
        record = dataclasses.asdict(self.loop_state) | self.record
        params, step = self.to_saved(state.trainable), self.loop_state.step
        checkpoint.save(self.folder, step, params, state.opt_state, record, keep=self.intervals.keep)

    def _count(self, steps: Steps, refused: list[bool], seconds: float) -> None:
        loop_state = self.loop_state
        loop_state.step += 1
        loop_state.seconds += seconds
        self.timer.add(seconds)
        if loop_state.first_step_seconds is None:
            loop_state.first_step_seconds = time.perf_counter() - process_start()
        for update_refused in refused:
            loop_state.refused += update_refused
            self.refused_in_a_row = self.refused_in_a_row + 1 if update_refused else 0
            if self.refused_in_a_row >= REFUSED_IN_A_ROW:
                saved = checkpoint.steps(self.folder)
                safe = f"the checkpoint of {steps.noun} {saved[-1]} is as it was" if saved else "nothing had been saved yet"
                raise UserError(
                    f"{self.refused_in_a_row} steps in a row had a loss or gradient that is not a number; {safe}. "
                    f"Lower {steps.advice}."
                )

    def _log(self, steps: Steps) -> None:
        now = self.loop_state
        self.log.add(step=now.step, seconds=now.seconds, **steps.metrics(now, self.timer))

    def _evaluate(
        self, steps: Steps, state: TrainState, interval: int | float, signal_state: signals.SignalState
    ) -> int | float:
        """Evaluates quickly. Returns the interval to the next, longer than before when this one took too long."""
        begin, loop_state, evaluator = time.perf_counter(), self.loop_state, steps.evaluator
        assert evaluator is not None
        value = evaluator.evaluate(state.trainable, lambda: signal_state.received is not None)
        if value is None:
            return interval
        first = self.evaluation == "val -"
        self.evaluation = f"val {value:.3f} {evaluator.unit}"
        loop_state.best = value if loop_state.best is None else min(loop_state.best, value)
        self.log.add(step=loop_state.step, seconds=loop_state.seconds, **{evaluator.key: value})
        self.console.show_live(lambda: steps.fields(loop_state, self.timer, self.evaluation), important=True)
        if self.intervals.evaluate or first:  # as often as asked for; the first one also compiled
            return interval
        least = (time.perf_counter() - begin) / EVALUATING
        return max(interval, math.ceil(least / self.timer.mean()) if isinstance(interval, int) else least)


@contextlib.contextmanager
def _apart_from_steps(buffer: int) -> Iterator[None]:
    """Keeps work between two steps, where memory matters, from lying beside a step's freed buffer or in its place."""
    if buffer:
        return_freed_memory()
    yield
    if buffer:
        return_freed_memory()
