"""Carries out a run: locks its folder, takes it from Plan to RunReport, prints a banner and a summary.

plan = make_plan(console)                                   by flags, data and architecture
prepared = prepare(plan, console)                           weights, tokenizer, batches
steps = prepared.begin_steps(state, loop_state, ...)        the program; `loop.py` takes the steps
report = prepared.report(finished, console)                 measured at the end
"""

import contextlib
import dataclasses
import gc
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from engine.counting.hardware import peak_rss_bytes
from engine.errors import UserError
from engine.files import write_json
from engine.format import duration, format_bytes, quantity
from engine.mesh import processes
from engine.mesh.layout import init_sharded
from engine.model.attention import attention_path
from engine.model.native.library import native_problem
from engine.text.batch import ORDER_VERSION
from engine.text.tokenizer import save_tokenizer
from engine.training.step import TrainState
from stages.cli import signals
from stages.cli.command import command_line, resume_command
from stages.cli.console import Console
from stages.runs.folder import RUN_FILES, clear_run, holds_run, lock_run, replace_nonfinite, updating
from stages.runs.loop import LoopEnd, run_steps
from stages.runs.options import RunOptions
from stages.runs.plan import RunPlan
from stages.runs.stage import Finished, LoopState, Plan, Prepared

if TYPE_CHECKING:  # a run that nobody watches or records, or that is new, does without
    from stages.runs.previous_run import PreviousRun
    from stages.runs.watch.recorder import Recorder


def execute[P: Plan](
    options: RunOptions, make_plan: Callable[[Console], P], prepare: Callable[[P, Console], Prepared]
) -> int:
    """Carries out a run, or resumes the one in the folder. Returns 0, or 128 + the signal that
    stopped it."""
    refuse_options(options)
    # What was imported stays: garbage is looked for among what runs make, in a sixth of the time.
    if not gc.get_freeze_count():
        gc.freeze()
    with Console() as console, contextlib.ExitStack() as stack:
        # The others would wait for one that only plans.
        processes.refuse_differences({"--dry-run": str(options.dry_run)})
        if options.dry_run:  # plans for devices that need not be here
            print_plan(options, make_plan(console), console)
            console.print("A dry run: nothing was trained.")
            return 0
        mesh = None
        if options.mesh:
            from stages.runs.mesh import device_with_mesh, make_mesh_here

            mesh = make_mesh_here(options.mesh)
            options = dataclasses.replace(options, device=device_with_mesh(options.device, options.mesh))
        holds_run(options.folder)  # raises for an unusable folder, before minutes of preparation
        if processes.is_first():
            stack.enter_context(lock_run(options.folder))
        recorder = None
        if options.shows_weights or options.tensorboard:
            from stages.runs.watch.recorder import open_recorder

            tensorboard = None
            if options.tensorboard:
                tensorboard = options.folder / "tensorboard"
            recorder = stack.enter_context(open_recorder(options.record, tensorboard, options.watch, console))
        processes.refuse_unshared(options.folder)
        with processes.process_0_first():
            prepared = prepare(make_plan(console), console)
        if mesh:
            stack.enter_context(jax.set_mesh(mesh))
        # under its name, so that what was loaded is not held beside it
        prepared = prepared.placed()
        return carry_out(options, prepared, console, recorder)


def refuse_options(options: RunOptions) -> None:
    if options.shows_weights and options.mesh and options.mesh.devices > 1:
        raise UserError(
            f"--record and --watch take a run on one device, and this one lies on {options.mesh.devices}."
        )
    if options.record:
        own = [(options.folder / name).resolve() for name in RUN_FILES]
        if any(options.record.resolve().is_relative_to(path) for path in own):
            raise UserError(
                f"{options.record} is for what the run itself writes. Give another file with --record."
            )


