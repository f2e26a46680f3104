"""The training loop: one step in flight, the next batch cut meanwhile, all else outside the training time."""

import collections
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from engine import format as words
from engine.allocator import has_room, return_freed_memory
from engine.counting.hardware import peak_rss_bytes
from engine.errors import UserError
from engine.storage import checkpoint
from engine.training.optimizer import make_schedule
from engine.training.step import TrainState
from stages.cli import signals
from stages.cli.console import Console
from stages.runs.estimate import Plan
from stages.runs.folder import MetricsLog

REFUSED_IN_A_ROW = 10
RECENT = 20  # steps over which speed is averaged
EVALUATING = 0.04  # of the time at most, unless --eval-every says otherwise


@dataclasses.dataclass
class LoopState:
    """What a run remembers from one part to the next, beside weights and optimizer: state.json."""

    step: int = 0
    seconds: float = 0.0  # of training: without compiling, evaluating and saving
    refused: int = 0
    best: float | None = None  # quick bits per byte
    first_step_seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Intervals:
    """How often things are done: int is steps, float is seconds."""

    evaluate: int | float | None
    save: int | float
    log: int
    keep: int


class Source(Protocol):
    """Where batches come from, by random access."""

    def at(self, step: int) -> Any: ...
    def epoch(self, step: int) -> float: ...


class Evaluator(Protocol):
    """A quick evaluation while training: its number, and what that is called on screen and in metrics.jsonl."""

    @property
    def unit(self) -> str: ...
    @property
    def key(self) -> str: ...
    def measure(self, cfg: Any, trainable: Any, watch: Any = None) -> float | None: ...


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """All that a loop needs and does not change."""

    plan: Plan
    folder: Path
    batches: Source
    quick: Evaluator
    often: Intervals
    ceiling: float  # FLOP/s
    started: float  # the clock when the process began
    facts: dict[str, Any]  # what goes into state.json beside LoopState
    kept: Callable[[Any], Any] = lambda trainable: trainable  # what a checkpoint holds of what learns
    buffer: int = 0  # bytes a step takes while it runs, where they must not be held twice; 0 where that does not matter


class Interval:
    """Whether it is time again, in steps or in seconds of training."""

    def __init__(self, interval: int | float, past: LoopState) -> None:
        self.interval = interval
        self.step, self.seconds = past.step, past.seconds

    def now(self, past: LoopState) -> bool:
        counted = isinstance(self.interval, int)
        due = past.step - self.step >= self.interval if counted else past.seconds - self.seconds >= self.interval
        if due:
            self.step, self.seconds = past.step, past.seconds
        return due


