"""Opens the model in a Hugging Face folder (config.json, safetensors, tokenizer, EOS ids), and writes one.

Nothing in a folder is ever run: no pickle is opened, no code is imported, nothing is fetched.
"""

from pathlib import Path
from typing import Any

import jax

from engine.errors import UserError
from engine.files import write_json
from engine.model.config import ModelConfig
from engine.storage import safetensors, safetensors_writer
from engine.storage.architectures import DEFAULTS, config_from_json, config_to_json, note_unknown_json
from engine.storage.hub import cached_id
from engine.storage.tensor_layout import HUGGING_FACE_NAMES, StoredModel, check_tensors, file_tensors, layout_of
from engine.text import OnProgress
from engine.text.tokenizer import ModelTokenizer, load_tokenizer, save_tokenizer
from engine.untrusted import quote, read_json_object


def open_model(path: Path) -> StoredModel:
    """Opens a folder: checks its architecture and tensors against one another; reads no weights."""
    fields = read_json_object(path / "config.json")
    cfg = config_from_json(fields, path / "config.json")
    files = safetensors.read_folder(path)
    stored = {name: tensor for name, tensor in files.items() if not name.endswith(".rotary_emb.inv_freq")}
    head = stored.pop(HUGGING_FACE_NAMES["head"], None) if cfg.tied else None
    leaves = check_tensors(layout_of(cfg, HUGGING_FACE_NAMES), {name: tensor.shape for name, tensor in stored.items()}, path)
    for name, tensor in stored.items():
        if tensor.dtype not in safetensors.FLOATS:
            readable = ", ".join(safetensors.FLOATS)
            raise UserError(f"{tensor.path}: the tensor {quote(name)} is {tensor.dtype}; weights are read as {readable}.")
    if head and not _are_equal(head, stored[HUGGING_FACE_NAMES["embed"]]):  # which of the two is meant cannot be known
        raise UserError(f"{path} says tie_word_embeddings but has a lm_head.weight that differs from its embedding.")
    rows = lambda name, start, stop: safetensors.read_slice(stored[name], start, stop)
    hub_id = cached_id(path)  # `_name_or_path` is often the parent's, whose weights are others
    name = hub_id.partition("/")[2] or path.resolve().name
    context = (DEFAULTS[fields["model_type"]] | fields)["max_position_embeddings"]
    tokenizer = lambda: load_tokenizer(path, cfg.vocab, fields.get("eos_token_id"))
    return StoredModel(name, cfg, leaves, rows, tokenizer, context, hub_id, note_unknown_json(fields, path / "config.json"))


def read_config(path: Path) -> ModelConfig:
    return config_from_json(read_json_object(path / "config.json"), path / "config.json")


def _are_equal(first: safetensors.StoredTensor, second: safetensors.StoredTensor) -> bool:
    read = lambda stored, start: safetensors.read_slice(stored, start, min(start + 4096, first.shape[0])).tobytes()
    same_kind = (first.shape, first.dtype) == (second.shape, second.dtype)
    return same_kind and all(read(first, start) == read(second, start) for start in range(0, first.shape[0], 4096))


def save_folder(
    folder: Path, cfg: ModelConfig, params: dict[str, Any], tokenizer: ModelTokenizer, *, dtype: str, report: OnProgress = None
) -> None:
    """Writes config.json, model.safetensors, every weight in `dtype`, and what `save_tokenizer` writes.

    params, report: as in `file_tensors`. Raises UserError for an architecture that no family has.
    """
    write_json(folder / "config.json", config_to_json(cfg, dtype, save_tokenizer(folder, *tokenizer)))
    leaves = list(layout_of(cfg, HUGGING_FACE_NAMES))
    tensors = {leaf.name: jax.ShapeDtypeStruct(leaf.stored, dtype) for leaf in leaves}
    arrays = (array for _, array in file_tensors(leaves, params, report))
    safetensors_writer.write_file(folder / "model.safetensors", tensors, arrays)
