"""A run folder's files: finds the newest run, reads its JSON files, reads and writes its tokenizer.

runs/NAME/config.json      the architecture
          run.json         how it was trained, and at last the result
          tokenizer/       as Hugging Face's libraries read it; generation_config.json: which tokens end a text
          adapter/         the adapter that a LoRA run trained
          checkpoints/STEP/
"""

from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.files import write_json
from engine.model.config import ModelConfig
from engine.storage.untrusted import read_json_object
from engine.text.tokenizer import Tokenizer, load_tokenizer

ROOT = Path("runs")
ADAPTER = "adapter"
MAX_JSON_BYTES = 16 * 2**20


def newest_run() -> Path:
    """Returns the folder of the run with the newest checkpoint."""
    runs = [path.parent.parent for path in ROOT.glob("*/checkpoints/*/") if path.name.isdigit()]
    if not runs:
        raise UserError(f"There is no trained model in {ROOT}/: run `python -m stages.train` first, or give --model FOLDER.")
    return max(runs, key=lambda run: max(step.stat().st_mtime for step in (run / "checkpoints").iterdir()))


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file of a run."""
    try:
        return read_json_object(path, MAX_JSON_BYTES)
    except UserError as error:
        raise UserError(f"{error} Restore it from a copy, or train anew with --overwrite.") from None


def read_config(folder: Path) -> ModelConfig:
    """Returns the architecture of a run."""
    try:
        return ModelConfig.from_json(read_json(folder / "config.json"))
    except TypeError as error:
        raise UserError(f"{folder / 'config.json'} does not describe a model: {error}.") from None


def read_tokenizer(folder: Path) -> tuple[Tokenizer, tuple[int, ...]]:
    """Returns a run's tokenizer and its EOS ids, the tokenizer's own first."""
    tokenizer = load_tokenizer(folder / "tokenizer")
    generation = folder / "tokenizer" / "generation_config.json"
    eos_ids = read_json(generation).get("eos_token_id", ()) if generation.exists() else ()
    return tokenizer, tuple(dict.fromkeys((tokenizer.eos_id, *eos_ids)))


def save_tokenizer(folder: Path, tokenizer: Tokenizer, eos_ids: tuple[int, ...]) -> None:
    """Writes a run's tokenizer, chat template and EOS ids."""
    tokenizer.save(folder / "tokenizer")
    write_json(folder / "tokenizer" / "generation_config.json", {"eos_token_id": list(eos_ids)})
