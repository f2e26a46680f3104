"""Carries out a training run: locks its folder, starts or resumes it, takes its steps, and prints a summary.

The loop steps until the plan is done or a signal comes; logs, evaluates and saves between steps.
"""

import collections
import contextlib
import dataclasses
import gc
import json
import math
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import jax

from engine.counting.hardware import peak_rss_bytes
from engine.device import CoreTime, Device, core_time, return_freed_memory
from engine.errors import UserError
from engine.files import write_json
from engine.format import clock_time, duration, format_bytes, quantity
from engine.mesh import processes
from engine.mesh.layout import init_sharded
from engine.mesh.shape import MeshShape
from engine.model.attention import attention_path
from engine.model.native.library import native_problem
from engine.storage import checkpoint
from engine.storage.checkpoint import BackgroundSaver
from engine.text.batch import ORDER_VERSION
from engine.text.tokenizer import save_tokenizer
from engine.training.step import TrainState
from stages.cli import signals
from stages.cli.command import command_line, explain_error, process_start, resume_command
from stages.cli.console import Console
from stages.runs.flags import FolderFlags
from stages.runs.folder import RUN_FILES, JsonLines, clear_run, holds_run, lock_run, replace_nonfinite, updating
from stages.runs.plan import RunPlan, run_fraction
from stages.runs.stage import LoopState, RunReport, Stage
from stages.runs.text_data import Evaluator

if TYPE_CHECKING:  # a run that nobody watches or records does without
    from stages.runs.watch.recorder import Recorder

REFUSED_IN_A_ROW = 10
RECENT = 20  # steps over which speed is averaged
PREDICTS_AFTER = 5.0  # seconds, and as many steps: before that a step's time says little of the run's
EVALUATION_SHARE = 0.04  # of the time at most, unless --eval-every says otherwise
LINE_INTERVAL = 5.0  # seconds between lines that stay on a terminal
BUSY = 0.1  # share of the cores that others take, above which a run says so


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions(FolderFlags):
    """Where and how a run is carried out. `stage`: the command's name.

    Intervals are steps (int) or seconds (float). `eval_every` None: by `evaluations`, evenly over the run, or without these a
    tenth of the run, or more where evaluating takes longer than EVALUATION_SHARE of the time. `patience`: evaluations in a
    row without a best that end the run.
    """

    stage: str
    device: Device
    folder: Path
    dry_run: bool
    eval_every: int | float | None = None
    evaluations: int | None = None
    patience: int | None = None
    mesh: MeshShape | None = None

    @property
    def shows_weights(self) -> bool:
        return self.record is not None or self.watch is not None

    def is_over(self, plan: RunPlan, loop_state: LoopState) -> bool:
        out_of_patience = self.patience is not None and loop_state.since_best >= self.patience
        return out_of_patience or plan.progress(loop_state.step, loop_state.seconds) >= 1


def execute(options: RunOptions, make_stage: Callable[[Console], Stage]) -> int:
    """Carries out a run, or resumes the one in the folder. Returns 0, or 128 + the signal that stopped it."""
    if options.shows_weights and options.mesh and options.mesh.devices > 1:
        raise UserError(f"--record and --watch take a run on one device, and this one lies on {options.mesh.devices}.")
    own = [(options.folder / name).resolve() for name in RUN_FILES]
    if options.record and any(options.record.resolve().is_relative_to(path) for path in own):
        raise UserError(f"{options.record} is for what the run itself writes. Give another file with --record.")
    if not gc.get_freeze_count():  # what was imported stays: garbage is looked for among what runs make, in a sixth of the time
        gc.freeze()
    with Console() as console, contextlib.ExitStack() as stack:
        processes.refuse_differences({"--dry-run": str(options.dry_run)})  # the others would wait for one that only plans
        if options.dry_run:  # plans for devices that need not be here
            _print_plan(options, make_stage(console), console)
            console.print("A dry run: nothing was trained.")
            return 0
        mesh = recorder = None
        if options.mesh:
            from stages.runs.mesh import device_with_mesh, make_mesh_here

            mesh = make_mesh_here(options.mesh)
            options = dataclasses.replace(options, device=device_with_mesh(options.device, options.mesh))
        holds_run(options.folder)  # raises for an unusable folder, before minutes of preparation
        if processes.is_first():
            stack.enter_context(lock_run(options.folder))
        if options.shows_weights or options.tensorboard:
            from stages.runs.watch.recorder import open_recorder

            files = options.record, options.folder / "tensorboard" if options.tensorboard else None
            recorder = stack.enter_context(open_recorder(*files, options.watch, console))
        processes.refuse_unshared(options.folder)
        with processes.process_0_first():
            stage = make_stage(console)
            stage.load_weights()
        if mesh:
            stack.enter_context(jax.set_mesh(mesh))
        return _execute(options, stage, console, recorder)


