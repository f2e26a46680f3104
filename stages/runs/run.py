"""Carries out a training run: locks its folder, starts or resumes it, trains, and prints a summary."""

import contextlib
import dataclasses
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from engine.counting.hardware import peak_rss_bytes
from engine.counting.params import leaf_shapes
from engine.errors import UserError
from engine.files import write_json
from engine.format import duration, format_bytes, quantity
from engine.mesh import processes
from engine.mesh.layout import init_sharded
from engine.model.paths import merge
from engine.storage.digest import digest
from engine.text.batch import ORDER_VERSION
from engine.text.tokenizer import save_tokenizer
from engine.training.step import TrainState, gradient_norms
from stages.cli import signals
from stages.cli.command import command_line, resume_command
from stages.cli.console import Console
from stages.runs.estimate import RunPlan
from stages.runs.folder import RUN_FILES, clear_run, holds_run, lock_run, replace_nonfinite, updating
from stages.runs.loop import Loop, RunOptions
from stages.runs.mesh import device_with_mesh, make_mesh_here, refuse_different_runs
from stages.runs.stage import LoopState, RunReport, Stage

if TYPE_CHECKING:
    from stages.runs.watch.recorder import Recorder

SAMPLE, SAMPLE_TEXT = 48, 120  # tokens and characters of a recorded sample at most


def execute(options: RunOptions, make_stage: Callable[[Console], Stage]) -> int:
    """Carries out a run, or resumes the one in the folder. Returns the exit code: 0, or 128 + the signal that stopped it."""
    if (options.record or options.watch is not None) and options.mesh and options.mesh.devices > 1:
        raise UserError(f"--record and --watch take a run on one device, and this one lies on {options.mesh.devices}.")
    own = [(options.folder / name).resolve() for name in RUN_FILES]
    if options.record and any(options.record.resolve().is_relative_to(path) for path in own):
        raise UserError(f"{options.record} is for what the run itself writes. Give another file with --record.")
    with Console() as console:
        processes.refuse_differences({"--dry-run": str(options.dry_run)})  # the others would wait for one that only plans
        if options.dry_run:  # plans for devices that need not be here
            _print_plan(options, make_stage(console), console)
            console.print("A dry run: nothing was trained.")
            return 0
        mesh = make_mesh_here(options.mesh) if options.mesh else None
        options = dataclasses.replace(options, device=device_with_mesh(options.device, options.mesh))
        holds_run(options.folder)  # raises for an unusable folder, before minutes of preparation
        first = processes.is_first()
        with lock_run(options.folder) if first else contextlib.nullcontext(), _recording(options, console) as recorder:
            processes.refuse_unshared(options.folder)
            with processes.process_0_first():
                stage = make_stage(console)
                stage.load_weights()
            with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
                return _execute(options, stage, console, recorder)


@contextlib.contextmanager
def _recording(options: RunOptions, console: Console) -> Iterator["Recorder | None"]:
    """Yields what takes the run's events, if anything does; only what is asked for is imported."""
    if not (options.record or options.tensorboard or options.watch is not None):
        yield None
        return
    from stages.runs.watch.recorder import Recorder, file_sink, tensorboard_sink

    sinks, is_watched = [], lambda: False
    with contextlib.ExitStack() as stack:
        if options.record:
            sinks.append(file_sink(options.record))
        if options.tensorboard and processes.is_first():
            sinks.append(stack.enter_context(tensorboard_sink(options.folder / "tensorboard")))
        if options.watch is not None:
            from stages.runs.watch.server import Watch

            watch = stack.enter_context(Watch(options.watch))
            console.print_rows([("watch", watch.url)])
            sinks, is_watched = [*sinks, watch], watch.is_watched
        yield Recorder(sinks, console.print, bool(options.record), is_watched)
    if options.watch is not None:
        kept = f"{options.record} has it, for {command_line('runs.watch', options.record, 'lives.html')}"
        console.print(f"{watch.url} has ended with the run; {kept if options.record else '--record FILE keeps what it shows'}.")


