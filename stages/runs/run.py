"""Carries out a training run: locks its folder, starts or resumes it, trains, and prints a summary."""

import contextlib
import dataclasses
import sys
import textwrap
from collections.abc import Callable
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
from stages.cli import signals
from stages.cli.command import command_line, resume_command
from stages.cli.console import Console
from stages.runs.estimate import RunPlan
from stages.runs.folder import RUN_FILES, clear_run, holds_run, lock_run, replace_nonfinite, updating
from stages.runs.loop import Loop, RunOptions
from stages.runs.stage import LoopState, RunReport, Stage

if TYPE_CHECKING:
    from stages.runs.watch.recorder import Recorder


def execute(options: RunOptions, make_stage: Callable[[Console], Stage]) -> int:
    """Carries out a run, or resumes the one in the folder. Returns 0, or 128 + the signal that stopped it."""
    if options.shows_weights and options.mesh and options.mesh.devices > 1:
        raise UserError(f"--record and --watch take a run on one device, and this one lies on {options.mesh.devices}.")
    own = [(options.folder / name).resolve() for name in RUN_FILES]
    if options.record and any(options.record.resolve().is_relative_to(path) for path in own):
        raise UserError(f"{options.record} is for what the run itself writes. Give another file with --record.")
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
    if not options.is_over(plan, loop_state):
        saved = f"the run is saved up to {plan.step_name} {loop_state.step:,}" if loop_state.step else "nothing was trained yet"
        signals.set_phase(f"while compiling; {saved}. To go on: {resume}")
        stage.prepare_steps(state, loop_state)
        if recorder and options.shows_weights:
            recorder.begin_run(stage, state.trainable, loop_state.step, stage=options.stage, command=resume, folder=str(folder))
        state, code = loop.run(state)
        console.close_live()
        if code:
            console.print(
                f"Stopped at {plan.step_name} {loop_state.step:,}, {duration(loop_state.seconds)} into training; saved in "
                f"{folder / 'checkpoints' / str(loop_state.step)}.\nTo go on: {resume}"
            )
            return code

    # Measure, and say what came of it.
    signals.set_phase(f"before the last measurement; the trained model is in {folder}, and the same command measures it.")
    report, peak = stage.finish(state, loop.loop_state, loop.timer.warm_rate(), before), peak_rss_bytes()
    result = report.result | {
        f"{plan.step_name}s": loop_state.step, "refused_steps": loop_state.refused, "peak_rss_bytes": peak,
        "best_step": loop_state.best_step, "summary": " ".join(report.rows[0]),
    }  # fmt: skip
    if processes.is_first():
        with updating(folder):
            write_json(folder / "run.json", metadata | {"result": result})
    if recorder:
        recorder.end(loop_state.step, loop_state.seconds, result)
    _print_summary(report, plan.step_name, loop_state, peak, folder, metadata["text"]["data"], console)
    return 0


def run_metadata(options: RunOptions, plan: RunPlan, stage_metadata: dict[str, Any]) -> dict[str, Any]:
    """Returns the contents of run.json: all that decides what a run computes, to be compared when it is resumed."""
    values = {
        "command": resume_command(options.stage), "stage": options.stage, "recipe": dataclasses.asdict(plan.recipe),
        "seed": plan.seed, "order": ORDER_VERSION, "steps": plan.steps, "max_seconds": plan.seconds,
        "least_steps": plan.least_steps, "frozen_type": plan.base, "device": str(options.device),
        "attention": attention_path(plan.cfg, plan.recipe.context),
        "versions": {"python": sys.version.split()[0], "jax": jax.__version__}, **stage_metadata,
    }  # fmt: skip
    return replace_nonfinite(values, str)  # a clip of infinity is 'inf'


def _print_plan(options: RunOptions, stage: Stage, console: Console) -> None:
    cfg, context = stage.plan.cfg, stage.plan.recipe.context
    device = f"{options.device}; attention {attention_path(cfg, context)}"
    console.print_rows([("device", device), *stage.plan_rows(), ("folder", str(options.folder))])
    if options.device.backend == "cpu" and (problem := native_problem()):
        console.print_notes(f"A step would take some percent less time with attention in C, but {problem}.")
    stage.print_example()


def _print_summary(
    report: RunReport, step_name: str, loop_state: LoopState, peak: int, folder: Path, data: str, console: Console
) -> None:
    """`step_name`: step or round; `peak`: the most bytes that the run took."""
    for heading, text in report.texts:
        console.print(f"\n{heading}", style="bold")
        console.print(textwrap.indent(text.strip("\n"), "  | ", lambda line: True))
    console.print()
    trained = f"{quantity(loop_state.step, step_name)} in {duration(loop_state.seconds)}"
    if loop_state.predicted:
        steps, seconds = loop_state.predicted
        trained += f" ({steps:,} in {duration(seconds)} predicted)"
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
