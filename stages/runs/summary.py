"""The summary of a finished run: results, samples, and the commands that take the model."""

import textwrap
from pathlib import Path
from typing import Any, NamedTuple

from engine.format import duration, format_bytes, quantity
from stages.cli.command import command_line
from stages.cli.console import Console
from stages.runs.loop_state import LoopState


class RunReport(NamedTuple):
    """The stage's part of run.json's result and of the summary."""

    result: dict[str, Any]
    texts: list[tuple[str, str]]  # under headings
    rows: list[tuple[str, str]]  # the first is the result in short
    saved: str
    next_stages: list[str]  # that take the model


def print_summary(
    report: RunReport, noun: str, loop_state: LoopState, peak: int, folder: Path, data: str, console: Console
) -> None:
    """Prints the report of a run of steps or rounds (`noun`) on `data`, and `peak`, the most bytes that it took."""
    for heading, text in report.texts:
        console.print(f"\n{heading}", style="bold")
        console.print(textwrap.indent(text.strip("\n"), "  | ", lambda line: True))
    console.print()
    trained = f"{quantity(loop_state.step, noun)} in {duration(loop_state.seconds)}"
    if loop_state.predicted:
        steps, seconds = loop_state.predicted
        trained += f" ({steps:,} in {duration(seconds)} predicted)"
    if loop_state.refused:
        trained += f"; {quantity(loop_state.refused, 'step')} refused: not finite, the last in batch {loop_state.refused_batch}"
    rows = [*report.rows, ("trained", trained)]
    if noun == "step" and loop_state.best_step is not None:
        rows.append(("best", f"quick validation {loop_state.best:.3f}: {folder / 'checkpoints' / str(loop_state.best_step)}"))
    console.print_rows([*rows, ("memory", f"{format_bytes(peak)} at most"), ("saved", report.saved)])
    console.print("\nnext", style="bold")
    more: dict[str, tuple[object, ...]] = {"export": ("--out", Path("exported", folder.name))}
    if data == "shakespeare":
        more["generate"] = ("--prompt", "ROMEO:")
    for name in report.next_stages:
        console.print(f"  {command_line(name, '--model', folder, *more.get(name, ()))}")