def _execute(options: RunOptions, stage: Stage, console: Console, recorder: "Recorder | None") -> int:
    folder, plan, resume = options.folder, stage.plan, resume_command(options.stage)
    metadata = run_metadata(options, plan, stage.metadata)
    stage.place()
    previous = None
    if holds_run(folder) and not options.overwrite:
        from stages.runs import previous_run  # which a new run does without

        previous = previous_run.find_previous_run(folder, metadata, plan.cfg)
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
    loop = Loop(plan, options, stage.frozen_as_loaded, loop_state, console, recorder)
    if not options.is_over(plan, loop_state):
        saved = f"the run is saved up to {plan.step_name} {loop_state.step:,}" if loop_state.step else "nothing was trained yet"
        signals.set_phase(f"while compiling; {saved}. To go on: {resume}")
        steps = stage.prepare_steps(state, loop_state)
        if recorder and (options.record or options.watch is not None):
            _begin_recording(options, stage, recorder, state, loop_state)
        state, code = loop.run(steps, state)
        console.close_live()
        if code:
            console.print(
                f"Stopped at {plan.step_name} {loop_state.step:,}, {duration(loop_state.seconds)} into training; saved in "
                f"{folder / 'checkpoints' / str(loop_state.step)}.\nTo go on: {resume}"
            )
            return code
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


def _begin_recording(options: RunOptions, stage: Stage, recorder: "Recorder", state: TrainState, loop_state: LoopState) -> None:
    from engine.inference.decode import generate, prepare_params  # which a run that is not recorded does without

    plan, cfg, frozen, (text, prompt) = stage.plan, stage.plan.cfg, stage.frozen, stage.prompt()
    prompt = prompt[-(cfg.context // 2) :]  # one may fill the context
    count = min(SAMPLE, cfg.context - len(prompt))

    def sample(trainable: Any) -> str:
        params = prepare_params(cfg, merge(trainable, frozen))
        tokens = generate(cfg, params, prompt, count, temperature=0.0, stop_token_ids=stage.stop_token_ids)
        return stage.tokenizer.decode(tokens)[:SAMPLE_TEXT]

    recorder.begin(
        state.trainable,
        frozen,
        [*leaf_shapes(cfg)],
        sample=sample,
        digest=lambda trainable: digest(stage.to_saved(trainable)),
        gradient_norms=lambda trainable, batch: gradient_norms(
            cfg, trainable, frozen, batch, microbatches=plan.recipe.accumulate, objective=stage.objective
        ),
        stage=options.stage,
        name=plan.name,
        command=resume_command(options.stage),
        folder=str(options.folder),
        layers=cfg.layers,
        width=cfg.width,
        steps=plan.steps,
        seconds=plan.seconds,
        step=loop_state.step,
        prompt=text,
    )


def run_metadata(options: RunOptions, plan: RunPlan, stage_metadata: dict[str, Any]) -> dict[str, Any]:
    """Returns the contents of run.json: all that decides what a run computes, to be compared when it is resumed."""
    values = {
        "command": resume_command(options.stage), "stage": options.stage, "recipe": dataclasses.asdict(plan.recipe),
        "seed": plan.seed, "order": ORDER_VERSION, "steps": plan.steps, "max_seconds": plan.seconds,
        "least_steps": plan.least_steps, "frozen_type": plan.base, "device": str(options.device),
        "versions": {"python": sys.version.split()[0], "jax": jax.__version__}, **stage_metadata,
    }  # fmt: skip
    return replace_nonfinite(values, str)  # a clip of infinity is 'inf'


def _print_plan(options: RunOptions, stage: Stage, console: Console) -> None:
    console.print_rows([("device", str(options.device)), *stage.plan_rows(), ("folder", str(options.folder))])
    stage.print_example()


def _print_summary(
    report: RunReport, step_name: str, loop_state: LoopState, peak: int, folder: Path, data: str, console: Console
) -> None:
    """Prints the report of a run of steps or rounds (`step_name`) on `data`, and `peak`, the most bytes that it took."""
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
