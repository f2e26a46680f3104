"""Opens the model in a Hugging Face folder (config.json, safetensors, tokenizer, EOS ids), and writes one.

Nothing in a folder is ever run: no pickle is opened, no code is imported, nothing is fetched.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import tokenizers

from engine.errors import UserError
from engine.files import write_json
from engine.model.config import ModelConfig
from engine.storage.huggingface import safetensors
from engine.storage.huggingface.config import (
    DEFAULTS,
    config_from,
    config_to,
    note_unknown,
    read_eos_ids,
    read_sampling,
    write_sampling,
)
from engine.storage.huggingface.hub import cached_id
from engine.storage.tensor_layout import StoredModel, check_tensors, layout_of, split_params, tensor_names
from engine.untrusted import quote, read_json_object, read_text
from engine.text import OnProgress
from engine.text.tokenizer import MAX_TOKENIZER_BYTES, build_tokenizer

TENSOR_NAMES = tensor_names("model.layers.{}.", {
    "embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head", "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm", "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
    "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm", "out": "self_attn.o_proj", "gate": "mlp.gate_proj",
    "up": "mlp.up_proj", "down": "mlp.down_proj",
})  # fmt: skip


def open_model(path: Path) -> StoredModel:
    """Opens a folder: checks its architecture, tensors and tokenizer against one another; reads no weights."""
    fields = read_json_object(path / "config.json")
    cfg = config_from(fields, path / "config.json")
    files = safetensors.read_folder(path)
    stored = {name: tensor for name, tensor in files.items() if not name.endswith(".rotary_emb.inv_freq")}
    head = stored.pop(TENSOR_NAMES["head"], None) if cfg.tied else None
    leaves = check_tensors(layout_of(cfg, TENSOR_NAMES), {name: tensor.shape for name, tensor in stored.items()}, path)
    for name, tensor in stored.items():
        if tensor.dtype not in safetensors.FLOATS:
            readable = ", ".join(safetensors.FLOATS)
            raise UserError(f"{tensor.path}: the tensor {quote(name)} is {tensor.dtype}; weights are read as {readable}.")
    if head and not _are_equal(head, stored[TENSOR_NAMES["embed"]]):  # which of the two is meant cannot be known
        raise UserError(f"{path} says tie_word_embeddings but has a lm_head.weight that differs from its embedding.")
    rows = lambda name, start, stop: safetensors.read_slice(stored[name], start, stop)
    hub_id = cached_id(path)  # `_name_or_path` is often the parent's, whose weights are others
    name = hub_id.partition("/")[2] or path.resolve().name
    context = (DEFAULTS[fields["model_type"]] | fields)["max_position_embeddings"]
    generation = path / "generation_config.json"
    sampling = read_sampling(read_json_object(generation)) if generation.exists() else {}
    tokenizer, notes = _read_tokenizer(path, fields, cfg.vocab), note_unknown(fields, path / "config.json")
    return StoredModel(name, cfg, leaves, rows, *tokenizer, context, sampling, hub_id, notes)


def read_config(path: Path) -> ModelConfig:
    """Reads the architecture from a folder's config alone."""
    return config_from(read_json_object(path / "config.json"), path / "config.json")


def _are_equal(first: safetensors.StoredTensor, second: safetensors.StoredTensor) -> bool:
    read = lambda stored, start: safetensors.read_slice(stored, start, min(start + 4096, first.shape[0])).tobytes()
    same_kind = (first.shape, first.dtype) == (second.shape, second.dtype)
    return same_kind and all(read(first, start) == read(second, start) for start in range(0, first.shape[0], 4096))


def _read_tokenizer(
    path: Path, fields: dict[str, Any], vocab: int
) -> tuple[tokenizers.Tokenizer, dict[str, Any], tuple[int, ...]]:
    """Returns a folder's tokenizer, its config, and its EOS ids, the tokenizer's own first."""
    source = path / "tokenizer.json"
    if not source.is_file():
        other = next((name for name in ("tokenizer.model", "vocab.json") if (path / name).exists()), None)
        instead = f", only {other}: save the model's fast tokenizer, which writes one" if other else ""
        raise UserError(f"{path} has no tokenizer.json{instead}.")
    text = read_text(source, MAX_TOKENIZER_BYTES)
    tokenizer = build_tokenizer(lambda: tokenizers.Tokenizer.from_str(text), source)
    config, generation = (
        read_json_object(path / name) if (path / name).exists() else {}
        for name in ("tokenizer_config.json", "generation_config.json")
    )
    config |= {"chat_template": _template(path, config)}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        if isinstance(config.get(name), dict):
            config[name] = config[name].get("content")
    eos_ids = read_eos_ids(generation.get("eos_token_id", fields.get("eos_token_id")), vocab, path)
    if config.get("eos_token") is None and eos_ids:
        config["eos_token"] = tokenizer.id_to_token(eos_ids[0])
    eos = config.get("eos_token")
    if eos is None:
        raise UserError(f"{path} does not say which token ends a text: neither eos_token nor eos_token_id is given.")
    own = tokenizer.token_to_id(eos) if isinstance(eos, str) else None
    if own is None:
        raise UserError(f"{path}: the tokenizer has no token {quote(eos)}, its own eos_token.")
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    if largest >= vocab:
        raise UserError(f"{source} has a token {largest:,} and the model only {vocab:,}: they do not belong together.")
    known = {name: value for name, value in config.items() if value is not None}
    return tokenizer, known, tuple(dict.fromkeys((own, *eos_ids)))


def _template(path: Path, config: dict[str, Any]) -> str | None:
    """Returns the chat template: from its own file, or the only or default one of tokenizer_config.json."""
    file = path / "chat_template.jinja"
    if file.is_file():
        return read_text(file)
    template = config.get("chat_template")
    if isinstance(template, list):
        default = (item for item in template if isinstance(item, dict) and item.get("name") == "default")
        template = next(default, {}).get("template")
    if not isinstance(template, str | None):
        raise UserError(f"{path / 'tokenizer_config.json'}: chat_template should be text.")
    return template


def save_folder(
    folder: Path, cfg: ModelConfig, params: dict[str, Any], tokens: dict[str, Any], *, dtype: str,
    sampling: Mapping[str, Any] | None = None, report: OnProgress = None,
) -> None:  # fmt: skip
    """Writes config.json, generation_config.json and model.safetensors, every weight in `dtype`; no tokenizer.

    params, report: as in `split_params`. `tokens`: bos_token_id, eos_token_id and pad_token_id, if any. `sampling`: the
    recommended one. Raises UserError for an architecture that no family has.
    """
    write_json(folder / "config.json", config_to(cfg, dtype, tokens))
    write_json(folder / "generation_config.json", tokens | write_sampling(sampling or {}))
    leaves = list(layout_of(cfg, TENSOR_NAMES))
    tensors = {part.name: jax.ShapeDtypeStruct(part.shape, dtype) for leaf in leaves for part in leaf.parts}
    arrays = (array for _, array in split_params(leaves, params, report))
    safetensors.write_file(folder / "model.safetensors", tensors, arrays)
