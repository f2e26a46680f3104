"""The scaffold of every run, in the order in which it happens: from a locked folder to the commands to type next."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax

from engine.device import Device
from engine.files import write_json
from engine.format import duration
from engine.storage.run_folder import save_tokenizer
from engine.text.tokenizer import Tokenizer
from engine.training.step import TrainState
from stages.cli import signals
from stages.cli.command import command_line, same_command
from stages.cli.console import Console
from stages.runs.estimate import RunPlan
from stages.runs.folder import clear_run, holds_run, lock_run, nonfinite_as_text
from stages.runs.loop import Intervals, Loop, LoopState, Steps
from stages.runs.state import find_previous_run, restore
from stages.runs.trainable import TrainableParts


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Where and how a run is carried out. `stage` is the command's name."""

    stage: str
    device: Device
    folder: Path
    overwrite: bool
    dry_run: bool
    intervals: Intervals


class RunReport(NamedTuple):
    """The end of a run: run.json's result, and the last screen: texts under headings, rows, and commands to type next."""

    result: dict[str, Any]
    texts: list[tuple[str, list[str]]]
    rows: list[tuple[str, str]]
    next_commands: list[str]


def next_commands(*stages: str, model: Path) -> list[str]:
    """Returns commands that take the model of a run folder."""
    out = {"export": ("--out", model / "hugging-face")}
    return [command_line(stage, "--model", model, *out.get(stage, ())) for stage in stages]


class Stage(Protocol):
    """One way to train: from random weights, fine-tuning, or learning from rewards."""

    noun: str  # of what the loop counts: "step" or "round"
    plan: RunPlan
    parts: TrainableParts  # valid after `load_weights`
    facts: dict[str, Any]  # the entries of run.json that are the stage's own; valid after `load_weights`
    tokenizer: Tokenizer
    ends: tuple[int, ...]  # ids that end a completion

    def load_weights(self) -> None:
        """Makes `parts` and `facts`. Raises UserError when there is no room for a run."""

    def print_plan(self) -> None:
        """Prints the banner."""

    def initial_state(self) -> TrainState:
        """Returns the state before the first step; can be traced."""

    def measure_before(self) -> None:
        """Measures what will be compared with the end of the run."""

    def prepare_steps(self, state: TrainState, loop_state: LoopState) -> Steps:
        """Compiles the steps of the loop."""

    def report(self, state: TrainState, loop: Loop) -> RunReport:
        """Measures and saves the result."""

    def summary(self, result: dict[str, Any]) -> str:
        """Returns a few words for a run that is finished already."""


def execute(options: RunOptions, make_stage: Callable[[Console], Stage]) -> int:
    """Carries out a run, or goes on with the one in the folder. Returns the exit code."""
    with Console() as console:
        if options.dry_run:
            make_stage(console).print_plan()
            console.print("A dry run: nothing was trained.")
            return 0
        holds_run(options.folder)  # a folder that cannot be used is said before minutes of preparation
        with lock_run(options.folder):
            return _execute(options, make_stage(console), console)


def _execute(options: RunOptions, stage: Stage, console: Console) -> int:
    stage.load_weights()
    folder, plan, noun = options.folder, stage.plan, stage.noun
    facts = {
        "command": same_command(options.stage), "stage": options.stage,
        "recipe": nonfinite_as_text(dataclasses.asdict(plan.recipe)),
        "seed": plan.seed, "steps": plan.steps, "max_seconds": plan.seconds, "device": str(options.device),
        "versions": {"python": sys.version.split()[0], "jax": jax.__version__}, **stage.facts,
    }  # fmt: skip
    previous = find_previous_run(folder, facts, plan.cfg, options.overwrite)
    stage.print_plan()
    if previous and previous.is_finished(plan):
        done = previous.loop_state
        console.print(
            f"This run is finished: {done.step:,} {noun}s in {duration(done.seconds)}, "
            f"{stage.summary(previous.record['result'])}. To train it further give more --{noun}s or --max-time; "
            "to begin anew, --overwrite."
        )
        return 0
    if previous:
        state, loop_state = restore(previous, facts, stage.initial_state, stage.parts, console)
    else:
        with console.task("initialising"):
            state, loop_state = stage.initial_state(), LoopState()
        clear_run(folder)
    save_tokenizer(folder, stage.tokenizer, stage.ends)
    write_json(folder / "config.json", plan.cfg.to_json())
    write_json(folder / "run.json", facts)
    stage.measure_before()
    digests = {name: facts[name]["digest"] for name in ("text", "tokenizer", "base") if name in facts}
    record = {"seed": plan.seed, "digests": digests}
    loop = Loop(plan, folder, options.intervals, record, stage.parts.to_saved, loop_state, console)
    if plan.progress(loop_state.step, loop_state.seconds) < 1:
        saved = f"the run is saved up to {noun} {loop_state.step:,}" if loop_state.step else "nothing was trained yet"
        signals.set_phase(f"while compiling; {saved}. To begin again: {same_command(options.stage)}")
        state, signal = loop.run(stage.prepare_steps(state, loop_state), state)
        console.close_live()
        if signal:
            console.print(
                f"Stopped at {noun} {loop_state.step:,}, {duration(loop_state.seconds)} into training; saved in "
                f"{folder / 'checkpoints' / str(loop_state.step)}.\nTo go on: {same_command(options.stage)}"
            )
            return 128 + signal
    signals.set_phase(f"before the last measurement; the trained model is in {folder}, and the same command measures it.")
    report = stage.report(state, loop)
    write_json(folder / "run.json", facts | {"result": report.result})
    _print_report(report, console)
    return 0


def _print_report(report: RunReport, console: Console) -> None:
    for heading, lines in report.texts:
        console.print()
        console.print(heading, style="bold")
        console.print("\n".join(f"  {line}" for line in lines))
    console.print()
    console.print_rows(report.rows)
    console.print()
    console.print("next", style="bold")
    for command in report.next_commands:
        console.print(f"  {command}")