def _execute(options: RunOptions, stage: Stage, console: Console, recorder: "Recorder | None") -> int:
    folder, plan, resume = options.folder, stage.plan, resume_command(options.stage)
    metadata = run_metadata(options, plan, stage.metadata)
    stage.place()

    # Find the run to resume, if there is one.
    previous = None
    if holds_run(folder) and not options.overwrite:
        from stages.runs import previous_run  # which a new run does without

        previous = previous_run.find_previous_run(folder, metadata, plan.cfg)
    if processes.process_count() > 1:
        from stages.runs.mesh import refuse_different_runs

        shared = {name: str(getattr(options, name)) for name in ("save_every", "eval_every", "log_every", "keep", "mesh")}
        refuse_different_runs(metadata, plan.cfg, shared, previous.loop_state.step if previous else 0)
    _print_plan(options, stage, console)
    if previous and previous.is_finished(options.is_over(plan, previous.loop_state)):
        previous_run.print_finished(previous, plan, console)
        if options.record:
            console.print(f"Nothing was recorded in {options.record}: no step was left.")
        return 0
    if options.record:
        from stages.runs.watch.recorder import refuse_other_file

        step = previous.loop_state.step if previous else 0
        refuse_other_file(options.record, step, stage=options.stage, name=plan.name, folder=str(folder))
    if previous:
        previous_run.refuse_other_order(folder, previous.record)

    # Begin, or go on.
    stage.begin_compiling(beside_reading=previous is not None)
    if previous:
        state, loop_state = previous_run.resume(previous, stage, metadata, console)
    else:
        with console.task("initialising"):
            state, loop_state = init_sharded(stage.initial_state, stage.trainable), LoopState()
        if processes.is_first():
            clear_run(folder)
    if processes.is_first():
        with updating(folder):
            write_json(folder / "run.json", metadata)  # first: a folder with files and without it is taken for someone else's
            save_tokenizer(folder / "tokenizer", stage.tokenizer, stage.stop_token_ids, stage.sampling)
            write_json(folder / "config.json", plan.cfg.to_json())
    before = stage.measure(stage.trainable)

    # Train.
    loop = Loop(stage, options, loop_state, console, recorder)
    busy_note = ""
    if not options.is_over(plan, loop_state):
        saved = f"the run is saved up to {plan.step_name} {loop_state.step:,}" if loop_state.step else "nothing was trained yet"
        signals.set_phase(f"while compiling; {saved}. To go on: {resume}")
        stage.prepare_steps(state, loop_state)
        if recorder and options.shows_weights:
            recorder.begin(stage, state.trainable, loop_state.step, stage=options.stage, command=resume, folder=str(folder))
        state, code = loop.run(state)
        busy_note = loop.busy_note()
        console.close_live()
        if code:
            console.print(
                f"Stopped at {plan.step_name} {loop_state.step:,}, {duration(loop_state.seconds)} into training; saved in "
                f"{folder / 'checkpoints' / str(loop_state.step)}.\nTo go on: {resume}"
            )
            return code

    # Measure, and say what came of it.
    signals.set_phase(f"before the last measurement; the trained model is in {folder}, and the same command measures it.")
    if recorder:
        recorder.event("measure", step=loop_state.step, seconds=loop_state.seconds)
    report, peak = stage.finish(state, loop.loop_state, loop.timer.warm_rate(), before), peak_rss_bytes()
    result = report.result | {
        f"{plan.step_name}s": loop_state.step,
        "refused_steps": loop_state.refused,
        "peak_rss_bytes": peak,
        "best_step": loop_state.best_step,
        "summary": " ".join(report.rows[0]),
    }
    if processes.is_first():
        with updating(folder):
            write_json(folder / "run.json", metadata | {"result": result})
    if recorder:
        recorder.end(loop_state.step, loop_state.seconds, result)
    _print_summary(report, plan.step_name, loop_state, peak, folder, metadata["text"]["data"], console, busy_note)
    return 0


