"""Carries out a training run: locks its folder, starts or resumes it, trains, and prints a summary."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax

from engine.counting.hardware import peak_rss_bytes
from engine.files import write_json
from engine.format import duration, quantity
from engine.mesh import processes
from engine.mesh.layout import init_sharded
from engine.storage.run_folder import save_tokenizer, updating
from engine.text import epoch_order
from engine.text.tokenizer import Tokenizer
from engine.training.step import TrainState
from stages.cli import signals
from stages.cli.command import resume_command
from stages.cli.console import Console
from stages.runs.estimate import RunPlan
from stages.runs.folder import clear_run, holds_run, lock_run, nonfinite_as_text
from stages.runs.loop import Loop, RunOptions, Steps
from stages.runs.loop_state import LoopState
from stages.runs.mesh import choose_mesh, device_with_mesh, make_mesh_here, refuse_different_runs
from stages.runs.previous_run import PreviousRun, describe_changes, find_previous_run, refuse_other_order, restore
from stages.runs.summary import RunReport, print_summary
from stages.runs.trainable import TrainableSplit


class Stage(Protocol):
    """One way to train: from random weights, fine-tuning, or reinforcement learning."""

    plan: RunPlan
    split: TrainableSplit  # valid after `load_weights`
    facts: dict[str, Any]  # the stage's own entries of run.json; valid after `load_weights`
    tokenizer: Tokenizer
    stop_token_ids: tuple[int, ...]  # ids that end a completion
    sampling: Mapping[str, Any] = {}  # recommended for the trained model

    def load_weights(self) -> None:
        """Sets `split` and `facts`. Raises UserError when memory is too small."""

    def place(self) -> None:
        """Spreads what was loaded over the mesh."""
        return

    def plan_rows(self) -> list[tuple[str, str]]:
        """Returns the banner's rows between device and folder."""

    def print_example(self) -> None:
        """Prints an example of the data below the banner, if the stage has any."""
        return

    def begin_compiling(self, beside_reading: bool) -> None:
        """Begins to compile what `prepare_steps` returns, where that can be done before there is a state.

        `beside_reading`: whether a checkpoint is read next.
        """
        return

    def initial_state(self, trainable: Any) -> TrainState:
        """Returns the state before the first step, of `split.trainable`; can be traced."""

    def measure(self, trainable: Any) -> Any:
        """Measures the model, if the stage compares it before and after training."""
        return None

    def prepare_steps(self, state: TrainState, loop_state: LoopState) -> Steps:
        """Compiles the steps of the loop."""

    def finish(self, state: TrainState, loop: Loop, before: Any) -> RunReport:
        """Measures at the end, saves what no checkpoint holds, and returns the RunReport, which `execute` prints.

        `before`: what `measure` returned before training.
        """


def execute(options: RunOptions, make_stage: Callable[[Console], Stage]) -> int:
    """Carries out a run, or resumes the one in the folder. Returns the exit code: 0, or 128 + the signal that stopped it."""
    with Console() as console:
        processes.refuse_differences({"--dry-run": str(options.dry_run)})  # the others would wait for one that only plans
        if options.dry_run:  # plans for devices that need not be here
            _print_plan(options, make_stage(console), console)
            console.print("A dry run: nothing was trained.")
            return 0
        shape = choose_mesh(options.mesh)
        mesh = make_mesh_here(shape) if shape else None
        options = dataclasses.replace(options, device=device_with_mesh(options.device, shape))
        holds_run(options.folder)  # raises for an unusable folder, before minutes of preparation
        first = processes.is_first()
        with lock_run(options.folder) if first else contextlib.nullcontext():
            processes.refuse_unshared(options.folder)
            with processes.process_0_first():
                stage = make_stage(console)
                stage.load_weights()
            with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
                return _execute(options, stage, console)