def carry_out(options: RunOptions, prepared: Prepared, console: Console, recorder: "Recorder | None") -> int:
    """Begins or resumes a run, takes its steps, and reports. Returns the exit code."""
    plan = prepared.plan
    metadata = run_metadata(options, plan, prepared.metadata)
    previous = find_previous(options, plan, metadata)
    print_plan(options, prepared, console)
    if previous and previous.is_finished(options.is_over(plan, previous.loop_state)):
        print_finished(options, plan, previous, console)
        return 0
    refuse_to_begin(options, plan, previous)
    compiling = prepared.begin_compiling(beside_reading=previous is not None)
    state, loop_state = begin_or_resume(options, prepared, previous, metadata, console)
    before = prepared.measure(prepared.trainable, console)
    end = LoopEnd(state)
    if not options.is_over(plan, loop_state):
        end = train(options, prepared, state, loop_state, compiling, console, recorder)
    if end.stop_code:
        checkpoint = options.folder / "checkpoints" / str(loop_state.step)
        console.print(
            f"Stopped at {plan.step_name} {loop_state.step:,}, {duration(loop_state.seconds)} into training; "
            f"saved in {checkpoint}.\nTo go on: {resume_command(options.stage)}"
        )
        return end.stop_code
    finished = Finished(end.state, loop_state, end.warm_rate, before)
    report(options, prepared, finished, metadata, end, console, recorder)
    return 0


def begin_or_resume(
    options: RunOptions,
    prepared: Prepared,
    previous: "PreviousRun | None",
    metadata: dict[str, Any],
    console: Console,
) -> tuple[TrainState, LoopState]:
    """Returns the states of a new run, or of the newest checkpoint of the previous one, and writes
    the run's own files.
    """
    if previous:
        from stages.runs.previous_run import resume

        state, loop_state = resume(previous, prepared, metadata, console)
    else:
        with console.task("initialising"):
            state = init_sharded(prepared.initial_state, prepared.trainable)
        loop_state = LoopState()
        if processes.is_first():
            clear_run(options.folder)
    if processes.is_first():
        folder = options.folder
        with updating(folder):
            # First: a folder with files and without it is taken for someone else's.
            write_json(folder / "run.json", metadata)
            save_tokenizer(
                folder / "tokenizer", prepared.tokenizer, prepared.stop_token_ids, prepared.sampling
            )
            write_json(folder / "config.json", prepared.plan.cfg.to_json())
    return state, loop_state


def train(
    options: RunOptions,
    prepared: Prepared,
    state: TrainState,
    loop_state: LoopState,
    compiling: Any,
    console: Console,
    recorder: "Recorder | None",
) -> LoopEnd:
    """Compiles the step, and takes steps until the plan is done or a signal comes."""
    plan = prepared.plan
    resume = resume_command(options.stage)
    saved = "nothing was trained yet"
    if loop_state.step:
        saved = f"the run is saved up to {plan.step_name} {loop_state.step:,}"
    signals.set_phase(f"while compiling; {saved}. To go on: {resume}")
    steps = prepared.begin_steps(state, loop_state, compiling, console)
    if recorder and options.shows_weights:
        folder = str(options.folder)
        recorder.begin(
            prepared, state.trainable, loop_state.step, stage=options.stage, command=resume, folder=folder
        )
    end = run_steps(options, prepared, steps, state, loop_state, console, recorder)
    console.close_live()
    return end


def report(
    options: RunOptions,
    prepared: Prepared,
    finished: Finished,
    metadata: dict[str, Any],
    end: LoopEnd,
    console: Console,
    recorder: "Recorder | None",
) -> None:
    """Measures at the end, writes the result into run.json, and prints the summary."""
    folder = options.folder
    step_name = prepared.plan.step_name
    loop_state = finished.loop_state
    signals.set_phase(
        f"before the last measurement; the trained model is in {folder}, and the same command measures it."
    )
    if recorder:
        recorder.event("measure", step=loop_state.step, seconds=loop_state.seconds)
    run_report = prepared.report(finished, console)
    peak = peak_rss_bytes()
    result = run_report.result | {
        f"{step_name}s": loop_state.step,
        "refused_steps": loop_state.refused,
        "peak_rss_bytes": peak,
        "best_step": loop_state.best_step,
        "summary": " ".join(run_report.rows[0]),
    }
    goodput = None
    if end.starts:
        goodput = end.starts.goodput(loop_state.seconds)
        result["goodput"] = dataclasses.asdict(goodput)
    if processes.is_first():
        with updating(folder):
            write_json(folder / "run.json", metadata | {"result": result})
    if recorder:
        recorder.end(loop_state.step, loop_state.seconds, result)
    rows = [
        *run_report.rows,
        *loop_rows(loop_state, step_name, folder, end.busy_note),
        ("memory", f"{format_bytes(peak)} at most"),
        ("saved", run_report.saved),
    ]
    if goodput:
        rows.append(("goodput", goodput.describe()))
    commands = next_commands(run_report.next_stages, folder, metadata["text"]["data"])
    print_summary(run_report.texts, rows, commands, console)


