"""A small text, the arguments of a run that learns it in a second, and ways to stop that run."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 300  # seconds for a process to end, however loaded the machine is
WORDS = "the king and queen of a far land went down to sea where ships with red sails lay at anchor all day"


def write_text(path: Path, lines: int = 300) -> Path:
    """Sentences of few words: a text that a tiny model learns something about in a few steps."""
    draw, known = random.Random(0), WORDS.split()
    text = "\n".join(" ".join(draw.choice(known) for _ in range(8)).capitalize() + "." for _ in range(lines))
    path.write_text(text + "\n", encoding="utf-8")
    return path


def tiny(text: Path, folder: Path, *more: object) -> list[str]:
    """The arguments of a tiny run."""
    return list(map(str, ["tiny", "--data", text, "--out-dir", folder, "--batch", 4, "--context", 32, *more]))


def command(
    stage: str, *args: object, stdin: bytes | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    """`python -m stages.STAGE ARGS` from the checkout, its output kept."""
    return subprocess.run(
        typed(stage, *args),
        cwd=ROOT,
        input=stdin,
        capture_output=True,
        env=os.environ | (env or {}),
        check=False,
    )


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def typed(stage: str, *args: object) -> list[str]:
    """The words of a command."""
    return [sys.executable, "-m", f"stages.{stage}" if stage else "stages", *map(str, args)]


class Killed(BaseException):
    """Ends a run as kill -9 does: nothing is saved on the way out."""


def kill() -> None:
    raise Killed


def interrupt(number: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], object]) -> None:
    """Calls `act` in the middle of the loop, once a run has made so many steps."""
    from stages.runs import loop as run_loop

    count = run_loop.count_step

    def counting(loop: run_loop.Loop, *args: Any) -> None:
        count(loop, *args)
        if loop.loop_state.step == step:
            act()

    monkeypatch.setattr(run_loop, "count_step", counting)
