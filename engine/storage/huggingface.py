"""Opens the model in a Hugging Face folder (config.json, safetensors, tokenizer, EOS ids), and writes one.

Nothing in a folder is ever run: no pickle is opened, no code is imported, nothing is fetched.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tokenizers

from engine.errors import UserError
from engine.files import write_json
from engine.model.config import ModelConfig
from engine.storage import safetensors, safetensors_writer
from engine.storage.architectures import DEFAULTS, config_from_json, config_to_json, note_unknown_json
from engine.storage.hub import cached_id
from engine.storage.tensor_layout import (
    HUGGING_FACE_NAMES,
    StoredModel,
    check_tensors,
    file_tensors,
    layout_of,
)
from engine.text import OnProgress
from engine.text.tokenizer import GENERATION, ModelTokenizer, Tokenizer, save_tokenizer
from engine.untrusted import build_tokenizer, quote, read_json_object, read_text

# by the names of SamplingParams
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
MAX_EOS_IDS = 64
MAX_TOKENIZER_BYTES = 64 * 2**20  # the largest has 17 million


def open_model(path: Path) -> StoredModel:
    """Opens a folder: checks its architecture and tensors against one another; reads no weights."""
    config_file = path / "config.json"
    fields = read_json_object(config_file)
    cfg = config_from_json(fields, config_file)
    files = safetensors.read_folder(path)
    stored = {name: tensor for name, tensor in files.items() if not name.endswith(".rotary_emb.inv_freq")}
    head = None
    if cfg.tied:
        head = stored.pop(HUGGING_FACE_NAMES["head"], None)
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    leaves = check_tensors(layout_of(cfg, HUGGING_FACE_NAMES), shapes, path)
    for name, tensor in stored.items():
        if tensor.dtype not in safetensors.FLOATS:
            readable = ", ".join(safetensors.FLOATS)
            raise UserError(
                f"{tensor.path}: the tensor {quote(name)} is {tensor.dtype}; weights are read as {readable}."
            )
    # Of a head that differs nobody knows whether it is meant, or the embedding.
    if head and not _are_equal(head, stored[HUGGING_FACE_NAMES["embed"]]):
        raise UserError(
            f"{path} says tie_word_embeddings but has a lm_head.weight that differs from its embedding."
        )

    def read_rows(tensor: str, start: int, stop: int) -> np.ndarray:
        return safetensors.read_slice(stored[tensor], start, stop)

    hub_id = cached_id(path)  # `_name_or_path` is often the parent's, whose weights are others
    with_defaults = DEFAULTS[fields["model_type"]] | fields
    return StoredModel(
        name=hub_id.partition("/")[2] or path.resolve().name,
        cfg=cfg,
        leaves=leaves,
        read_rows=read_rows,
        read_tokenizer=functools.partial(load_tokenizer, path, cfg.vocab, fields.get("eos_token_id")),
        context=with_defaults["max_position_embeddings"],
        hub_id=hub_id,
        notes=note_unknown_json(fields, config_file),
    )


def read_config(path: Path) -> ModelConfig:
    return config_from_json(read_json_object(path / "config.json"), path / "config.json")


def load_tokenizer(folder: Path, vocab: int | None = None, eos: Any = None) -> ModelTokenizer:
    """Loads what `save_tokenizer`, or a Hugging Face export, put into `folder`, with its chat
    template.

    `vocab`: the ids of the model it is for. `eos`: the field `eos_token_id` of config.json, where
    generation_config.json has none. The first of these ids ends a text where tokenizer_config.json
    names no eos_token. Raises UserError when a file is missing or damaged, and for a tokenizer that
    is no BPE that knows every byte, has more ids than `vocab`, or has no token that ends a text.
    """
    source = folder / "tokenizer.json"
    generation_file = folder / GENERATION
    if not source.is_file():
        raise _missing_tokenizer(folder)
    text = read_text(source, MAX_TOKENIZER_BYTES)
    inner = build_tokenizer(lambda: tokenizers.Tokenizer.from_str(text), source)
    generation = read_json_object(generation_file) if generation_file.exists() else {}
    ids = vocab or max(inner.get_vocab().values(), default=0) + 1
    eos_ids = _read_eos_ids(generation.get("eos_token_id", eos), ids, generation_file)
    config = _read_tokenizer_config(folder)
    if config.get("eos_token") is None and eos_ids:
        config["eos_token"] = inner.id_to_token(eos_ids[0])
    fields = {name: value for name, value in config.items() if value is not None}
    tokenizer = build_tokenizer(lambda: Tokenizer(inner, fields, folder), folder)
    if vocab is not None and tokenizer.vocab > vocab:
        raise UserError(
            f"{source} has a token {tokenizer.vocab - 1:,} and the model only {vocab:,}: "
            "they do not belong together."
        )
    all_eos_ids = tuple(dict.fromkeys((tokenizer.eos_id, *eos_ids)))
    return ModelTokenizer(tokenizer, all_eos_ids, _read_sampling(generation))


def _missing_tokenizer(folder: Path) -> UserError:
    for other in ("tokenizer.model", "vocab.json"):
        if (folder / other).exists():
            return UserError(
                f"{folder} has no tokenizer.json, only {other}: "
                "save the model's fast tokenizer, which writes one."
            )
    return UserError(f"{folder} has no tokenizer.json.")


def _read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """Returns the fields of tokenizer_config.json, with the chat template in use, and with each
    special token's text where the file describes the token.
    """
    path = folder / "tokenizer_config.json"
    config = read_json_object(path) if path.exists() else {}
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        entries = [entry for entry in template if isinstance(entry, dict)]
        by_name = {entry.get("name"): entry.get("template") for entry in entries}
        template = by_name.get("default")
    template_file = folder / "chat_template.jinja"
    if template_file.is_file():
        template = read_text(template_file)
    if not isinstance(template, str | None):
        raise UserError(f"{path}: chat_template should be text.")
    config["chat_template"] = template
    for name, value in config.items():
        if name.endswith("_token") and isinstance(value, dict):
            config[name] = value.get("content")
    return config


def _read_eos_ids(value: Any, vocab: int, path: Path) -> list[int]:
    if isinstance(value, list):
        ids = value[:MAX_EOS_IDS]
    elif value is None:
        ids = []
    else:
        ids = [value]
    for token in ids:
        if type(token) is not int or not 0 <= token < vocab:
            raise UserError(f"{path}: eos_token_id should be ids below {vocab:,}, not {quote(token)}.")
    return ids


def _read_sampling(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the recommended sampling: greedy where `do_sample` is false, whatever stands beside it."""
    if values.get("do_sample") is False:
        values = {**values, "temperature": 0.0, "top_k": None, "top_p": None, "min_p": None}
    return {name: values[name] for name in SAMPLING if values.get(name) is not None}


def _are_equal(first: safetensors.StoredTensor, second: safetensors.StoredTensor) -> bool:
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    rows = first.shape[0]
    for start in range(0, rows, 4096):
        stop = min(start + 4096, rows)
        data = safetensors.read_slice(first, start, stop).tobytes()
        if data != safetensors.read_slice(second, start, stop).tobytes():
            return False
    return True


def save_folder(
    folder: Path,
    cfg: ModelConfig,
    params: dict[str, Any],
    tokenizer: ModelTokenizer,
    *,
    dtype: str,
    report: OnProgress = None,
) -> None:
    """Writes config.json, model.safetensors, every weight in `dtype`, and what `save_tokenizer`
    writes.

    params, report: as in `file_tensors`. Raises UserError for an architecture that no family has.
    """
    write_json(folder / "config.json", config_to_json(cfg, dtype, save_tokenizer(folder, *tokenizer)))
    leaves = list(layout_of(cfg, HUGGING_FACE_NAMES))
    tensors = {leaf.name: jax.ShapeDtypeStruct(leaf.stored, dtype) for leaf in leaves}
    arrays = (array for _, array in file_tensors(leaves, params, report))
    safetensors_writer.write_file(folder / "model.safetensors", tensors, arrays)
