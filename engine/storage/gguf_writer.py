"""Writes a model and its tokenizer into a GGUF file (llama.cpp)."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from gguf import GGUFWriter, LlamaFileType
from gguf.constants import GGMLQuantizationType, GGUFValueType
from gguf.quants import quant_shape_to_byte_shape, quantize
from tokenizers import models

from engine.errors import UserError
from engine.model.config import Llama3Scaling, ModelConfig
from engine.model.paths import leaf_paths
from engine.model.weights.block_layout import GROUP, ROUNDED, unpack_blocks
from engine.model.weights.blocks import round_to_blocks, served_kind
from engine.model.weights.plain import as_weight
from engine.storage.architectures import architecture_of, config_to_gguf
from engine.storage.gguf import (
    BYTE,
    CONTROL,
    NORMAL,
    PRE_TOKENIZERS,
    SAMPLING_KEYS,
    SPECIAL_TOKENS,
    UNUSED,
    USER_DEFINED,
    interleaved_names,
    regroup_rows,
    set_pre_tokenizer,
)
from engine.storage.rope_scaling import FREQUENCIES, rope_factors
from engine.storage.tensor_layout import DTYPE_NAMES, GGUF_NAMES, Leaf, file_tensors, layout_of
from engine.text import OnProgress
from engine.text.tokenizer import Tokenizer

FALLBACK_PRE_TOKENIZER = "llama-bpe"  # named where llama.cpp has no name for a pre-tokenizer


def save_gguf(
    path: Path,
    cfg: ModelConfig,
    params: dict[str, Any],
    metadata: dict[str, Any],
    *,
    name: str,
    dtype: str,
    report: OnProgress = None,
) -> None:
    """Writes the model to `path`, a temporary file; matrices in `dtype`, gains and biases in
    float32.

    params, report: as in `file_tensors`. Blocks of kinds in ROUNDED stay. With q4_0 and q4_1 embedding and head have 8
    bits, as in `serve --weights q4`. A matrix whose rows are no whole number of blocks of 32
    becomes F16. Raises UserError for an architecture without a name in GGUF.
    """
    architecture = architecture_of(cfg)
    wanted = GGMLQuantizationType[DTYPE_NAMES[dtype]]
    file_type = LlamaFileType.ALL_F32
    if wanted != GGMLQuantizationType.F32:
        file_type = LlamaFileType[f"MOSTLY_{wanted.name}"]
    writer = GGUFWriter(path, architecture)
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)
    for key, value in config_to_gguf(cfg).items():
        _add_value(writer, f"{architecture}.{key}", value)
    for key, value in metadata.items():
        _add_value(writer, key, value)
    leaves = list(layout_of(cfg, GGUF_NAMES))
    values = leaf_paths(params)
    kinds = {}
    for leaf in leaves:
        kind = _kind_in_file(leaf, as_weight(values[leaf.path]).kind, wanted)
        kinds[leaf.name] = kind
        size = math.prod(quant_shape_to_byte_shape(leaf.stored, kind))
        writer.add_tensor_info(leaf.name, leaf.stored, np.dtype(np.float32), size, kind)
    if isinstance(cfg.rope_scaling, Llama3Scaling):
        factors = rope_factors(cfg.rope_scaling, cfg.rope_theta, cfg.head_dim)
        writer.add_tensor_info(
            FREQUENCIES, factors.shape, factors.dtype, factors.nbytes, GGMLQuantizationType.F32
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    interleaved = interleaved_names(leaves, architecture)
    for leaf, array in file_tensors(leaves, params, report):
        is_encoded = array.dtype == np.uint8  # bytes of blocks
        rows = np.ascontiguousarray(array, None if is_encoded else np.float32)
        if leaf.name in interleaved:
            rows = regroup_rows(rows, 2, cfg.head_dim // 2)
        if not is_encoded:
            rows = _encode(rows, kinds[leaf.name])
        writer.write_tensor_data(rows)
    if isinstance(cfg.rope_scaling, Llama3Scaling):
        writer.write_tensor_data(factors)
    writer.close()


def _add_value(writer: GGUFWriter, key: str, value: Any) -> None:
    """Adds a key of the metadata. An integer is written without a sign, as llama.cpp reads sizes."""
    value_type = GGUFValueType.get_type(value)
    if value_type == GGUFValueType.INT32:
        value_type = GGUFValueType.UINT32
    writer.add_key_value(key, value, value_type)


def _kind_in_file(leaf: Leaf, own: str, wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    """Returns the type of a leaf's tensor in a file whose matrices are to be of the type `wanted`.

    `own`: the kind of the leaf's weight in memory.
    """
    if own in ROUNDED:
        return GGMLQuantizationType[own]
    if len(leaf.stored) != 2:
        return GGMLQuantizationType.F32
    if wanted.name not in ROUNDED:
        return wanted
    if leaf.stored[1] % GROUP:
        return GGMLQuantizationType.F16
    return GGMLQuantizationType[served_kind(leaf.path, wanted.name)]


def _encode(rows: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Returns float32 rows as a tensor of that type in a file, bytes of blocks or numbers."""
    if kind.name in ROUNDED:
        blocks = round_to_blocks(rows, kind.name, axis=0)
        return unpack_blocks(np.asarray(blocks.packed), blocks.columns)
    with np.errstate(over="ignore"):  # infinity is refused when the file is read
        return quantize(rows, kind)


