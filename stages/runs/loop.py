"""The training loop: steps until the plan is done or a signal comes; logs, evaluates and saves between them."""

import collections
import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from engine.counting.hardware import peak_rss_bytes
from engine.device import Device, return_freed_memory
from engine.errors import UserError
from engine.format import clock_time, duration, format_bytes, quantity
from engine.mesh import processes
from engine.mesh.shape import MeshShape
from engine.storage import checkpoint
from engine.storage.checkpoint import BackgroundSaver
from engine.training.step import TrainState
from stages.cli import signals
from stages.cli.command import explain_error, process_start
from stages.cli.console import Console
from stages.runs.estimate import RunPlan, run_fraction
from stages.runs.folder import JsonLines
from stages.runs.stage import LoopState, Stage
from stages.runs.text_data import Evaluator

if TYPE_CHECKING:  # a run that nobody watches or records does without
    from stages.runs.watch.recorder import Recorder

REFUSED_IN_A_ROW = 10
RECENT = 20  # steps over which speed is averaged
PREDICTS_AFTER = 5.0  # seconds, and as many steps: before that a step's time says little of the run's
EVALUATION_SHARE = 0.04  # of the time at most, unless --eval-every says otherwise
LINE_INTERVAL = 5.0  # seconds between lines that stay on a terminal


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Where and how a run is carried out. `stage`: the command's name; `keep`: checkpoints to keep.

    Intervals are steps (int) or seconds (float). `eval_every` None: a tenth of the run, or more where evaluating takes longer
    than EVALUATION_SHARE of the time. `patience`: evaluations in a row without a best that end the run. `record`: see
    `file_sink`; `watch`: a port.
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
    patience: int | None = None
    mesh: MeshShape | None = None
    record: Path | None = None
    watch: int | None = None
    tensorboard: bool = False

    @property
    def shows_weights(self) -> bool:
        return self.record is not None or self.watch is not None

    def is_over(self, plan: RunPlan, loop_state: LoopState) -> bool:
        out_of_patience = self.patience is not None and loop_state.since_best >= self.patience
        return out_of_patience or plan.progress(loop_state.step, loop_state.seconds) >= 1


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
        return (self.count - 1) / self.warm_seconds if self.count > 1 else None


