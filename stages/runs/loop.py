"""The loop of a run: `run_steps` takes a step, then does what is due of log, evaluate, save, record."""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from engine.allocator import return_freed_memory
from engine.errors import UserError
from engine.mesh import processes
from engine.storage import checkpoint
from engine.storage.adapter import SavedAdapter
from engine.storage.checkpoint import BackgroundSaver
from engine.training.step import TrainState
from stages.cli import signals
from stages.cli.command import explain_error, process_start
from stages.cli.console import Console
from stages.runs.goodput import Starts
from stages.runs.options import RunOptions
from stages.runs.plan import RunPlan, run_fraction
from stages.runs.progress import ProgressLog
from stages.runs.stage import LoopState, Prepared, StepResult, Steps
from stages.runs.stop import Stop
from stages.runs.text_evaluators import Evaluator

if TYPE_CHECKING:  # a run that nobody watches or records does without
    from stages.runs.watch.recorder import Recorder

REFUSED_IN_A_ROW = 10
EVALUATION_SHARE = 0.04  # of the time at most, unless --eval-every says otherwise


class LoopEnd(NamedTuple):
    """How a loop ended. Its last state is saved."""

    state: TrainState
    stop_code: int = 0  # 128 + the signal that ended it, or 0
    warm_rate: float | None = None  # steps a second after the first, if there were any
    busy_note: str = ""  # how busy others kept this machine, if they did
    starts: Starts | None = None  # the run's, if this one took steps


@dataclasses.dataclass(frozen=True)
class Loop:
    """What a loop works with. `loop_state`, the log, the checkpoints and `stop` change with its
    steps."""

    options: RunOptions
    plan: RunPlan
    steps: Steps
    console: Console
    recorder: "Recorder | None"
    loop_state: LoopState
    stop: Stop
    log: ProgressLog
    checkpoints: "Checkpoints"
    starts: Starts

    def is_done(self) -> bool:
        return self.steps.is_exhausted(self.loop_state) or self.options.is_over(self.plan, self.loop_state)


def run_steps(
    options: RunOptions,
    prepared: Prepared,
    steps: Steps,
    state: TrainState,
    loop_state: LoopState,
    console: Console,
    recorder: "Recorder | None",
) -> LoopEnd:
    """Takes steps until the plan is done or a signal comes, and saves the last state. Changes
    `loop_state`.

    Raises UserError, with the run saved, after too many refused updates in a row or when
    metrics.jsonl cannot be written.
    """
    plan = prepared.plan
    checkpoints = Checkpoints(options, prepared.frozen_as_loaded, prepared.adapted)
    starts = Starts(options.folder, loop_state.seconds, is_new=loop_state.step == 0)
    loop_state.begin_intervals()
    answer = f"Finishing this {plan.step_name}, then saving (once more: stop at once)."
    with signals.defer_signals(answer, console.print) as deferral, checkpoints.saver:
        stop = Stop(deferral)
        log = ProgressLog(options, plan, steps, console, recorder, stop, loop_state)
        loop = Loop(options, plan, steps, console, recorder, loop_state, stop, log, checkpoints, starts)
        result = StepResult(state, refused=[])
        evaluate_and_save(loop, state)  # what a signal prevented
        record(loop, result)
        before_refusals = dataclasses.replace(loop_state)  # before the steps that are refused in a row now
        # A step's time, from `begin` to `end`, has the reports and log lines of the step before in it.
        # It has no evaluation, saving or recording: after any of these `begin` is set anew.
        begin = time.perf_counter()
        while not loop.is_done() and not stop.poll():
            checkpoints.saver.poll()
            progress = plan.progress(loop_state.step + 1, loop_state.seconds + log.timer.mean())
            is_recorded = recorder is not None and recorder.before_step(
                state.trainable, loop_state.step + 1, progress
            )
            if is_recorded:
                begin = time.perf_counter()
            result = take_step(loop, state)
            state = result.state
            end = time.perf_counter()
            step_seconds = stop.exchange(end - begin)
            count_step(loop, result, step_seconds)
            begin = end
            log.report_step(result, loop.is_done())
            if loop_state.refused_in_a_row >= REFUSED_IN_A_ROW:
                stop_after_refusals(loop, state, before_refusals, prepared.advice)
            has_paused = evaluate_and_save(loop, state)
            if is_recorded and progress < 1:  # else it may be the last, which is recorded below
                record(loop, result)
            if has_paused or is_recorded:
                begin = time.perf_counter()
            if not result.is_refused_whole():
                before_refusals = dataclasses.replace(loop_state)
        if log.logged_step != loop_state.step:
            log.write_step()
        if stop.failure:
            stop_after_failure(loop, state, stop.failure)
        if checkpoints.step != loop_state.step:
            save(loop, state)
        if not stop.code:
            record(loop, result)
        closing = time.perf_counter()
    starts.current.saving += time.perf_counter() - closing
    starts.write()
    if not stop.code:  # a signal may have come in the last step, or while it was saved
        stop.exchange(0.0)
    return LoopEnd(state, stop.code, log.timer.warm_rate(), log.busy_note(), starts)


