"""Opens the model in a Hugging Face folder, and writes one: config.json, safetensors, tokenizer, ends of completions.

Nothing in a folder is ever run: no pickle is opened, no code is imported, nothing is fetched.
"""

from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.files import write_json
from engine.model.config import ModelConfig
from engine.storage import Report
from engine.storage.huggingface import safetensors
from engine.storage.huggingface.config import config_from, config_to
from engine.storage.huggingface.tokenizer import read_tokenizer
from engine.storage.tensor_layout import KINDS, StoredModel, check_tensors, layout_of, split_params, tensor_names
from engine.storage.untrusted import quote, read_json_object

NAMES = tensor_names("model.layers.{}.", {
    "embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head", "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm", "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
    "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm", "out": "self_attn.o_proj", "gate": "mlp.gate_proj",
    "up": "mlp.up_proj", "down": "mlp.down_proj",
})  # fmt: skip


def open_folder(path: Path) -> StoredModel:
    """Reads and checks a folder but its weights. Raises UserError for whatever is damaged, unknown, or does not fit."""
    fields = read_json_object(path / "config.json")
    cfg = config_from(fields, path / "config.json")
    files = safetensors.read_folder(path)
    stored = {name: tensor for name, tensor in files.items() if not name.endswith(".rotary_emb.inv_freq")}
    head = stored.pop(NAMES["head"], None) if cfg.tied else None
    leaves = check_tensors(layout_of(cfg, NAMES), {name: tensor.shape for name, tensor in stored.items()}, path)
    for name, tensor in stored.items():
        if tensor.dtype not in safetensors.DTYPES:
            readable = ", ".join(safetensors.DTYPES)
            raise UserError(f"{tensor.path}: the tensor {quote(name)} is {tensor.dtype}; weights are read as {readable}.")
    if head and not _hold_the_same(head, stored[NAMES["embed"]]):  # which of the two is meant cannot be known
        raise UserError(f"{path} says tie_word_embeddings but has a lm_head.weight that differs from its embedding.")
    rows = lambda name, start, stop: safetensors.read_rows(stored[name], start, stop)
    return StoredModel(path.resolve().name, cfg, leaves, rows, *read_tokenizer(path, fields, cfg.vocab))


def read_config(path: Path) -> ModelConfig:
    """Reads the architecture from a folder's config alone; raises UserError as `open_folder` does."""
    return config_from(read_json_object(path / "config.json"), path / "config.json")


def _hold_the_same(one: safetensors.StoredTensor, other: safetensors.StoredTensor) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    read = lambda stored, start: safetensors.read_rows(stored, start, min(start + 4096, one.shape[0])).tobytes()
    return all(read(one, start) == read(other, start) for start in range(0, one.shape[0], 4096))


def save_folder(
    folder: Path, cfg: ModelConfig, params: dict[str, Any], tokens: dict[str, Any], *, dtype: str, report: Report = None
) -> None:
    """Writes config.json, generation_config.json and model.safetensors, every weight in `dtype`; no tokenizer.

    params, report: as in `split_params`. `tokens`: bos_token_id, eos_token_id and pad_token_id, if any. Raises UserError for
    an architecture that no family has.
    """
    write_json(folder / "config.json", config_to(cfg, dtype, tokens))
    write_json(folder / "generation_config.json", tokens)
    leaves = list(layout_of(cfg, NAMES))
    shapes = {part.name: part.shape for leaf in leaves for part in leaf.parts}
    arrays = (array for _, array in split_params(leaves, params, report))
    safetensors.write_file(folder / "model.safetensors", shapes, KINDS[dtype], arrays)
