"""Where a command asks for a model: what `--model` may be, and what comes of it."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine import format as words
from engine.counting.hardware import memory_limit_bytes
from engine.counting.params import count_params
from engine.errors import UserError, nearest
from engine.files import write_json
from engine.model.config import ModelConfig
from engine.storage import checkpoint
from engine.storage.assets import ASSETS, MODELS, fetch
from engine.storage.gguf.load import load_gguf
from engine.storage.huggingface.folder import load_folder
from engine.storage.loaded import LoadedModel
from engine.text.tokenizer import Tokenizer, load_tokenizer
from stages.runs import folder as run_folder
from stages.cli.console import Console

KINDS = (
    "a run folder, a step folder in it (runs/NAME/checkpoints/STEP), a Hugging Face folder, a .gguf file, or "
    + " or ".join(MODELS)
)
ENDS = "tokenizer/generation_config.json"
Report = Callable[[int, int], None] | None
Known = Callable[[ModelConfig], None]


@dataclasses.dataclass(frozen=True)
class Model:
    """A model to read: its weights, how text becomes tokens for it, and where both are from.

    params: a run's as they were saved (float32); others' matrices in the dtype asked for. `checkpoint` is what was read,
    `run` the run folder it lies in, if it is a run's. `start` are the ids put before a plain text; any of `ends` ends a
    completion.
    """

    name: str
    cfg: ModelConfig
    params: Any
    tokenizer: Tokenizer
    chat_template: str | None
    start: tuple[int, ...]
    ends: tuple[int, ...]
    checkpoint: Path
    run: Path | None
    damaged: list[str]


def load_model(given: str | None, *, dtype: str | None = None, report: Report = None, known: Known = lambda cfg: None) -> Model:
    """The model `--model` names; by default the run that was saved to last.

    `dtype` is that of the matrices of a model that is not a run of ours; by default its own compute dtype. `report`: what
    is done of the fetching or reading, and all of it. `known` is told the architecture as soon as it is, before weights
    are read. Raises UserError when there is none, it is damaged, it is of a kind that is not known here, or its weights
    alone are more than the memory there is.
    """

    def fitting(cfg: ModelConfig) -> None:
        known(cfg)
        check_room(str(given), cfg, dtype or cfg.dtype)

    if given in MODELS:
        file = fetch(given, report)["model"]
        return _from_elsewhere(load_gguf(file, dtype=dtype, report=report, known=fitting), file)
    path = Path(given).expanduser() if given else run_folder.newest_run()
    if path.suffix == ".gguf" and path.is_file():
        return _from_elsewhere(load_gguf(path, dtype=dtype, report=report, known=fitting), path)
    if _is_hugging_face(path):
        return _from_elsewhere(load_folder(path, dtype=dtype, report=report, known=fitting), path)
    return _run(path, given or str(path), known)


def check_room(name: str, cfg: ModelConfig, dtype: str) -> None:
    """Raises UserError when weights of this type are more than the host's memory, instead of being killed over them."""
    size, limit = count_params(cfg).total * (4 if dtype == "float32" else 2), memory_limit_bytes()
    if size > limit:
        raise UserError(f"The weights of {name} take {words.size(size)} in {dtype}, and {words.size(limit)} are here.")


def _is_hugging_face(path: Path) -> bool:
    """A config.json of theirs names a model_type; a run of ours has a run.json beside its own."""
    return (path / "config.json").is_file() and not (path / "run.json").exists()


def _from_elsewhere(loaded: LoadedModel, path: Path) -> Model:
    tokenizer = Tokenizer(loaded.tokenizer, loaded.tokenizer_config)
    return Model(
        loaded.name, loaded.cfg, loaded.params, tokenizer, tokenizer.config.get("chat_template"), tokenizer.start, loaded.ends,
        path, None, [],
    )  # fmt: skip


def _run(path: Path, given: str, known: Known) -> Model:
    run = _run_of(path, given)
    cfg = run_folder.read_config(run)
    tokenizer = load_tokenizer(run / "tokenizer")
    if tokenizer.vocab > cfg.vocab:
        raise UserError(
            f"{run / 'tokenizer'} has {tokenizer.vocab:,} tokens and the model {cfg.vocab:,}: one of them was replaced."
        )
    about = run_folder.read_json(run / "run.json")
    if about.get("learns", "").startswith("rank="):
        return _adapted(run, about, known)
    known(cfg)
    check_room(run.name, cfg, "float32")
    loaded = checkpoint.load_params(path)
    said = run_folder.read_json(run / ENDS) if (run / ENDS).exists() else {}
    return Model(
        name=run.name,
        cfg=cfg,
        params=loaded.params,
        tokenizer=tokenizer,
        chat_template=tokenizer.config.get("chat_template"),
        start=tokenizer.start,
        ends=tuple(dict.fromkeys((tokenizer.end, *said.get("eos_token_id", ())))),
        checkpoint=loaded.path,
        run=run,
        damaged=loaded.damaged,
    )


def _adapted(run: Path, about: dict[str, Any], known: Known) -> Model:
    """A run that learnt an adapter: the model it was learnt about, with the adapter on it and the run's own words."""
    from stages.runs.adapters import FOLDER, with_adapters

    if not (run / FOLDER).is_dir():
        raise UserError(
            f"{run} has no adapter yet: its fine-tuning was stopped. The same command goes on: {about.get('command')}"
        )
    try:
        base = load_model(about["base"]["model"], known=known)
    except UserError as error:
        raise UserError(f"{run} adapts {about['base']['model']}, which cannot be read: {error}") from None
    tokenizer = load_tokenizer(run / "tokenizer")
    said = run_folder.read_json(run / ENDS) if (run / ENDS).exists() else {}
    return dataclasses.replace(
        base, name=run.name, params=with_adapters(base, [run]), tokenizer=tokenizer,
        chat_template=tokenizer.config.get("chat_template"), ends=tuple(said.get("eos_token_id", base.ends)),
        checkpoint=run / FOLDER, run=run,
    )  # fmt: skip


def template_at(path: Path | None) -> str | None:
    """The chat template in the file that `--template` names; None when it names none."""
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"The template {path} cannot be read: {why}.") from error


def keep_words(run: Path, model: Model) -> None:
    """Writes into a run what makes it read text as `model` does: tokenizer, chat template, and what ends a completion."""
    model.tokenizer.save(run / "tokenizer")
    write_json(run / ENDS, {"eos_token_id": list(model.ends)})


def _run_of(path: Path, given: str) -> Path:
    """The run folder that a path lies in."""
    if (path / "checkpoints").is_dir() and (path / "run.json").exists():
        return path
    if (path / "params").is_dir() and path.parent.name == "checkpoints":
        return path.parent.parent
    if (path / "run.json").exists():
        raise UserError(f"{path} has no checkpoint yet: its run was stopped before the first one was saved.")
    if given in ASSETS:
        raise UserError(f"{given} is a text, not a model; --model takes {KINDS}.")
    if path.exists():
        raise UserError(f"{path} holds no model that is known here; --model takes {KINDS}.")
    raise UserError(f"There is no model at {path}; --model takes {KINDS}.{nearest(given, MODELS)}")


def say_damaged(model: Model, console: Console) -> None:
    """Names what was passed over on the way to a sound checkpoint."""
    for line in model.damaged:
        console.print(f"damaged: {line}", style="yellow")
    if model.damaged:
        console.print(f"using {model.checkpoint} instead", style="yellow")
