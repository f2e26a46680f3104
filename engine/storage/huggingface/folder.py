"""Hugging Face folders, read and written: config.json, safetensors, tokenizer, chat template, what ends a completion.

Nothing in a folder is ever run: no pickle is opened, no code of the folder's is imported, nothing is fetched.
"""

from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.files import write_json
from engine.model.config import ModelConfig
from engine.storage.huggingface import safetensors
from engine.storage.huggingface.config import config_from, config_to
from engine.storage.huggingface.tokenizer import SMALL, read_tokenizer
from engine.storage.loaded_model import LoadedModel, OnConfig, Report
from engine.storage.tensor_layout import KINDS, check_tensors, layout_of, read_params, split_params
from engine.storage.untrusted import build_tokenizer, quote, read_json_object
from engine.text.tokenizer import Tokenizer

_LAYER = "model.layers.{}."
NAMES = {
    "embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight",
    "attn_norm": _LAYER + "input_layernorm.weight", "mlp_norm": _LAYER + "post_attention_layernorm.weight",
    **{part: f"{_LAYER}self_attn.{part}_proj.weight" for part in "qkv"},
    **{f"{part}_bias": f"{_LAYER}self_attn.{part}_proj.bias" for part in "qkv"},
    "q_norm": _LAYER + "self_attn.q_norm.weight", "k_norm": _LAYER + "self_attn.k_norm.weight",
    "out": _LAYER + "self_attn.o_proj.weight",
    **{part: f"{_LAYER}mlp.{part}_proj.weight" for part in ("gate", "up", "down")},
}  # fmt: skip


def load_folder(
    path: Path, *, dtype: str | None = None, report: Report = None, on_config: OnConfig = lambda cfg: None
) -> LoadedModel:
    """Loads the model in a Hugging Face folder; matrices in `dtype`, by default the config's own compute dtype.

    `report`: numbers read and in all. Raises UserError, in a sentence, for whatever is missing, damaged, unknown, or does
    not fit the rest; all of that is found before `on_config` gets the architecture and the first weight is read.
    """
    fields = read_json_object(path / "config.json", SMALL)
    cfg = config_from(fields, path / "config.json")
    stored = {
        name: tensor for name, tensor in safetensors.read_folder(path).items() if not name.endswith(".rotary_emb.inv_freq")
    }
    head = stored.pop(NAMES["head"], None) if cfg.tied else None
    leaves = check_tensors(layout_of(cfg, NAMES), {name: tensor.shape for name, tensor in stored.items()}, path)
    for name, tensor in stored.items():
        if tensor.dtype not in safetensors.DTYPES:
            readable = ", ".join(safetensors.DTYPES)
            raise UserError(f"{tensor.path}: the tensor {quote(name)} is {tensor.dtype}; weights are read as {readable}.")
    if head and not _hold_the_same(head, stored[NAMES["embed"]]):  # which of the two is meant cannot be known
        raise UserError(f"{path} says tie_word_embeddings but has a lm_head.weight that differs from its embedding.")
    tokenizer, tokenizer_config, ends = read_tokenizer(path, fields, cfg)
    on_config(cfg)
    rows = lambda name, start, stop: safetensors.read_rows(stored[name], start, stop)
    params = read_params(leaves, rows, dtype or cfg.dtype, report)
    words = build_tokenizer(lambda: Tokenizer(tokenizer, tokenizer_config), path / "tokenizer.json")
    return LoadedModel(path.resolve().name, cfg, params, words, ends, path)


def read_config(path: Path) -> ModelConfig:
    """Reads the architecture of the model in a folder, from its config alone; raises UserError as `load_folder` does."""
    return config_from(read_json_object(path / "config.json", SMALL), path / "config.json")


def _hold_the_same(one: safetensors.StoredTensor, other: safetensors.StoredTensor) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    chunks = [(start, min(start + 4096, one.shape[0])) for start in range(0, one.shape[0], 4096)]
    read = safetensors.read_rows
    return all(read(one, *chunk).tobytes() == read(other, *chunk).tobytes() for chunk in chunks)


def save_folder(
    folder: Path, cfg: ModelConfig, params: dict[str, Any], tokens: dict[str, Any], *, dtype: str, report: Report = None
) -> None:
    """Writes config.json, generation_config.json and model.safetensors, every weight in `dtype`; a tokenizer saves itself.

    params: Arrays, or Int8 and LoRA leaves, which are made plain one at a time. `tokens`: bos_token_id, eos_token_id and
    pad_token_id, where there are such. `report`: numbers written and in all. Raises UserError for an architecture that no
    family has.
    """
    write_json(folder / "config.json", config_to(cfg, dtype, tokens))
    write_json(folder / "generation_config.json", tokens)
    leaves = list(layout_of(cfg, NAMES))
    shapes = {part.name: part.shape for leaf in leaves for part in leaf.parts}
    arrays = (array for _, array in split_params(leaves, params, report))
    safetensors.write_file(folder / "model.safetensors", shapes, KINDS[dtype], arrays)