def run_metadata(options: RunOptions, plan: RunPlan, stage_metadata: dict[str, Any]) -> dict[str, Any]:
    """Returns the contents of run.json: all that decides what a run computes, to be compared when it is resumed."""
    values = {
        "command": resume_command(options.stage),
        "stage": options.stage,
        "recipe": dataclasses.asdict(plan.recipe),
        "seed": plan.seed,
        "order": ORDER_VERSION,
        "steps": plan.steps,
        "max_seconds": plan.seconds,
        "least_steps": plan.least_steps,
        "frozen_type": plan.base,
        "device": str(options.device),
        "attention": attention_path(plan.cfg, plan.recipe.context),
        "versions": {"python": sys.version.split()[0], "jax": jax.__version__},
        **stage_metadata,
    }
    return replace_nonfinite(values, str)  # a clip of infinity is 'inf'


def _print_plan(options: RunOptions, stage: Stage, console: Console) -> None:
    cfg, context = stage.plan.cfg, stage.plan.recipe.context
    device = f"{options.device}; attention {attention_path(cfg, context)}"
    console.print_rows([("device", device), *stage.plan_rows(), ("folder", str(options.folder))])
    if options.device.backend == "cpu" and (problem := native_problem()):
        console.print_notes(f"A step would take some percent less time with attention in C, but {problem}.")
    stage.print_example()


def _print_summary(
    report: RunReport,
    step_name: str,
    loop_state: LoopState,
    peak: int,
    folder: Path,
    data: str,
    console: Console,
    busy_note: str,
) -> None:
    """Prints the report of a run of steps or rounds (`step_name`), and `peak`, the most bytes that it took."""
    for heading, text in report.texts:
        console.print(f"\n{heading}", style="bold")
        console.print(textwrap.indent(text.strip("\n"), "  | ", lambda line: True))
    console.print()
    trained = f"{quantity(loop_state.step, step_name)} in {duration(loop_state.seconds)}"
    if loop_state.predicted:
        steps, seconds = loop_state.predicted
        trained += f" ({steps:,} in {duration(seconds)} predicted)"
    trained += busy_note
    if loop_state.refused:
        trained += f"; {quantity(loop_state.refused, 'step')} refused: not finite, the last in batch {loop_state.refused_batch}"
    rows = [*report.rows, ("trained", trained)]
    if step_name == "step" and loop_state.best_step is not None:
        rows.append(("best", f"quick validation {loop_state.best:.3f}: {folder / 'checkpoints' / str(loop_state.best_step)}"))
    console.print_rows([*rows, ("memory", f"{format_bytes(peak)} at most"), ("saved", report.saved)])
    console.print("\nnext", style="bold")
    more: dict[str, tuple[object, ...]] = {"export": ("--out", Path("exported", folder.name))}
    if data == "shakespeare":
        more["generate"] = ("--prompt", "ROMEO:")
    for name in report.next_stages:
        console.print(f"  {command_line(name, '--model', folder, *more.get(name, ()))}")


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
        self.core_time: CoreTime | None = None  # when `run` was called
        self.last_finite, self.refused_whole = loop_state, False  # before the refused steps that no other follows

    def run(self, state: TrainState) -> tuple[TrainState, int]:
        """Returns the last state, which is saved, and 128 + the signal that ended the loop, or 0.

        Raises UserError, with the run saved, after too many refused updates in a row or when metrics.jsonl cannot be written.
        """
        loop_state, stage, plan = self.loop_state, self.stage, self.plan
        self.core_time = core_time()
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
                if is_recorded and progress < 1:  # else it may be the last, which is recorded below
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
            self.console.print_rows([("predicted", f"{predicted}, as the first {now.step:,} went{self.busy_note()}")])

    def busy_note(self) -> str:
        """Returns a phrase with the share of the cores that others have had since `run` was called.

        It is empty for BUSY or less, for a run on other devices than a CPU, and for one of several processes.
        """
        begin = self.core_time
        now = core_time()
        if begin is None or now is None or self.options.device.backend != "cpu" or processes.process_count() > 1:
            return ""
        share = (now.others - begin.others) / max(now.total - begin.total, 1.0)
        if share <= BUSY:
            return ""
        return f"; this machine is busy: others took {share:.0%} of its cores"

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
        evaluates = finite and evaluator and (is_done or self._is_evaluation_due())
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

    def _is_evaluation_due(self) -> bool:
        loop_state, evaluations = self.loop_state, self.options.evaluations
        if self.options.eval_every or not evaluations:
            return loop_state.is_due("evaluate", self._evaluation_interval())
        last_progress = self.plan.progress(*loop_state.intervals["evaluate"])
        share = self.plan.progress(loop_state.step, loop_state.seconds) - last_progress
        return share >= 1 / evaluations - 1e-9  # a fifth of five steps is not less than a fifth, whatever its rounding

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
