"""A run folder's files: finds the newest finished run, reads its JSON files, checks them by their manifest.

runs/NAME/config.json      the architecture
          run.json         how it was trained, and at last the result
          tokenizer/       as Hugging Face's libraries read it; generation_config.json: which tokens end a text, and sampling
          manifest.json    SHA-256 of the files above
          checkpoints/STEP/   of a LoRA run, an adapter's folder as PEFT reads it (`checkpoint.py`)
"""

from pathlib import Path
from typing import Any

from engine import manifest
from engine.errors import UserError
from engine.format import quantity
from engine.model.config import ModelConfig
from engine.untrusted import read_json_object

RUNS = Path("runs")
MAX_JSON_BYTES = 16 * 2**20
TOY_STEPS = 100
UNFINISHED = "not finished"


def newest_run() -> tuple[Path, tuple[str, ...]]:
    """Returns the newest finished run's folder, and a note that names it and the newer ones that
    are passed over.

    A toy (see `_reason_against`) is used only when there is nothing else. Raises UserError when no
    run has finished.
    """
    passed: dict[Path, str] = {}
    runs = [file.parent for file in RUNS.glob("*/run.json")]
    for run in sorted(runs, key=lambda run: (run / "run.json").stat().st_mtime, reverse=True):
        reason = _reason_against(run)
        if not reason:
            return run, (f"using {run}{_passed_note(passed)}",)
        passed[run] = reason
    for run, reason in passed.items():
        if reason != UNFINISHED:
            return run, (f"using {run} ({reason}), as no other run is finished",)
    if passed:
        first = next(iter(passed))
        raise UserError(
            f"No run in {RUNS}/ is finished. Finish {first}, or name it as the model to take it as it is."
        )
    raise UserError(
        f"There is no trained model in {RUNS}/: "
        "run `python -m stages.train` first, or name a model by its folder."
    )


def _passed_note(passed: dict[Path, str]) -> str:
    """Returns what follows a used run's name in its note: the first two of the newer runs that were
    passed over, each with the reason, and how many more there are.
    """
    if not passed:
        return ", the newest run"
    names = [f"{run} ({reason})" for run, reason in passed.items()]
    more = ""
    if len(names) > 2:
        more = f" and {len(names) - 2} more"
    return f"; passed over {', '.join(names[:2])}{more}: name one to use it"


def _reason_against(run: Path) -> str:
    """Returns why a run is passed over, or "": it has no result, which is written last, or no
    weights; or it is a toy.

    Toys are those of fewer than TOY_STEPS from random weights: they show how training works.
    """
    try:
        record = read_json(run / "run.json")
        if not (record.get("result") and read_config(run) and any(run.glob("checkpoints/[0-9]*"))):
            return UNFINISHED
        if record.get("stage") == "train":
            steps = record["result"].get("steps", TOY_STEPS)
        else:
            steps = TOY_STEPS
        if steps < TOY_STEPS:
            return f"only {quantity(steps, 'step')}"
        return ""
    except (UserError, OSError, AttributeError, TypeError):
        return UNFINISHED


def verify(folder: Path) -> tuple[str, ...]:
    """Raises UserError when one of a run's own files is damaged; returns a note when the run has no
    manifest to tell.
    """
    for _ in range(2):  # a run that ends meanwhile writes them anew
        if not (folder / manifest.NAME).exists():
            return (f"{folder} has no {manifest.NAME}: its config and tokenizer are not checked",)
        damaged = manifest.verify(folder, extra=False)
        if not damaged:
            return ()
    raise UserError(
        f"The run {folder} is damaged: {'; '.join(damaged)}. Restore it from a copy, "
        f"or train anew in its place; after a change of your own, remove {folder / manifest.NAME}."
    )


def read_json(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path, MAX_JSON_BYTES)
    except UserError as error:
        raise UserError(f"{error} Restore it from a copy, or train anew in its place.") from None


def read_config(folder: Path) -> ModelConfig:
    path = folder / "config.json"
    fields = read_json(path)
    try:
        return ModelConfig.from_json(fields)
    except (TypeError, UserError) as error:
        raise UserError(f"{path} does not describe a model. {error}") from None
