"""The training loop: steps until the plan is done or a signal comes; logs, evaluates and saves between them."""

import collections
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from engine.allocator import return_freed_memory
from engine.counting.hardware import peak_rss_bytes
from engine.device import Device
from engine.errors import UserError
from engine.format import clock_time, format_bytes, quantity
from engine.storage import checkpoint
from engine.training.step import TrainState
from stages.cli import signals
from stages.cli.console import Console
from stages.cli.process import process_start
from stages.runs.estimate import RunPlan, run_fraction
from stages.runs.folder import MetricsLog

REFUSED_IN_A_ROW = 10
RECENT = 20  # steps over which speed is averaged
EVALUATION_SHARE = 0.04  # of the time at most, unless --eval-every says otherwise
LINE_INTERVAL = 5.0  # seconds between lines that stay on a terminal


@dataclasses.dataclass
class LoopState:
    """The progress of a run, beside weights and optimizer: saved in a checkpoint's state.json."""

    step: int = 0
    seconds: float = 0.0  # of training: without compiling, evaluating and saving
    refused: int = 0  # updates that were not finite
    best: float | None = None  # the lowest quick validation, or the highest mean reward
    first_step_seconds: float | None = None  # from the start of the process


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Where and how a run is carried out. `stage`: the command's name; `keep`: checkpoints to keep.

    Intervals are steps (int) or seconds (float). `eval_every` None: a tenth of the run, or more where evaluating takes longer
    than EVALUATION_SHARE of the time.
    """

    stage: str
    device: Device
    folder: Path
    dry_run: bool
    overwrite: bool
    save_every: int | float
    keep: int
    log_every: int = 1
    eval_every: int | float | None = None


class Interval:
    """An interval of `length` steps (int) or seconds of training (float)."""

    def __init__(self, length: int | float, state: LoopState) -> None:
        self.length = length
        self.step, self.seconds = state.step, state.seconds

    def is_due(self, state: LoopState) -> bool:
        """Whether the interval is over; if so, the next one begins."""
        past = state.step - self.step if isinstance(self.length, int) else state.seconds - self.seconds
        if past >= self.length:
            self.step, self.seconds = state.step, state.seconds
        return past >= self.length


class StepTimer:
    """Measures the seconds of recent steps, and of all but the first, which touches its memory for the first time."""

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
        """Returns steps a second after the first; None before there are any."""
        return (self.count - 1) / self.warm_seconds if self.count > 1 else None


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Evaluates on held-out batches: the sum of `summed_loss(trainable, batch)` over `size`.

    The mean is called `unit` on screen and `key` in metrics.jsonl.
    """

    batches: Sequence[Any]
    summed_loss: Callable[[Any, Any], Any]
    size: float
    unit: str
    key: str

    def evaluate(self, trainable: Any, stopped: Callable[[], bool] = lambda: False) -> float | None:
        """Returns the mean; None when it was `stopped` in between."""
        total = 0.0
        for batch in self.batches:
            if stopped():
                return None
            total += float(self.summed_loss(trainable, batch))
        return total / self.size


class Steps(Protocol):
    """The steps of a loop: each a batch through a compiled program, or a round of rollouts and updates."""

    advice: str  # the end of "Lower --learning-rate ...", for updates that are not finite
    evaluator: Evaluator | None
    buffer_bytes: int  # a step's temporary buffer, which must not be held twice; 0 where that does not matter
    lines_stay: bool  # whether every LINE_INTERVAL seconds a line stays on a terminal
    exhausted: bool  # whether there is nothing more to learn, which ends the loop

    def run(self, state: TrainState, loop_state: LoopState) -> tuple[TrainState, list[bool]]:
        """Returns the next state, which may take `state`'s memory, and for each update whether it was refused."""

    def metrics(self, loop_state: LoopState, step_seconds: float) -> dict[str, float]:
        """Returns the fields of a line of metrics.jsonl."""

    def fields(self, loop_state: LoopState, step_seconds: float) -> list[str]:
        """Returns these steps' own fields of the live line."""