def _execute(options: RunOptions, stage: Stage, console: Console) -> int:
    folder, plan, resume = options.folder, stage.plan, resume_command(options.stage)
    facts = run_facts(options, plan, stage.facts)
    stage.place()
    previous = find_previous_run(folder, facts, plan.cfg, options.overwrite)
    shared = {name: getattr(options, name) for name in ("save_every", "eval_every", "log_every", "keep", "mesh")}
    refuse_different_runs(facts, plan.cfg, shared, previous.loop_state.step if previous else 0)
    _print_plan(options, stage, console)
    if previous and plan.progress(previous.loop_state.step, previous.loop_state.seconds) >= 1 and previous.has_result:
        _print_finished(previous, plan, console)
        return 0
    if previous:
        refuse_other_order(previous)
    stage.begin_compiling(beside_reading=previous is not None)
    state, loop_state = _first_state(options, stage, previous, facts, console)
    if processes.is_first():
        with updating(folder):
            write_json(folder / "run.json", facts)  # first: a folder with files and without it is taken for someone else's
            save_tokenizer(folder, stage.tokenizer, stage.stop_token_ids, stage.sampling)
            write_json(folder / "config.json", plan.cfg.to_json())
    before = stage.measure(stage.split.trainable)
    digests = {name: facts[name]["digest"] for name in ("text", "tokenizer", "base") if name in facts}
    loop = Loop(plan, options, {"seed": plan.seed, "digests": digests}, stage.split.frozen_as_loaded, loop_state, console)
    if plan.progress(loop_state.step, loop_state.seconds) < 1:
        saved = f"the run is saved up to {plan.noun} {loop_state.step:,}" if loop_state.step else "nothing was trained yet"
        signals.set_phase(f"while compiling; {saved}. To go on: {resume}")
        state, code = loop.run(stage.prepare_steps(state, loop_state), state)
        console.close_live()
        if code:
            console.print(
                f"Stopped at {plan.noun} {loop_state.step:,}, {duration(loop_state.seconds)} into training; saved in "
                f"{folder / 'checkpoints' / str(loop_state.step)}.\nTo go on: {resume}"
            )
            return code
    signals.set_phase(f"before the last measurement; the trained model is in {folder}, and the same command measures it.")
    report, peak = stage.finish(state, loop, before), peak_rss_bytes()
    result = report.result | {
        f"{plan.noun}s": loop_state.step, "refused_steps": loop_state.refused, "peak_rss_bytes": peak,
        "best_step": loop_state.best_step, "summary": " ".join(report.rows[0]),
    }  # fmt: skip
    if processes.is_first():
        with updating(folder):
            write_json(folder / "run.json", facts | {"result": result})
    print_summary(report, plan.noun, loop_state, peak, folder, facts["text"]["data"], console)
    return 0


def _print_finished(previous: PreviousRun, plan: RunPlan, console: Console) -> None:
    done, summary = previous.loop_state, previous.record["result"].get("summary", "measured")
    console.print(
        f"This run is finished: {quantity(done.step, plan.noun)} in {duration(done.seconds)}, {summary}. "
        f"To train it further give more --{plan.noun}s or --max-time; to begin anew, --overwrite."
    )
    for line in describe_changes(previous.changes):
        console.print(f"changed, which trains nothing: {line}", style="yellow")


def _first_state(
    options: RunOptions, stage: Stage, previous: PreviousRun | None, facts: dict[str, Any], console: Console
) -> tuple[TrainState, LoopState]:
    """Returns the state to train from: the newest checkpoint's, with what changed noted in `facts`, or a new one."""
    if previous:
        state, loop_state = restore(previous, stage.plan.cfg, stage.initial_state, stage.split, console)
        for line in describe_changes(previous.changes):
            console.print(f"changed: {line}", style="yellow")
        if previous.changes.keys() & {"text/validation", "text/validation_digest"}:  # a best on another would never be
            loop_state.best = loop_state.best_step = None  # beaten, or always
        noted = [{"step": loop_state.step, "fields": previous.changes}] if previous.changes else []
        facts["changes"] = previous.record.get("changes", []) + noted
        return state, loop_state
    with console.task("initialising"):
        state = init_sharded(stage.initial_state, stage.split.trainable)
    if processes.is_first():
        clear_run(options.folder)
    return state, LoopState()


def run_facts(options: RunOptions, plan: RunPlan, stage_facts: dict[str, Any]) -> dict[str, Any]:
    """Returns the contents of run.json: all that decides what a run computes, to be compared when it is resumed."""
    return nonfinite_as_text({
        "command": resume_command(options.stage), "stage": options.stage, "recipe": dataclasses.asdict(plan.recipe),
        "seed": plan.seed, "order": epoch_order.VERSION, "steps": plan.steps, "max_seconds": plan.seconds,
        "least_steps": plan.least_steps, "frozen_type": plan.base, "device": str(options.device),
        "versions": {"python": sys.version.split()[0], "jax": jax.__version__}, **stage_facts,
    })  # fmt: skip


def _print_plan(options: RunOptions, stage: Stage, console: Console) -> None:
    console.print_rows([("device", str(options.device)), *stage.plan_rows(), ("folder", str(options.folder))])
    stage.print_example()