# A step


def take_step(loop: Loop, state: TrainState) -> StepResult:
    try:
        return loop.steps.step(state, loop.loop_state)
    except UserError as error:  # from a reward, before the state was changed
        if not loop.loop_state.step:
            raise
        stop_after_failure(loop, state, error)


def count_step(loop: Loop, result: StepResult, seconds: float) -> None:
    loop_state = loop.loop_state
    loop_state.step += 1
    loop_state.seconds += seconds
    loop.log.timer.add(seconds)
    loop.starts.current.trained += seconds
    if loop.log.timer.count == 1:
        loop.starts.current.starting = time.perf_counter() - process_start() - seconds
    if loop_state.first_step_seconds is None:
        loop_state.first_step_seconds = time.perf_counter() - process_start()
    for is_refused in result.refused:
        if is_refused:
            loop_state.refused += 1
            loop_state.refused_in_a_row += 1
        else:
            loop_state.refused_in_a_row = 0
    if any(result.refused):
        loop_state.refused_batch = loop_state.step - 1
    if result.stage_state is not None:
        loop_state.stage_state = result.stage_state
    if result.reward is not None and not loop_state.refused_in_a_row:
        loop_state.note_reward(result.reward)
    if loop.log.timer.count == 1:  # not before: touching gigabytes would hold up the first step
        loop.checkpoints.saver.reserve(result.state.trainable, result.state.opt_state)


# Evaluate, save, record


def evaluate_and_save(loop: Loop, state: TrainState) -> bool:
    """Evaluates and saves, where due, and evaluates at the end. Returns whether either was due.

    Refused steps leave nothing to save, a best neither: a stop that they bring about begins again
    before them.
    """
    if loop.loop_state.refused_in_a_row:
        return False
    evaluator = loop.steps.evaluator
    is_done = loop.is_done()
    evaluates = evaluator is not None and (
        is_done or is_evaluation_due(loop.options, loop.plan, loop.loop_state)
    )
    if evaluator and evaluates:
        with _returning_freed_memory(loop.steps.buffer_bytes):
            evaluate(loop, evaluator, state, is_done)
    saves = save_if_due(loop, state, evaluates)
    return evaluates or saves


def save_if_due(loop: Loop, state: TrainState, has_evaluated: bool) -> bool:
    """Saves where that is due. Returns whether it was."""
    loop_state = loop.loop_state
    is_due = loop_state.is_due("save", loop.options.save_every) or loop_state.best_step == loop_state.step
    if is_due:
        loop_state.begin("save")
    is_on_disk = loop.checkpoints.step == loop_state.step  # perhaps by a stop before the restart
    is_new = is_due and not is_on_disk
    lacks_evaluation = is_on_disk and has_evaluated
    if is_new or lacks_evaluation:
        save(loop, state)
    return is_due


def save(loop: Loop, state: TrainState) -> None:
    """Begins to save, beside the steps that follow, and counts what these have waited for."""
    begin = time.perf_counter()
    loop.checkpoints.save(state, loop.loop_state)
    loop.starts.current.saving += time.perf_counter() - begin
    loop.starts.write()


def evaluate(loop: Loop, evaluator: Evaluator, state: TrainState, is_done: bool) -> None:
    """Evaluates; a signal in between leaves it due, unless the run is done, which is not resumed."""
    loop_state = loop.loop_state
    begin = time.perf_counter()

    def stopped() -> bool:
        return not is_done and loop.stop.poll()

    with loop.console.task("evaluating") as report:
        value = evaluator.evaluate(state.trainable, report, stopped)
    loop.starts.current.evaluating += time.perf_counter() - begin
    if value is None:
        return
    loop_state.begin("evaluate")
    loop_state.note_validation(value)
    if loop.log.validations:  # the first one also compiled
        seconds = processes.gather_numbers(time.perf_counter() - begin)[0][0]
        loop_state.evaluation_seconds = max(loop_state.evaluation_seconds, seconds)
    loop.log.report_validation({evaluator.key: value})


