"""Saves and finds the draft of a model: one safetensors file beside it, with the model's digest and the answers' seconds.

    MODEL.draft.safetensors    beside MODEL.gguf
    FOLDER/draft.safetensors   in the folder of a run, of an adapter or of a Hugging Face model

Its tensor `ngrams` (E, 5) float32 holds each entry's context, as `NGrams.contexts`, its token and its chance.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import UserError
from engine.ngrams import LENGTHS, NGrams
from engine.storage.digest import digest
from engine.storage.huggingface import safetensors
from engine.storage.untrusted import quote

BASE, SECONDS, ROWS = "thrice.base", "thrice.answer_seconds", "ngrams"


def draft_path(model: Path) -> Path:
    """Returns where the draft of a .gguf file or of a folder lies."""
    return model.with_suffix(".draft.safetensors") if model.suffix == ".gguf" else model / "draft.safetensors"


def save_draft(path: Path, ngrams: NGrams, base: str) -> None:
    """Writes a draft, atomically. `base`: the digest of the params, as loaded, of the model whose answers were counted."""
    rows = np.column_stack([*ngrams.contexts(), ngrams.tokens, ngrams.chances]).astype(np.float32)
    safetensors.write_file(path, {ROWS: rows.shape}, "F32", [rows], {BASE: base, SECONDS: f"{ngrams.answer_seconds or 0:.3f}"})


def find_draft(model: Path, vocab: int, params: Any) -> tuple[NGrams | None, str]:
    """Returns the draft beside a model, if it is for these params, as loaded; else None, and why one that is there is left
    out."""
    path = draft_path(model)
    if not path.is_file():
        return None, ""
    try:
        ngrams, base = load_draft(path, vocab)
    except UserError as error:
        return None, f"The draft is left out: {error}"
    if base != (own := digest(params)):
        other = f"of the digest {quote(base[:16])}, and this one has {own[:16]!r}"
        return None, f"The draft {path} is left out: it was trained for another model, {other}; train it again."
    return ngrams, ""


def load_draft(path: Path, vocab: int) -> tuple[NGrams, str]:
    """Loads a draft for a model with this vocabulary, and the digest of the model it was trained for. Raises UserError."""
    tensors, metadata = safetensors.read_header(path)
    stored = tensors.get(ROWS)
    if len(tensors) != 1 or stored is None or stored.dtype != "F32" or stored.shape[1:] != (len(LENGTHS) + 2,):
        raise UserError(f"{path} holds no draft.")
    rows = safetensors.read_slice(stored, 0, stored.shape[0])
    numbers, chances = rows[:, :-1], rows[:, -1]
    if not ((numbers == np.floor(numbers)) & (numbers >= -1) & (numbers < vocab)).all() or not (rows[:, -2:] >= 0).all():
        raise UserError(f"{path} is damaged: it holds a number that is no token of {vocab:,}.")
    if not (chances <= 1).all() or not len(rows):
        raise UserError(f"{path} is damaged: it holds a chance above 1, or nothing at all.")
    seconds = metadata.get(SECONDS)
    if seconds and not re.fullmatch(r"[0-9]{1,9}\.[0-9]{3}", seconds):
        raise UserError(f"{path} is damaged: {quote(seconds)} is no number of seconds.")
    ngrams = NGrams.from_contexts(
        vocab, numbers[:, : len(LENGTHS)].T, numbers[:, -1], chances, float(seconds) if seconds else None
    )
    return ngrams, metadata.get(BASE, "")
