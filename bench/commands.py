"""What a person waits for: whole commands, from the key press, as their own processes.

    python -m bench.commands                   the default training run (three minutes), then the rest
    python -m bench.commands --max-time 20s    a shorter run: the times are as true, the bits per byte are not

Each figure stands beside the bar it is held to. Start-up figures are the second of two starts, when compiled programs are
in the cache. The last line is JSON.
"""

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import tyro

from engine.counting.hardware import clock


@dataclasses.dataclass(frozen=True)
class Flags:
    """What is measured."""

    max_time: str = "3m"
    """Training time of the run."""
    data: str = "shakespeare"


@dataclasses.dataclass(frozen=True)
class Figure:
    """One measured number and the most it may be."""

    name: str
    value: float
    unit: str
    bar: float

    @property
    def met(self) -> bool:
        return self.value <= self.bar


def main(args: list[str] | None = None) -> int:
    """Runs the commands, prints the table and, last, one line of JSON."""
    flags = tyro.cli(Flags, prog="python -m bench.commands", description=__doc__, args=args)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        train = ["stages.train", "--data", flags.data, "--max-time"]
        _run([*train, "1s", "--out-dir", str(Path(place) / "warm")])
        print(f"training for {flags.max_time} ...", flush=True)
        _run([*train, flags.max_time, "--out-dir", str(folder)])
        result = json.loads((folder / "run.json").read_text())["result"]
        _first_output(folder)
        token, said = _first_output(folder)
    help_seconds = min(_seconds(["stages.train", "--help"]) for _ in range(5))
    recompiles = re.search(r"(\d+) recompiles", said)
    figures = [
        Figure("validation, whole text", result["val_bits_per_byte"], "bits/byte", 2.12),
        Figure("command to first trained step", result["first_step_seconds"], "s", 15),
        Figure("peak memory of training", result["peak_rss_bytes"] / 1e9, "GB", 2),
        Figure("--help", help_seconds, "s", 0.3),
        Figure("command to first token", token, "s", 3),
        Figure("recompiles while generating", float(recompiles[1]) if recompiles else float("inf"), "", 0),
    ]
    for figure in figures:
        verdict = "" if figure.met else "   ** not met **"
        print(f"{figure.name:<30} {figure.value:8.3f} {figure.unit:<9}  at most {figure.bar:g}{verdict}")
    rows = [dataclasses.asdict(figure) | {"met": figure.met} for figure in figures]
    print(json.dumps({"max_time": flags.max_time, "train_result": result, "figures": rows}))
    return 0


def _run(command: list[str]) -> None:
    """Runs `python -m command` to its end. Raises SystemExit with what it said when it fails."""
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"python -m {' '.join(command)} ended with {done.returncode}:\n{done.stderr}")


def _seconds(command: list[str]) -> float:
    begin = clock()
    _run(command)
    return clock() - begin


def _first_output(model: Path) -> tuple[float, str]:
    """Seconds from starting `stages.generate` to the first byte of its text, and what it said on standard error."""
    command = [sys.executable, "-m", "stages.generate", "--model", str(model), "--prompt", "ROMEO:", "--temperature", "0.7"]
    begin = clock()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first = process.stdout.read(1)
        seconds = clock() - begin
        process.stdout.read()
        said = process.stderr.read().decode()
    if process.returncode or not first:
        raise SystemExit(f"stages.generate ended with {process.returncode}:\n{said}")
    return seconds, said


if __name__ == "__main__":
    sys.exit(main())
