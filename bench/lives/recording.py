"""Runs the stages of a model's life as processes that record themselves, and reads what they recorded."""

import functools
import json
import shlex
from pathlib import Path

from bench.cli import Json, progress, run_module
from bench.stages.rows import ADAPTER
from engine.errors import UserError
from engine.model.config import preset

RATE = "2e-3"  # of each fine-tuning: with rates of their own, one could not see what each way of it does


def record_lives(preset_name: str, data: str, folder: Path, quick: bool) -> dict[str, Json]:
    """Trains a preset on `data`, and fine-tunes the result on the house voice: its bottom half frozen, by LoRA, and whole.

    Returns the lives `train`, `frozen`, `lora` and `all`, whose run folders lie in `folder` by these names. Raises UserError
    for a run that fails, or that was not recorded to its end.
    """
    seconds, tune_seconds = ("6s", "2s") if quick else ("60s", "15s")
    tune = ["stages.finetune", "--model", str(folder / "train"), "--data", "voice", "--general", "none"]
    tune += ["--learning-rate", RATE, "--max-time", tune_seconds]
    commands = {
        "train": ["stages.train", preset_name, "--data", data, "--max-time", seconds],
        "frozen": [*tune, "--freeze", f"bottom:{preset(preset_name).layers // 2}"],
        "lora": [*tune, "--lora", str(ADAPTER)],
        "all": [*tune, "--train", "all"],
    }
    lives = {}
    for name, command in commands.items():
        recording, command = folder / f"{name}.jsonl", [*command, "--out-dir", str(folder / name)]
        shown = shlex.join(["python", "-m", *command]).replace(f"{folder}/", "runs/")
        progress(shown)
        run_module([*command, "--record", str(recording)], functools.partial(_report, recording))
        lives[name] = read_life(recording) | {"command": shown}
    return lives


def _report(recording: Path) -> None:
    if events := _events(recording):
        progress(f"  step {events[-1]['step']:,}", replace=True)


def _events(recording: Path) -> list[Json]:
    """Returns the events so far, without a last line that was cut; none where there is no file."""
    lines = recording.read_text(encoding="utf-8").split("\n") if recording.exists() else [""]
    return [json.loads(line) for line in lines[:-1]]


def read_life(recording: Path) -> Json:
    """Returns a run's recorded events by kind. Raises UserError when they do not reach from its beginning to its end."""
    events = _events(recording)
    begin, steps, validation, frames, end = (
        [event for event in events if event["event"] == kind] for kind in ("begin", "step", "validation", "frame", "end")
    )
    if not (begin and frames and end):
        raise UserError(f"{recording} does not hold a run from its beginning to its end: start the run anew, with --record.")
    return {"begin": begin[0], "steps": steps, "validation": validation, "frames": frames, "end": end[-1]}
