"""Reads and writes a generation_config.json: EOS ids, and the recommended sampling, unchecked, by SamplingParams' names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.storage.untrusted import quote

MAX_EOS_IDS = 64
NAMES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def read_eos_ids(value: Any, vocab: int, path: Path) -> list[int]:
    """Returns the ids in the field `eos_token_id`: null, an id, or a list of them. Raises UserError for anything else."""
    ids = value[:MAX_EOS_IDS] if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        if type(token) is not int or not 0 <= token < vocab:
            raise UserError(f"{path}: eos_token_id should be ids below {vocab:,}, not {quote(token)}.")
    return ids


def read_sampling(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the recommended sampling: greedy where `do_sample` is false, whatever stands beside it."""
    greedy = {"temperature": 0.0, "top_k": None, "top_p": None, "min_p": None} if values.get("do_sample") is False else {}
    return {name: value for name in NAMES if (value := {**values, **greedy}.get(name)) is not None}


def write_sampling(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Returns fields from which `read_sampling` reads the same, and transformers too."""
    return {"do_sample": sampling.get("temperature") != 0, **sampling} if sampling else {}