# The tokenizer


def tokenizer_metadata(tokenizer: Tokenizer, eos_ids: tuple[int, ...], vocab: int) -> dict[str, Any]:
    """Returns the GGUF metadata of a tokenizer, for a model of `vocab` tokens.

    Where llama.cpp has no name for its pre-tokenizer, the nearest is named, and the tokenizer.json
    added. Raises UserError for a tokenizer that is no BPE or has no merges.
    """
    written = tokenizer.to_json()
    config = tokenizer.config
    model = written["model"]
    if model["type"] != "BPE" or not model["merges"]:
        if model["type"] == "BPE":
            kind = "without merges"
        else:
            kind = f"of the kind {model['type']}"
        raise UserError(
            f"A tokenizer {kind} has no place in a GGUF file; write a Hugging Face folder instead."
        )
    tokens, kinds = _token_lists(written, vocab)
    fields: dict[str, Any] = {"tokens": tokens, "token_type": kinds, "add_bos_token": bool(tokenizer.bos_ids)}
    ids = {}
    for name, key in (SPECIAL_TOKENS | {"unknown": "unk_token"}).items():
        ids[name] = tokenizer.id_of(tokenizer.special_names.get(key, ""))
    ids |= dict(zip(("eos", "eot"), eos_ids))
    fields |= {f"{name}_token_id": id for name, id in ids.items() if id is not None}
    extra = {}
    if config.get("chat_template"):
        extra["tokenizer.chat_template"] = config["chat_template"]
    if model.get("byte_fallback"):
        ranks: dict[str, int] = {}
        for rank, pair in enumerate(model["merges"]):
            ranks.setdefault("".join(pair), rank)
        scores = [float(-ranks.get(token, len(model["merges"]))) for token in tokens]
        fields |= {"model": "llama", "pre": "default", "scores": scores}
    else:
        pre = next((name for name in PRE_TOKENIZERS if _is_pre_tokenizer(written, name)), None)
        if pre is None:
            pre = FALLBACK_PRE_TOKENIZER
            extra["tokenizer.huggingface.json"] = json.dumps(written, ensure_ascii=False)
        fields |= {"model": "gpt2", "pre": pre, "merges": [" ".join(pair) for pair in model["merges"]]}
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items()} | extra


def _token_lists(written: dict[str, Any], vocab: int) -> tuple[list[str], list[int]]:
    """Returns the text and the kind of each of `vocab` tokens, by a tokenizer.json. Ids without a
    token are padding.
    """
    model = written["model"]
    tokens = [f"[PAD{place}]" for place in range(vocab)]
    kinds = [UNUSED] * vocab
    for token, place in model["vocab"].items():
        tokens[place] = token
        kinds[place] = NORMAL
        if model.get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", token):
            kinds[place] = BYTE
    for added in written["added_tokens"]:
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    return tokens, kinds


def _is_pre_tokenizer(tokenizer: dict[str, Any], name: str) -> bool:
    like = tokenizers.Tokenizer(models.BPE())
    set_pre_tokenizer(like, name)
    written = json.loads(like.to_str())
    return all(tokenizer[part] == written[part] for part in ("pre_tokenizer", "normalizer"))


def sampling_metadata(sampling: Mapping[str, Any]) -> dict[str, Any]:
    metadata = {}
    for name, value in sampling.items():
        metadata[SAMPLING_KEYS[name]] = value if name == "top_k" else float(value)
    return metadata