class Loop:
    """One part of a run, from where it stands to its end or to a signal."""

    def __init__(self, job: LoopConfig, past: LoopState, console: Console) -> None:
        self.job, self.past, self.console = job, past, console
        self.recent: collections.deque[float] = collections.deque(maxlen=RECENT)
        self.schedule = jax.jit(make_schedule(job.plan.recipe.optimizer))
        self.val: float | None = None
        self.warm_steps, self.warm_seconds = 0, 0.0  # without the first, which touches its memory for the first time
        self.loss = self.grad_norm = float("nan")
        self.in_a_row = 0
        self.begun = past.step
        self.log = MetricsLog(job.folder, past.step)

    def run(self, step_program: Callable[..., Any], state: TrainState) -> tuple[TrainState, int | None]:
        """Trains to the end of the plan, or until a signal. -> the last state, saved, and the signal's number if any.

        Raises UserError after too many refused steps in a row; the last checkpoint then stays as it is.
        """
        past, plan = self.past, self.job.plan
        often = self.job.often
        save, log = Interval(often.save, past), Interval(often.log, past)
        evaluate = Interval(often.evaluate or self._first_evaluation(), past)
        saved = past.step
        losses: list[float] = []
        answer = "Finishing this step, then saving (once more: stop at once)."
        with signals.deferred(answer, self.console.print) as watch:
            batch = self.job.batches.at(past.step)
            begin = time.perf_counter()
            try:
                while plan.done(past.step, past.seconds) < 1 and not watch.received:
                    progress = np.float32(plan.done(past.step, past.seconds))
                    # While a step runs its buffer is the last thing in memory: what is made then lies behind it, and stays.
                    following = self.job.batches.at(past.step + 1) if self.job.buffer else None
                    state, metrics = step_program(state, {}, batch, progress)
                    batch = following or self.job.batches.at(past.step + 1)
                    # Waited for before the next is dispatched: two steps in flight would take twice the memory.
                    metrics = jax.device_get(metrics)
                    end = time.perf_counter()
                    self._count(metrics, end - begin)
                    if self.job.buffer and not has_room(self.job.buffer):
                        return_freed_memory()  # or the next step's buffer would lie beside this one's
                    begin = end
                    losses.append(self.loss)
                    self.console.show_live(self.fields)
                    if log.now(past):
                        self._log(losses)
                        losses = []
                    if evaluate.now(past) and plan.done(past.step, past.seconds) < 1:
                        with self._aside():
                            evaluate.interval = self._evaluate(state, evaluate.interval, watch)
                        begin = time.perf_counter()
                    if save.now(past):
                        with self._aside():
                            self.save(state)
                        saved = past.step
                        begin = time.perf_counter()
            except BrokenPipeError:
                self.save(state)  # nobody reads on, but nothing is lost
                raise
            if losses:
                self._log(losses)
            if saved != past.step:
                self.save(state)
            return state, watch.received

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """Other work between two steps: where memory matters, not beside a step's freed buffer, nor left in its place."""
        if self.job.buffer:
            return_freed_memory()
        yield
        if self.job.buffer:
            return_freed_memory()

    def save(self, state: TrainState) -> Path:
        """A checkpoint of now."""
        record = dataclasses.asdict(self.past) | self.job.facts
        keep = self.job.often.keep
        kept = self.job.kept(state.trainable)
        return checkpoint.save(self.job.folder, self.past.step, kept, state.opt_state, record, keep=keep)

    def _count(self, metrics: Any, seconds: float) -> None:
        past = self.past
        past.step += 1
        past.seconds += seconds
        if past.step - self.begun == 2:
            self.recent.clear()
        if past.step - self.begun > 1:
            self.warm_steps, self.warm_seconds = self.warm_steps + 1, self.warm_seconds + seconds
        self.recent.append(seconds)
        self.loss, self.grad_norm = float(metrics.loss), float(metrics.grad_norm)
        if past.first_step_seconds is None:
            past.first_step_seconds = time.perf_counter() - self.job.started
        if not metrics.refused:
            self.in_a_row = 0
            return
        past.refused += 1
        self.in_a_row += 1
        if self.in_a_row >= REFUSED_IN_A_ROW:
            there = checkpoint.steps(self.job.folder)
            kept = f"the checkpoint of step {there[-1]} is as it was" if there else "nothing had been saved yet"
            raise UserError(
                f"{self.in_a_row} steps in a row had a loss or gradient that is not a number; {kept}. Lower "
                "--learning-rate or --matrix-learning-rate, warm up longer with --warmup, or try --dtype float32."
            )

    def _log(self, losses: list[float]) -> None:
        past = self.past
        self.log.add(
            step=past.step, seconds=past.seconds, loss=sum(losses) / len(losses), grad_norm=self.grad_norm,
            learning_rate_factor=self.factor(), tokens_per_second=self.speed(), refused=past.refused,
        )  # fmt: skip

    def _first_evaluation(self) -> int | float:
        """A tenth of the run."""
        plan = self.job.plan
        return plan.seconds / 10 if plan.seconds else max(1, (plan.steps or 10) // 10)

    def _evaluate(self, state: TrainState, interval: int | float, watch: signals.SignalState) -> int | float:
        """The quick evaluation. Returns the interval to the next, longer than before when this one took too long."""
        begin = time.perf_counter()
        value = self.job.quick.measure(self.job.plan.cfg, state.trainable, watch)
        if value is None:
            return interval
        first, self.val = self.val is None, value
        past = self.past
        past.best = value if past.best is None else min(past.best, value)
        self.log.add(step=past.step, seconds=past.seconds, **{self.job.quick.key: value})
        self.console.show_live(self.fields, important=True)
        taken = time.perf_counter() - begin
        if self.job.often.evaluate or first:  # as often as asked for; the first one also compiled
            return interval
        least = taken / EVALUATING
        return max(interval, math.ceil(least / self.mean()) if isinstance(interval, int) else least)

    def mean(self) -> float:
        """Seconds of a step, of late."""
        return sum(self.recent) / max(len(self.recent), 1)

    def speed(self) -> float:
        """Tokens a second, of late."""
        return self.job.plan.step_tokens / max(self.mean(), 1e-9)

    def share(self) -> float | None:
        """The share of the ceiling over all steps of this part but its first; None before there are any."""
        if not self.warm_steps:
            return None
        return self.warm_steps * self.job.plan.step_flops / self.warm_seconds / self.job.ceiling

    def mfu(self) -> float:
        """The share of the ceiling, of late."""
        return self.job.plan.step_flops / max(self.mean(), 1e-9) / self.job.ceiling

    def factor(self) -> float:
        """On the learning rate, at this point of the schedule."""
        return float(self.schedule(np.float32(self.job.plan.done(self.past.step, self.past.seconds))))

    def left(self) -> float:
        """Seconds of training to come."""
        plan, past = self.job.plan, self.past
        ends = [plan.seconds - past.seconds] if plan.seconds else []
        ends += [(plan.steps - past.step) * self.mean()] if plan.steps else []
        return min(ends)

    def fields(self) -> list[str]:
        """The live line."""
        past, plan = self.past, self.job.plan
        epoch = self.job.batches.epoch(past.step)
        shown = [
            f"step {past.step:,}" + (f"/{plan.steps:,}" if plan.steps else ""),
            f"loss {self.loss:.3f}",
            f"val {self.val:.3f} {self.job.quick.unit}" if self.val is not None else "val -",
            f"lr {self.factor():.0%}",
            f"grad {self.grad_norm:.2f}",
            f"{self.speed():,.0f} tokens/s",
            f"MFU {self.mfu():.0%}",
            words.size(peak_rss_bytes()),
            f"epoch {epoch:.2f}" if epoch < 10 else f"epoch {epoch:,.0f}",
            f"{words.clock(past.seconds)} done, {words.clock(self.left())} left",
        ]
        return [*shown, f"{past.refused} steps refused"] if past.refused else shown
