"""What a person waits for: whole commands, from the key press, as their own processes.

    python -m bench.commands                   the default training run (three minutes), then the rest
    python -m bench.commands --max-time 20s    a shorter run: the times are as true, the bits per byte are not
    python -m bench.commands --of finetuning   SmolLM2: to its first token, adapted, adapted over int8
    python -m bench.commands --of reinforcing  SmolLM2: what two minutes of learning from a reward change

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
from typing import Any, Literal

import tyro

from engine.counting.hardware import clock


@dataclasses.dataclass(frozen=True)
class Flags:
    """What is measured."""

    of: Literal["training", "finetuning", "reinforcing"] = "training"
    """Which commands."""
    max_time: str | None = None
    """Training time of each run; by default 3m of training, 30s of fine-tuning, 2m of learning from a reward."""
    data: str = "shakespeare"
    """What is trained on."""
    model: str = "smollm2-135m-instruct"
    """What is fine-tuned."""


@dataclasses.dataclass(frozen=True)
class Figure:
    """One measured number and the most it may be; with `least`, the least."""

    name: str
    value: float
    unit: str
    bar: float
    least: bool = False

    @property
    def met(self) -> bool:
        return self.value >= self.bar if self.least else self.value <= self.bar


def main(args: list[str] | None = None) -> int:
    """Runs the commands, prints the table and, last, one line of JSON."""
    flags = tyro.cli(Flags, prog="python -m bench.commands", description=__doc__, args=args)
    measures = {"training": _training, "finetuning": _finetuning, "reinforcing": _reinforcing}
    with tempfile.TemporaryDirectory() as place:
        figures, about = measures[flags.of](flags, Path(place))
    for figure in figures:
        verdict = "" if figure.met else "   ** not met **"
        held = f"at {'least' if figure.least else 'most'} {figure.bar:g}"
        print(f"{figure.name:<30} {figure.value:8.3f} {figure.unit:<9}  {held}{verdict}")
    rows = [dataclasses.asdict(figure) | {"met": figure.met} for figure in figures]
    print(json.dumps(about | {"figures": rows}))
    return 0


Measured = tuple[list[Figure], dict[str, Any]]


def _training(flags: Flags, place: Path) -> Measured:
    """The default run, and the commands that need no other."""
    folder, max_time = place / "run", flags.max_time or "3m"
    train = ["stages.train", "--data", flags.data, "--max-time"]
    _run([*train, "1s", "--out-dir", str(place / "warm")])
    result = _result([*train, max_time], folder)
    _first_output(str(folder), "ROMEO:")
    token, said = _first_output(str(folder), "ROMEO:")
    help_seconds = min(_seconds(["stages.train", "--help"]) for _ in range(5))
    recompiles = re.search(r"(\d+) recompiles", said)
    return [
        Figure("validation, whole text", result["val_bits_per_byte"], "bits/byte", 2.12),
        Figure("command to first trained step", result["first_step_seconds"], "s", 15),
        Figure("peak memory of training", result["peak_rss_bytes"] / 1e9, "GB", 2),
        Figure("--help", help_seconds, "s", 0.3),
        Figure("command to first token", token, "s", 3),
        Figure("recompiles while generating", float(recompiles[1]) if recompiles else float("inf"), "", 0),
    ], {"max_time": max_time, "train_result": result}


def _finetuning(flags: Flags, place: Path) -> Measured:
    """A pre-trained model from its file to a first token, and adapted to the house voice over two kinds of base."""
    _first_output(flags.model, "The sea is")
    token, _ = _first_output(flags.model, "The sea is")
    adapt = ["stages.finetune", "--model", flags.model, "--general", "none", "--max-time", flags.max_time or "30s"]
    lora, int8 = (_result([*adapt, "--base", base], place / base) for base in ("float", "int8"))
    better = [result["before"]["held_out"] - result["after"]["held_out"] for result in (lora, int8)]
    return [
        Figure("command to first token", token, "s", 6),
        Figure("LoRA: share of the ceiling", lora["flops_share_of_ceiling"], "", 0.6, least=True),
        Figure("LoRA: peak memory", lora["peak_rss_bytes"] / 1e9, "GB", 2.5),
        Figure("LoRA: learnt of the voice", better[0], "nats", 0.1, least=True),
        Figure("over int8: peak memory", int8["peak_rss_bytes"] / 1e9, "GB", 1.5),
        Figure("over int8: learnt of the voice", better[1], "nats", 0.1, least=True),
    ], {"lora": lora, "int8": int8}


def _reinforcing(flags: Flags, place: Path) -> Measured:
    """The mean reward of answers to prompts that are not learnt from, after and before."""
    play = ["stages.reinforce", "--model", flags.model, "--max-time", flags.max_time or "2m"]
    result = _result(play, place / "rewarded")
    rise = result["held_out_reward_after"] - result["held_out_reward_before"]
    return [
        Figure("rise of the reward", rise, "", 0.05, least=True),
    ], {"result": result}


def _result(command: list[str], folder: Path) -> dict[str, Any]:
    """Runs a command that keeps a run in `folder`, and returns what it found."""
    print(f"python -m {' '.join(command)} ...", flush=True)
    _run([*command, "--out-dir", str(folder)])
    return json.loads((folder / "run.json").read_text())["result"]


def _run(command: list[str]) -> None:
    """Runs `python -m command` to its end. Raises SystemExit with what it said when it fails."""
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"python -m {' '.join(command)} ended with {done.returncode}:\n{done.stderr}")


def _seconds(command: list[str]) -> float:
    begin = clock()
    _run(command)
    return clock() - begin


def _first_output(model: str, prompt: str) -> tuple[float, str]:
    """Seconds from starting `stages.generate` to the first byte of its text, and what it said on standard error."""
    command = [sys.executable, "-m", "stages.generate", "--model", model, "--prompt", prompt, "--temperature", "0.7"]
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