class Loop:
    def __init__(
        self, stage: Stage, options: RunOptions, loop_state: LoopState, console: Console, recorder: "Recorder | None"
    ) -> None:
        self.stage, self.plan, self.options = stage, stage.plan, options
        self.saver = BackgroundSaver(options.folder, options.keep, stage.frozen_as_loaded)
        self.loop_state, self.console, self.recorder = loop_state, console, recorder
        self.timer, self.log = StepTimer(), JsonLines(options.folder / "metrics.jsonl", loop_state.step)
        self.has_evaluated = False
        self.deferral: signals.Deferral | None = None
        self.stop_code = 0  # the exit code with which a signal, or a line that cannot be written, ends the loop
        self.logged_step = loop_state.step
        saved = json.loads(processes.gather_strings(json.dumps(checkpoint.steps(options.folder)))[0])  # process 0's list
        self.saved_step = max(saved, default=None)
        self.failure: OSError | None = None  # of a line that could not be written, which ends the run once it is saved
        for name in ("line", "log", "evaluate", "save"):  # an older checkpoint's begin with the resumed run
            loop_state.intervals.setdefault(name, (loop_state.step, loop_state.seconds))
        self.last_finite, self.refused_whole = loop_state, False  # before the refused steps that no other follows

    def run(self, state: TrainState) -> tuple[TrainState, int]:
        """Returns the last state, which is saved, and 128 + the signal that ended the loop, or 0.

        Raises UserError, with the run saved, after too many refused updates in a row or when metrics.jsonl cannot be written.
        """
        loop_state, stage, plan = self.loop_state, self.stage, self.plan
        answer = f"Finishing this {plan.step_name}, then saving (once more: stop at once)."
        with signals.defer_signals(answer, self.console.print) as self.deferral, self.saver:
            self._evaluate_and_save(state)  # what a signal prevented
            self._record(state)
            begin = time.perf_counter()
            while not self._is_done() and not self._stopped():
                self.saver.poll()
                if not self.refused_whole:
                    self.last_finite = dataclasses.replace(loop_state)
                progress = plan.progress(loop_state.step + 1, loop_state.seconds + self.timer.mean())
                is_recorded = self.recorder and self.recorder.before_step(state.trainable, loop_state.step + 1, progress)
                if is_recorded:
                    begin = time.perf_counter()
                try:
                    state, refused = stage.step(state, loop_state)
                except UserError as error:  # from a reward, before the state was changed
                    if not loop_state.step:
                        raise
                    self._stop_after_failure(state, error)
                end = time.perf_counter()
                self._count(refused, self._agree_on(end - begin))
                if self.timer.count == 1:  # not before: touching gigabytes would hold up the first step
                    self.saver.reserve(state.trainable, state.opt_state)
                begin = end
                self._report(refused)
                if loop_state.refused_in_a_row >= REFUSED_IN_A_ROW:
                    self._stop_after_refusals(state)
                has_paused = self._evaluate_and_save(state)
                if is_recorded:
                    self._record(state)
                if has_paused or is_recorded:
                    begin = time.perf_counter()
            if self.logged_step != loop_state.step:
                self._log_step()
            if self.failure:
                self._stop_after_failure(state, self.failure)
            if self.saved_step != loop_state.step:
                self.save(state)
            if not self.stop_code:
                self._record(state)
        if not self.stop_code:  # a signal may have come in the last step, or while it was saved
            self._agree_on(0.0)
        return state, self.stop_code

    def _is_done(self) -> bool:
        return self.stage.exhausted or self.options.is_over(self.plan, self.loop_state)

    def _stopped(self) -> bool:
        """Whether the loop ends early; of several processes, once all know of it."""
        if processes.process_count() == 1:
            self.stop_code = self._own_stop_code()
        return bool(self.stop_code)

    def _own_stop_code(self) -> int:
        if self.failure:
            return 141 if isinstance(self.failure, BrokenPipeError) else processes.MISTAKE
        return 128 + self.deferral.received if self.deferral and self.deferral.received else 0

    def _agree_on(self, seconds: float) -> float:
        """Returns process 0's `seconds`, and sets `stop_code` to anyone's, so that all decide alike."""
        rows = processes.gather_numbers(seconds, self._own_stop_code())
        self.stop_code = int(max(code for _, code in rows))
        return rows[0][0]

    def _count(self, refused: list[bool], seconds: float) -> None:
        loop_state = self.loop_state
        loop_state.step += 1
        loop_state.seconds += seconds
        self.timer.add(seconds)
        if loop_state.first_step_seconds is None:
            loop_state.first_step_seconds = time.perf_counter() - process_start()
        for update_refused in refused:
            loop_state.refused += update_refused
            loop_state.refused_in_a_row = loop_state.refused_in_a_row + 1 if update_refused else 0
        if any(refused):
            loop_state.refused_batch = loop_state.step - 1
        self.refused_whole = bool(refused) and all(refused)

    # Log

    def _report(self, refused: list[bool]) -> None:
        loop_state, timer = self.loop_state, self.timer
        if loop_state.predicted is None and min(timer.warm_seconds, timer.count) > PREDICTS_AFTER:
            self._predict()
        is_due = loop_state.is_due("line", LINE_INTERVAL) or timer.count == 1 or self._is_done()
        important = self.stage.lines_stay and is_due
        if important:
            loop_state.begin("line")
        self._show(important)
        if any(refused):
            self._log({"refused_batch": loop_state.refused_batch})
        if loop_state.is_due("log", self.options.log_every):
            loop_state.begin("log")
            self._log_step()

    def _predict(self) -> None:
        now, step_seconds = self.loop_state, 1 / (self.timer.warm_rate() or 1)
        left = self.plan.seconds_left(now.step, now.seconds, step_seconds)
        now.predicted = now.step + round(left / step_seconds), now.seconds + left
        predicted = f"{quantity(now.predicted[0], self.plan.step_name)} in {duration(now.predicted[1])}"
        with self._noting_failure():
            self.console.print_rows([("predicted", f"{predicted}, as the first {now.step:,} went")])

    def _show(self, important: bool) -> None:
        with self._noting_failure():
            self.console.show_live(self._live_line, important)

    def _live_line(self) -> list[str]:
        plan, now, step_seconds, evaluator = self.plan, self.loop_state, self.timer.mean(), self.stage.evaluator
        left = plan.seconds_left(now.step, now.seconds, step_seconds)
        validation = "val -" if now.validation is None or not evaluator else f"val {now.validation:.3f} {evaluator.unit}"
        return [
            f"{plan.step_name} {now.step:,}" + (f"/{plan.steps:,}" if plan.steps else ""),
            *self.stage.fields(now, step_seconds),
            *([validation] if evaluator else []),
            format_bytes(peak_rss_bytes()),
            f"{clock_time(now.seconds)} done, {clock_time(left)} left",
            *([f"{quantity(now.refused, 'step')} refused, last batch {now.refused_batch}"] if now.refused else []),
        ]

    def _log_step(self) -> None:
        self.logged_step = self.loop_state.step
        self._log(self.stage.metrics(self.loop_state, self.timer.mean()))

    def _log(self, metrics: dict[str, Any], event: str = "step") -> None:
        fields = {"step": self.loop_state.step, "seconds": self.loop_state.seconds, **metrics}
        with self._noting_failure():
            self.log.add(**fields)
        if self.recorder:
            self.recorder.event(event, **fields)

    def _record(self, state: TrainState) -> None:
        if not (self.recorder and self.recorder.wants_frame(self.loop_state.step)):
            return
        with _returning_freed_memory(self.stage.buffer_bytes):
            self.recorder.frame(state.trainable, self.loop_state.step, self.loop_state.seconds, self.stage.trained_batch)

    # Evaluate, save

    def _evaluate_and_save(self, state: TrainState) -> bool:
        """Evaluates and saves, where due, and evaluates at the end. Returns whether it did either."""
        loop_state = self.loop_state
        # Refused steps leave nothing to save, a best neither: a stop that they bring about begins again before them.
        finite, is_done, evaluator = not loop_state.refused_in_a_row, self._is_done(), self.stage.evaluator
        evaluates = finite and evaluator and (is_done or loop_state.is_due("evaluate", self._evaluation_interval()))
        if evaluator and evaluates:
            with _returning_freed_memory(self.stage.buffer_bytes):
                self._evaluate(evaluator, state, is_done)
        saves = finite and (loop_state.is_due("save", self.options.save_every) or loop_state.best_step == loop_state.step)
        if saves:
            loop_state.begin("save")
        is_saved = self.saved_step == loop_state.step  # perhaps by a stop before the restart, without this evaluation
        unsaved = evaluates if is_saved else saves
        if unsaved:
            self.save(state)
        return bool(evaluates or saves)

    def _evaluation_interval(self) -> int | float:
        loop_state, plan = self.loop_state, self.plan
        if self.options.eval_every:
            return self.options.eval_every
        length, least = run_fraction(10, plan.steps, plan.seconds), loop_state.evaluation_seconds / EVALUATION_SHARE
        if isinstance(length, int) and least:
            least = math.ceil(least / max(loop_state.seconds / loop_state.step, 1e-9))
        return max(length, least)

    def _evaluate(self, evaluator: Evaluator, state: TrainState, is_done: bool) -> None:
        """Evaluates; a signal in between leaves it due, unless the run is done, which is not resumed."""
        begin, loop_state = time.perf_counter(), self.loop_state
        with self.console.task("evaluating") as report:
            value = evaluator.evaluate(state.trainable, report, lambda: not is_done and self._stopped())
        if value is None:
            return
        loop_state.begin("evaluate")
        loop_state.validation = value if math.isfinite(value) else None  # JSON has no other
        loop_state.since_best += 1
        if math.isfinite(value) and (loop_state.best is None or value < loop_state.best):
            loop_state.best, loop_state.best_step, loop_state.since_best = value, loop_state.step, 0
        if self.has_evaluated:  # the first one also compiled
            seconds = processes.gather_numbers(time.perf_counter() - begin)[0][0]
            loop_state.evaluation_seconds = max(loop_state.evaluation_seconds, seconds)
        self.has_evaluated = True
        self._log({evaluator.key: value}, "validation")
        self._show(important=True)

    def save(self, state: TrainState) -> None:
        """Saves beside the steps that follow; `saver.wait` waits until it is on the disk."""
        loop_state = self.loop_state
        record = dataclasses.asdict(loop_state)
        self.saver.save(loop_state.step, state.trainable, state.opt_state, record, loop_state.best_step)
        self.saved_step = loop_state.step

    # Ends that nobody wants

    def _stop_after_refusals(self, state: TrainState) -> None:
        """Raises UserError, with the run saved as it was before the refused steps, which will run again."""
        saved, stopped, step_name = self.last_finite, self.loop_state, self.plan.step_name
        refused = f"{stopped.refused_in_a_row} updates in a row, up to {step_name} {stopped.step:,},"  # several a round
        self.loop_state = saved
        if self.saved_step is None or self.saved_step < saved.step:
            self.save(state)
        self.saver.wait()
        where = ""
        if step_name == "step":
            first, last = saved.step - saved.refused_in_a_row, stopped.step - 1
            refused, where = f"{REFUSED_IN_A_ROW} steps in a row", f", in batches {first} to {last} of the data,"
        raise UserError(
            f"{refused} had a loss or gradient that is not a number{where} and changed no weight; the run is saved at "
            f"{step_name} {self.saved_step:,} in {self.options.folder}. Lower {self.stage.advice}."
        )

    @contextlib.contextmanager
    def _noting_failure(self) -> Iterator[None]:
        """Has the run end, saved, when a line cannot be written: the other processes must hear of it."""
        try:
            yield
        except OSError as error:
            self.failure = self.failure or error

    def _stop_after_failure(self, state: TrainState, error: OSError | UserError) -> NoReturn:
        """Saves, then raises the error."""
        at = f"{self.plan.step_name} {self.loop_state.step:,}"
        try:
            if self.saved_step != self.loop_state.step:
                self.save(state)
            self.saver.wait()
        except UserError as failure:
            raise UserError(f"{explain_error(error)} {at} could not be saved either: {failure}") from error
        if isinstance(error, BrokenPipeError):
            raise error
        raise UserError(f"{explain_error(error)} The run was saved at {at} before it ended.") from error


@contextlib.contextmanager
def _returning_freed_memory(buffer_bytes: int) -> Iterator[None]:
    """Keeps work between two steps from lying beside a step's freed buffer, or in its place."""
    if buffer_bytes:
        return_freed_memory()
    yield
    if buffer_bytes:
        return_freed_memory()