def run_metadata(options: RunOptions, plan: RunPlan, stage_metadata: dict[str, Any]) -> dict[str, Any]:
    """Returns the contents of run.json: all that decides what a run computes, to be compared when
    it is resumed."""
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


def find_previous(options: RunOptions, plan: RunPlan, metadata: dict[str, Any]) -> "PreviousRun | None":
    """Returns the run to resume, if there is one. Raises UserError when it, or another process's,
    trains something else."""
    previous = None
    if holds_run(options.folder) and not options.overwrite:
        from stages.runs.previous_run import find_previous_run

        previous = find_previous_run(options.folder, metadata, plan.cfg)
    if processes.process_count() > 1:
        from stages.runs.mesh import refuse_different_runs

        names = ("save_every", "eval_every", "log_every", "keep", "mesh")
        shared = {name: str(getattr(options, name)) for name in names}
        refuse_different_runs(metadata, plan.cfg, shared, newest_step(previous))
    return previous


def newest_step(previous: "PreviousRun | None") -> int:
    """Returns the step of the newest checkpoint of the run to resume, 0 without one."""
    if previous is None:
        return 0
    return previous.loop_state.step


def refuse_to_begin(options: RunOptions, plan: RunPlan, previous: "PreviousRun | None") -> None:
    """Raises UserError for a recording that is another run's, and for a run whose batches came in
    another order."""
    if options.record:
        from stages.runs.watch.recorder import refuse_other_file

        refuse_other_file(
            options.record,
            newest_step(previous),
            stage=options.stage,
            name=plan.name,
            folder=str(options.folder),
        )
    if previous:
        from stages.runs.previous_run import refuse_other_order

        refuse_other_order(options.folder, previous.record)


def print_plan(options: RunOptions, planned: Plan | Prepared, console: Console) -> None:
    plan = planned.plan
    device = f"{options.device}; attention {attention_path(plan.cfg, plan.recipe.context)}"
    console.print_rows([("device", device), *planned.rows(console), ("folder", str(options.folder))])
    if options.device.backend == "cpu":
        problem = native_problem()
        if problem:
            console.print_notes(
                f"A step would take some percent less time with attention in C, but {problem}."
            )
    planned.print_example(console)


def print_finished(options: RunOptions, plan: RunPlan, previous: "PreviousRun", console: Console) -> None:
    from stages.runs import previous_run

    previous_run.print_finished(previous, plan, console)
    if options.record:
        console.print(f"Nothing was recorded in {options.record}: no step was left.")


def loop_rows(loop_state: LoopState, step_name: str, folder: Path, busy_note: str) -> list[tuple[str, str]]:
    """Returns the summary's rows of how long a loop of steps or rounds (`step_name`) trained, and
    of its best step."""
    trained = f"{quantity(loop_state.step, step_name)} in {duration(loop_state.seconds)}"
    if loop_state.predicted:
        steps, seconds = loop_state.predicted
        trained += f" ({steps:,} in {duration(seconds)} predicted)"
    trained += busy_note
    if loop_state.refused:
        refused = quantity(loop_state.refused, "step")
        trained += f"; {refused} refused: not finite, the last in batch {loop_state.refused_batch}"
    rows = [("trained", trained)]
    if step_name == "step" and loop_state.best_step is not None:
        best = folder / "checkpoints" / str(loop_state.best_step)
        rows.append(("best", f"quick validation {loop_state.best:.3f}: {best}"))
    return rows


def next_commands(stages: Sequence[str], folder: Path, data: str) -> list[str]:
    """Returns the commands of stages that take a run's model. `data`: what it was trained on."""
    more: dict[str, tuple[object, ...]] = {"export": ("--out", Path("exported", folder.name))}
    if data == "shakespeare":
        more["generate"] = ("--prompt", "ROMEO:")
    return [command_line(stage, "--model", folder, *more.get(stage, ())) for stage in stages]


def print_summary(
    texts: Sequence[tuple[str, str]], rows: list[tuple[str, str]], commands: Sequence[str], console: Console
) -> None:
    """Prints texts under their headings, the summary's rows, and the commands that may come next."""
    for heading, text in texts:
        console.print(f"\n{heading}", style="bold")
        console.print(textwrap.indent(text.strip("\n"), "  | ", lambda line: True))
    console.print()
    console.print_rows(rows)
    console.print("\nnext", style="bold")
    for command in commands:
        console.print(f"  {command}")