class Loop:
    """Runs steps to the run's end or to a signal.

    `record` goes into state.json beside LoopState; `to_saved` gives a checkpoint's params.
    """

    def __init__(
        self, plan: RunPlan, options: RunOptions, record: dict[str, Any], to_saved: Callable[[Any], Any],
        loop_state: LoopState, console: Console,
    ) -> None:  # fmt: skip
        self.plan, self.options, self.record, self.to_saved = plan, options, record, to_saved
        self.loop_state, self.console = loop_state, console
        self.timer, self.log = StepTimer(), MetricsLog(options.folder, loop_state.step)
        self.evaluation, self.refused_in_a_row = "val -", 0

    def run(self, steps: Steps, state: TrainState) -> tuple[TrainState, int | None]:
        """Returns the last state, which is saved, and the number of the signal that ended the loop, if any.

        Raises UserError after too many refused updates in a row; the last checkpoint then stays as it is.
        """
        loop_state, plan, options = self.loop_state, self.plan, self.options
        save, log, stay = (Interval(length, loop_state) for length in (options.save_every, options.log_every, LINE_INTERVAL))
        evaluate = Interval(options.eval_every or run_fraction(10, plan.steps, plan.seconds), loop_state)
        done = lambda: steps.exhausted or plan.progress(loop_state.step, loop_state.seconds) >= 1
        answer = f"Finishing this {plan.noun}, then saving (once more: stop at once)."
        with signals.defer_signals(answer, self.console.print) as signal_state:
            begin = time.perf_counter()
            try:
                while not done() and not signal_state.received:
                    state, refused = steps.run(state, loop_state)
                    end = time.perf_counter()
                    self._count(steps, refused, end - begin)
                    begin = end
                    important = steps.lines_stay and (stay.is_due(loop_state) or self.timer.count == 1 or done())
                    self.console.show_live(lambda: self._live_line(steps), important)
                    if log.is_due(loop_state):
                        self._log(steps.metrics(loop_state, self.timer.mean()))
                    evaluates = steps.evaluator and evaluate.is_due(loop_state) and not done()
                    saves = save.is_due(loop_state)
                    if evaluates or saves:
                        with _without_free_memory(steps.buffer_bytes):
                            if evaluates:
                                self._evaluate(steps, state, evaluate, signal_state)
                            if saves:
                                self.save(state)
                        begin = time.perf_counter()
            except BrokenPipeError:
                self.save(state)  # nobody reads on, but nothing is lost
                raise
            if log.step != loop_state.step:
                self._log(steps.metrics(loop_state, self.timer.mean()))
            if save.step != loop_state.step:
                self.save(state)
            return state, signal_state.received

    def save(self, state: TrainState) -> None:
        record = dataclasses.asdict(self.loop_state) | self.record
        params, step = self.to_saved(state.trainable), self.loop_state.step
        checkpoint.save(self.options.folder, step, params, state.opt_state, record, keep=self.options.keep)

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
                saved = checkpoint.steps(self.options.folder)
                safe = f"the checkpoint of {self.plan.noun} {saved[-1]} is as it was" if saved else "nothing had been saved yet"
                raise UserError(
                    f"{REFUSED_IN_A_ROW} steps in a row had a loss or gradient that is not a number; {safe}. "
                    f"Lower {steps.advice}."
                )

    def _live_line(self, steps: Steps) -> list[str]:
        plan, now, step_seconds = self.plan, self.loop_state, self.timer.mean()
        left = plan.seconds_left(now.step, now.seconds, step_seconds)
        return [
            f"{plan.noun} {now.step:,}" + (f"/{plan.steps:,}" if plan.steps else ""),
            *steps.fields(now, step_seconds),
            *([self.evaluation] if steps.evaluator else []),
            format_bytes(peak_rss_bytes()),
            f"{clock_time(now.seconds)} done, {clock_time(left)} left",
            *([f"{quantity(now.refused, 'step')} refused"] if now.refused else []),
        ]

    def _log(self, metrics: dict[str, float]) -> None:
        self.log.add(step=self.loop_state.step, seconds=self.loop_state.seconds, **metrics)

    def _evaluate(self, steps: Steps, state: TrainState, interval: Interval, signal_state: signals.SignalState) -> None:
        """Evaluates quickly, and lengthens the interval to the next evaluation when this one took too long."""
        begin, loop_state, evaluator = time.perf_counter(), self.loop_state, steps.evaluator
        assert evaluator is not None
        value = evaluator.evaluate(state.trainable, lambda: signal_state.received is not None)
        if value is None:
            return
        first = self.evaluation == "val -"
        self.evaluation = f"val {value:.3f} {evaluator.unit}"
        loop_state.best = value if loop_state.best is None else min(loop_state.best, value)
        self._log({evaluator.key: value})
        self.console.show_live(lambda: self._live_line(steps), important=True)
        if not (self.options.eval_every or first):  # else as often as asked for; the first one also compiled
            least = (time.perf_counter() - begin) / EVALUATION_SHARE
            least = math.ceil(least / self.timer.mean()) if isinstance(interval.length, int) else least
            interval.length = max(interval.length, least)


@contextlib.contextmanager
def _without_free_memory(buffer_bytes: int) -> Iterator[None]:
    """Keeps work between two steps from lying beside a step's freed buffer, or in its place."""
    if buffer_bytes:
        return_freed_memory()
    yield
    if buffer_bytes:
        return_freed_memory()
