"""A run folder's files: finds the newest finished run, reads its JSON files, reads and writes its tokenizer.

runs/NAME/config.json      the architecture
          run.json         how it was trained, and at last the result
          tokenizer/       as Hugging Face's libraries read it; generation_config.json: which tokens end a text, and sampling
          adapter/         the adapter that a LoRA run trained
          checkpoints/STEP/
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.files import write_json
from engine.model.config import ModelConfig
from engine.storage.huggingface.generation_config import read_sampling, write_sampling
from engine.storage.untrusted import read_json_object
from engine.text.tokenizer import Tokenizer, load_tokenizer

ROOT = Path("runs")
ADAPTER = "adapter"
MAX_JSON_BYTES = 16 * 2**20


def newest_run() -> tuple[Path, tuple[str, ...]]:
    """Returns the newest finished run's folder, and a note that names it and the newer ones that are passed over.

    Raises UserError when no run in ROOT has finished.
    """
    passed: list[Path] = []
    runs = [file.parent for file in ROOT.glob("*/run.json")]
    for run in sorted(runs, key=lambda run: (run / "run.json").stat().st_mtime, reverse=True):
        if _is_finished(run):
            if not passed:
                return run, (f"using {run}, the newest run",)
            are = f"and {len(passed) - 1} more are" if len(passed) > 1 else "is"
            return run, (f"{passed[0]} {are} not finished; using {run}; --model {passed[0]} takes that one",)
        passed.append(run)
    if passed:
        raise UserError(f"No run in {ROOT}/ is finished. Finish {passed[0]}, or take it as it is with --model {passed[0]}.")
    raise UserError(f"There is no trained model in {ROOT}/: run `python -m stages.train` first, or give --model FOLDER.")


def _is_finished(run: Path) -> bool:
    """Whether a run has its result, which is written last, and what it trained can be there."""
    try:
        return bool(read_json(run / "run.json").get("result") and read_config(run) and any(run.glob("checkpoints/[0-9]*")))
    except (UserError, OSError):
        return False


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file of a run."""
    try:
        return read_json_object(path, MAX_JSON_BYTES)
    except UserError as error:
        raise UserError(f"{error} Restore it from a copy, or train anew with --overwrite.") from None


def read_config(folder: Path) -> ModelConfig:
    """Returns the architecture of a run."""
    fields = read_json(path := folder / "config.json")
    try:
        return ModelConfig.from_json(fields)
    except (TypeError, UserError) as error:
        raise UserError(f"{path} does not describe a model. {error}") from None


def read_tokenizer(folder: Path) -> tuple[Tokenizer, tuple[int, ...], dict[str, Any]]:
    """Returns a run's tokenizer, its EOS ids, the tokenizer's own first, and its recommended sampling."""
    tokenizer = load_tokenizer(folder / "tokenizer")
    path = folder / "tokenizer" / "generation_config.json"
    generation = read_json(path) if path.exists() else {}
    eos_ids = dict.fromkeys((tokenizer.eos_id, *generation.get("eos_token_id", ())))
    return tokenizer, tuple(eos_ids), read_sampling(generation)


def save_tokenizer(folder: Path, tokenizer: Tokenizer, eos_ids: tuple[int, ...], sampling: Mapping[str, Any]) -> None:
    """Writes a run's tokenizer, chat template, EOS ids and recommended sampling."""
    tokenizer.save(folder / "tokenizer")
    generation = {"eos_token_id": list(eos_ids)} | write_sampling(sampling)
    write_json(folder / "tokenizer" / "generation_config.json", generation)
