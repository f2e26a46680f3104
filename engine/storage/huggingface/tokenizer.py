"""Reads and writes what lies beside a model's weights: its tokenizer, and generation_config.json (EOS ids, sampling)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.files import write_json
from engine.text.tokenizer import ModelTokenizer, Tokenizer, load_tokenizer
from engine.untrusted import quote, read_json_object

GENERATION = "generation_config.json"
MAX_EOS_IDS = 64
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")  # by the names of SamplingParams


def read_tokenizer(folder: Path, vocab: int, eos: Any = None) -> ModelTokenizer:
    """Reads what a folder has beside the weights of a model of `vocab` tokens.

    `eos`: the field `eos_token_id` of config.json, where generation_config.json has none. Raises UserError as `load_tokenizer`.
    """
    path = folder / GENERATION
    generation = read_json_object(path) if path.exists() else {}
    eos_ids = _read_eos_ids(generation.get("eos_token_id", eos), vocab, path)
    tokenizer = load_tokenizer(folder, vocab, eos_ids)
    return ModelTokenizer(tokenizer, tuple(dict.fromkeys((tokenizer.eos_id, *eos_ids))), _read_sampling(generation))


def save_tokenizer(folder: Path, tokenizer: Tokenizer, eos_ids: Sequence[int], sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Writes a tokenizer, its chat template, the EOS ids and the recommended sampling, as `read_tokenizer` reads them.

    Returns the fields that config.json has of it: eos_token_id, and bos_token_id and pad_token_id if there are such tokens.
    """
    tokens: dict[str, Any] = {"eos_token_id": list(eos_ids) if len(eos_ids) > 1 else eos_ids[0]}
    for name in ("bos_token", "pad_token"):
        token = tokenizer.id_of(tokenizer.special_names.get(name, ""))
        tokens |= {} if token is None else {f"{name}_id": token}
    tokenizer.save(folder)
    write_json(folder / GENERATION, tokens | _write_sampling(sampling))
    return tokens


def _read_eos_ids(value: Any, vocab: int, path: Path) -> list[int]:
    """Returns the ids in the field `eos_token_id`: null, an id, or a list of them. Raises UserError for anything else."""
    ids = value[:MAX_EOS_IDS] if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        if type(token) is not int or not 0 <= token < vocab:
            raise UserError(f"{path}: eos_token_id should be ids below {vocab:,}, not {quote(token)}.")
    return ids


def _read_sampling(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the recommended sampling: greedy where `do_sample` is false, whatever stands beside it."""
    greedy = {"temperature": 0.0, "top_k": None, "top_p": None, "min_p": None} if values.get("do_sample") is False else {}
    return {name: value for name in SAMPLING if (value := {**values, **greedy}.get(name)) is not None}


def _write_sampling(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Returns fields from which `_read_sampling` reads the same, and transformers too."""
    return {"do_sample": sampling.get("temperature") != 0, **sampling} if sampling else {}