def is_evaluation_due(options: RunOptions, plan: RunPlan, loop_state: LoopState) -> bool:
    if options.eval_every:
        return loop_state.is_due("evaluate", options.eval_every)
    if not options.evaluations:
        return loop_state.is_due("evaluate", evaluation_interval(plan, loop_state))
    last_progress = plan.progress(*loop_state.intervals["evaluate"])
    share = plan.progress(loop_state.step, loop_state.seconds) - last_progress
    # A fifth of five steps is not less than a fifth, whatever its rounding.
    return share >= 1 / options.evaluations - 1e-9


def evaluation_interval(plan: RunPlan, loop_state: LoopState) -> int | float:
    """Returns a tenth of the run, or what leaves evaluations EVALUATION_SHARE of the time: steps
    (int) or seconds (float)."""
    length = run_fraction(10, plan.steps, plan.seconds)
    least_seconds = loop_state.evaluation_seconds / EVALUATION_SHARE
    if isinstance(length, int) and least_seconds:
        step_seconds = max(loop_state.seconds / loop_state.step, 1e-9)
        return max(length, math.ceil(least_seconds / step_seconds))
    return max(length, least_seconds)


class Checkpoints:
    """Saves a run's checkpoints beside the steps that follow. `step`: of the newest one, perhaps of
    an earlier start."""

    def __init__(self, options: RunOptions, frozen: Any, adapted: SavedAdapter | None) -> None:
        self.saver = BackgroundSaver(options.folder, options.keep, frozen, adapted)
        lists = processes.gather_strings(json.dumps(checkpoint.steps(options.folder)))
        saved = json.loads(lists[0])  # process 0's, for all of them
        self.step: int | None = max(saved, default=None)

    def save(self, state: TrainState, loop_state: LoopState) -> None:
        """Begins to save; `saver.wait` waits until it is on the disk."""
        record = loop_state.to_json()
        self.saver.save(loop_state.step, state.trainable, state.opt_state, record, loop_state.best_step)
        self.step = loop_state.step


def record(loop: Loop, result: StepResult) -> None:
    loop_state = loop.loop_state
    if loop.recorder is None or not loop.recorder.wants_frame(loop_state.step):
        return
    with _returning_freed_memory(loop.steps.buffer_bytes):
        loop.recorder.frame(result.state.trainable, loop_state.step, loop_state.seconds, result.trained_batch)


@contextlib.contextmanager
def _returning_freed_memory(buffer_bytes: int) -> Iterator[None]:
    """Keeps work between two steps from lying beside a step's freed buffer, or in its place."""
    if buffer_bytes:
        return_freed_memory()
    yield
    if buffer_bytes:
        return_freed_memory()


# Ends that nobody wants


def stop_after_refusals(loop: Loop, state: TrainState, before_refusals: LoopState, advice: str) -> NoReturn:
    """Raises UserError, with the run saved as it was before the refused steps, which will run
    again."""
    stopped = loop.loop_state
    step_name = loop.plan.step_name
    if loop.checkpoints.step is None or loop.checkpoints.step < before_refusals.step:
        loop.checkpoints.save(state, before_refusals)
    loop.checkpoints.saver.wait()
    if step_name == "step":
        # Some of the steps in a row may be from before a restart: a stop among them saves their count.
        first = before_refusals.step - before_refusals.refused_in_a_row
        refused = f"{REFUSED_IN_A_ROW} steps in a row"
        where = f", in batches {first} to {stopped.step - 1} of the data,"
    else:  # several updates a round
        refused = f"{stopped.refused_in_a_row} updates in a row, up to {step_name} {stopped.step:,},"
        where = ""
    raise UserError(
        f"{refused} had a loss or gradient that is not a number{where} and changed no weight; "
        f"the run is saved at {step_name} {loop.checkpoints.step:,} in {loop.options.folder}. Lower {advice}."
    )


def stop_after_failure(loop: Loop, state: TrainState, error: OSError | UserError) -> NoReturn:
    at = f"{loop.plan.step_name} {loop.loop_state.step:,}"
    try:
        if loop.checkpoints.step != loop.loop_state.step:
            loop.checkpoints.save(state, loop.loop_state)
        loop.checkpoints.saver.wait()
    except UserError as failure:
        raise UserError(f"{explain_error(error)} {at} could not be saved either: {failure}") from error
    if isinstance(error, BrokenPipeError):
        raise error
    raise UserError(f"{explain_error(error)} The run was saved at {at} before it ended.") from error
