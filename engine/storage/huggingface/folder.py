"""Hugging Face folders, read and written: config.json, safetensors, tokenizer, chat template, what ends a completion.

Nothing in a folder is ever run: no pickle is opened, no code of the folder's is imported, nothing is fetched.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import UserError
from engine.files import write_json
from engine.model.config import ModelConfig
from engine.model.paths import leaf_paths
from engine.model.weights.matmul import dense
from engine.storage.huggingface import safetensors
from engine.storage.huggingface.config import config_from, config_to
from engine.storage.huggingface.tokenizer import SMALL, read_tokenizer
from engine.storage.loaded_model import LoadedModel
from engine.storage.tensor_layout import check_tensors, layout_of, read_params, split_leaf
from engine.storage.untrusted import build_tokenizer, quote, read_json_object
from engine.text.tokenizer import Tokenizer

Report = Callable[[int, int], None] | None

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
    path: Path, *, dtype: str | None = None, report: Report = None, on_config: Callable[[ModelConfig], None] = lambda cfg: None
) -> LoadedModel:
    """Loads the model in a Hugging Face folder; matrices in `dtype`, by default the config's own compute dtype.

    `report`: numbers read and in all. `on_config` gets the architecture before the first weight is read. Raises UserError,
    in a sentence, for whatever is missing, damaged, unknown, or does not fit the rest; all of that is found before that.
    """
    fields = read_json_object(path / "config.json", SMALL)
    cfg = config_from(fields, path / "config.json")
    stored = {
        name: tensor for name, tensor in safetensors.read_folder(path).items() if not name.endswith(".rotary_emb.inv_freq")
    }
    tied_twice = cfg.tied and NAMES["head"] in stored
    head = stored.pop(NAMES["head"]) if tied_twice else None
    leaves = check_tensors(layout_of(cfg, NAMES), {name: tensor.shape for name, tensor in stored.items()}, path)
    for name, tensor in stored.items():
        if tensor.dtype not in safetensors.DTYPES:
            readable = ", ".join(safetensors.DTYPES)
            raise UserError(f"{tensor.path}: the tensor {quote(name)} is {tensor.dtype}; weights are read as {readable}.")
    if head is not None:
        _check_same(head, stored[NAMES["embed"]], path)
    tokenizer, tokenizer_config, ends = read_tokenizer(path, fields, cfg)
    on_config(cfg)
    rows = lambda name, start, stop: safetensors.read_rows(stored[name], start, stop)
    params = read_params(leaves, rows, dtype or cfg.dtype, report)
    words = build_tokenizer(lambda: Tokenizer(tokenizer, tokenizer_config), path / "tokenizer.json")
    return LoadedModel(path.resolve().name, cfg, params, words, ends, path)


def read_config(path: Path) -> ModelConfig:
    """Reads the architecture of the model in a folder, from its config alone; raises UserError as `load_folder` does."""
    return config_from(read_json_object(path / "config.json", SMALL), path / "config.json")


def _check_same(head: safetensors.StoredTensor, embed: safetensors.StoredTensor, path: Path) -> None:
    """Raises UserError when a tied model carries its table twice and the two differ: which is meant cannot be known."""
    same = head.shape == embed.shape and head.dtype == embed.dtype
    step = 4096
    for start in range(0, head.shape[0] if same else 0, step):
        stop = min(start + step, head.shape[0])
        pair = (safetensors.read_rows(tensor, start, stop).tobytes() for tensor in (head, embed))
        same = same and next(pair) == next(pair)
    if not same:
        raise UserError(f"{path} says tie_word_embeddings but has a lm_head.weight that differs from its embedding.")


def save_folder(
    folder: Path, cfg: ModelConfig, params: dict[str, Any], tokens: dict[str, Any], *, dtype: str, report: Report = None
) -> None:
    """Writes config.json, generation_config.json and model.safetensors, every weight in `dtype`; a tokenizer saves itself.

    params: Arrays, or Int8 and LoRA leaves, which are made plain one at a time. `tokens`: bos_token_id, eos_token_id and
    pad_token_id, where there are such. `report`: numbers written and in all. Raises UserError for an architecture that no
    family has.
    """
    named = {part.name: (leaf, part.shape) for leaf in layout_of(cfg, NAMES) for part in leaf.parts}
    kind = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]
    write_json(folder / "config.json", config_to(cfg, dtype, tokens))
    write_json(folder / "generation_config.json", tokens)
    values = leaf_paths(params)
    total, done = sum(math.prod(shape) for _, shape in named.values()), 0
    parts: dict[str, np.ndarray] = {}

    def value(name: str) -> np.ndarray:
        nonlocal parts, done
        if name not in parts:  # the parts of a leaf follow one another
            leaf = named[name][0]
            parts = split_leaf(leaf, dense(values[leaf.path]))
        done += parts[name].size
        if report:
            report(done, total)
        return parts[name]

    tensors = {name: (shape, safetensors.DTYPES[kind]) for name, (_, shape) in named.items()}
    safetensors.write_file(folder / "model.safetensors", tensors, value)
