"""Measures whole commands as a person waits for them, each its own process, against the bar of each figure.

    python -m bench.commands                   the default training run (three minutes), then the rest
    python -m bench.commands --max-time 20s    a shorter run: the times are as true, the bits per byte are not
    python -m bench.commands --of resuming     a model of 135M: from a checkpoint to its next step

Start-up figures are the second of two starts, when compiled programs are in the cache, unless they
say otherwise.
"""

import dataclasses
import functools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal, NamedTuple

from bench.cli import BARS_HOLD, run_bench, run_module
from bench.machine import Json
from bench.terminal import print_table
from engine.errors import UserError


@dataclasses.dataclass(frozen=True)
class CommandsFlags:
    of: Literal["training", "resuming"] = "training"
    """Which commands."""
    max_time: str = "3m"
    """Training time of the run, unless it is resumed."""
    data: str = "shakespeare"
    """The corpus of the training run."""


class Measurement(NamedTuple):
    """A measured number, and the bar that it must not exceed."""

    name: str
    value: float
    unit: str
    bar: float


def measure_commands(flags: CommandsFlags) -> Json:
    """Runs the commands, prints the table and returns the document. Raises UserError when a command
    fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        if flags.of == "resuming":
            measure = resuming
        else:
            measure = functools.partial(training, max_time=flags.max_time)
        figures, printed = measure(Path(folder), flags.data)
    lines = []
    rows = []
    for figure in figures:
        is_met = figure.value <= figure.bar  # False also for NaN
        verdict = "" if is_met else "** not met **"
        lines.append((figure.name, f"{figure.value:.3f}", figure.unit, f"{figure.bar:g}", verdict))
        rows.append(figure._asdict() | {"met": is_met})
    print_table("Whole commands", ("", "measured", "", "at most", ""), lines)
    print(BARS_HOLD)
    return {"printed": printed, "bars_hold": BARS_HOLD, "rows": rows}


def training(folder: Path, data: str, max_time: str) -> tuple[list[Measurement], list[str]]:
    """Measures a training run, its start-up, and the start-up of generation from it; returns what
    the run printed, too.
    """
    train = ["stages.train", "--data", data, "--max-time"]
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
    cold, _ = _result([*train, "1s"], folder / "cold")
    result, printed = _result([*train, max_time], folder / "run")
    first, messages = _first_output(str(folder / "run"), "ROMEO:")
    recompiles = float("inf")  # where the messages do not say it
    match = re.search(r"(\d+) recompiles", messages)
    if match:
        recompiles = float(match[1])
    figures = [
        Measurement("validation, whole text", result["val_bits_per_byte"], "bits/byte", 1.95),
        Measurement("command to first trained step", result["first_step_seconds"], "s", 2),
        Measurement("the same, compiling first", cold["first_step_seconds"], "s", 9),
        Measurement("peak memory of training", result["peak_rss_bytes"] / 1e9, "GB", 2),
        Measurement("--help", statistics.median(_help_seconds() for _ in range(5)), "s", 0.3),
        Measurement("command to first token", first, "s", 0.7),
        Measurement("recompiles while generating", recompiles, "", 0),
        *_predictions(printed),
    ]
    return figures, printed


def _predictions(printed: list[str]) -> list[Measurement]:
    """Returns by how much the numbers of steps that a run predicted differ from the number that it
    trained, in percent. It predicts twice: before the run and after its first steps.
    """
    predicted = _steps_after("predicted", printed)
    trained = _steps_after("trained", printed)
    figures = []
    for when, count in zip(("before the run", "after its first steps"), predicted):
        off_by = 100 * abs(count / trained[-1] - 1)
        figures.append(Measurement(f"steps predicted {when}, off by", off_by, "%", 15))
    return figures


def _steps_after(word: str, printed: list[str]) -> list[int]:
    """Returns the numbers of steps in those of the printed lines that begin with a word."""
    counts = []
    for line in printed:
        match = re.match(rf" *{word} +([\d,]+) steps", line)
        if match:
            counts.append(int(match[1].replace(",", "")))
    return counts


def resuming(folder: Path, data: str) -> tuple[list[Measurement], list[str]]:
    """Measures a resumed run of smollm2-135m, its state in float32, from the command to the end of
    a step of 2 x 128 tokens.
    """
    command = ["stages.train", "smollm2-135m", "--data", data]
    command += ["--batch", "2", "--context", "128", "--optimizer", "adamw"]
    command += ["--steps", "1000", "--log-every", "1"]
    run = folder / "run"
    # The first run makes the checkpoint: SIGTERM lets it save. The second resumes from it, and fills
    # the cache of compiled programs. The third is measured. SIGKILL leaves the checkpoint as it is.
    _until_step(command, run, signal.SIGTERM)
    _until_step(command, run, signal.SIGKILL)
    seconds = _until_step(command, run, signal.SIGKILL)
    return [Measurement("command to first resumed step", seconds, "s", 10)], []


def _until_step(command: list[str], folder: Path, stop: signal.Signals) -> float:
    """Returns the seconds until a training run logs a step, which a signal then stops. Raises
    UserError if it ends before.
    """
    log = folder / "metrics.jsonl"
    log.unlink(missing_ok=True)
    words = [sys.executable, "-m", *command, "--out-dir", str(folder)]
    print(f"python -m {' '.join(command)} ...", flush=True)
    begin = time.perf_counter()
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while not (log.exists() and '"loss"' in log.read_text()):
            if process.poll() is not None:
                raise UserError(
                    f"python -m {' '.join(command)} ended with "
                    f"{process.returncode}:\n{process.communicate()[1]}"
                )
            time.sleep(0.01)
        seconds = time.perf_counter() - begin
        process.send_signal(stop)
    return seconds


def _result(command: list[str], folder: Path) -> tuple[Json, list[str]]:
    """Runs a training command to its end; returns the result in its run.json, and its printed lines."""
    print(f"python -m {' '.join(command)} ...", flush=True)
    printed = run_module([*command, "--out-dir", str(folder)]).splitlines()
    return json.loads((folder / "run.json").read_text())["result"], printed


def _help_seconds() -> float:
    begin = time.perf_counter()
    run_module(["stages.train", "--help"])
    return time.perf_counter() - begin


def _first_output(model: str, prompt: str) -> tuple[float, str]:
    """Returns the seconds from a second start of `stages.generate` to the first byte of its text,
    and its messages.
    """
    command = [sys.executable, "-m", "stages.generate", "--model", model]
    command += ["--prompt", prompt, "--temperature", "0.7"]
    for _ in range(2):
        begin = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout
            first = process.stdout.read(1)
            seconds = time.perf_counter() - begin
            messages = process.communicate()[1].decode()
        if process.returncode or not first:
            raise UserError(f"stages.generate ended with {process.returncode}:\n{messages}")
    return seconds, messages


if __name__ == "__main__":
    sys.exit(run_bench("bench.commands", __doc__, CommandsFlags, measure_commands))
