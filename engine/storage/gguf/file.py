"""GGUF files, llama.cpp's format: read with weights of any quantisation, written in F32, BF16, F16 or Q8_0.

Weights go both ways through the gguf library's quantisation; its own reader is not used (see `header.py`).
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter, LlamaFileType
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize, quantize

from engine.errors import UserError
from engine.files import whole_file
from engine.model.config import ModelConfig
from engine.storage.fields import architecture_of
from engine.storage.gguf.config import FREQUENCIES, config_from, metadata_of, scaling_factors
from engine.storage.gguf.header import read_header
from engine.storage.gguf.tokenizer import tokenizer_from
from engine.storage.loaded_model import LoadedModel, OnConfig, Report
from engine.storage.tensor_layout import KINDS, check_tensors, layout_of, read_params, split_params
from engine.storage.untrusted import build_tokenizer, quote, read_at
from engine.text.tokenizer import Tokenizer

_LAYER = "blk.{}."
NAMES = {
    "embed": "token_embd.weight", "norm": "output_norm.weight", "head": "output.weight",
    "attn_norm": _LAYER + "attn_norm.weight", "mlp_norm": _LAYER + "ffn_norm.weight",
    **{part: f"{_LAYER}attn_{part}.weight" for part in "qkv"},
    **{f"{part}_bias": f"{_LAYER}attn_{part}.bias" for part in "qkv"},
    "q_norm": _LAYER + "attn_q_norm.weight", "k_norm": _LAYER + "attn_k_norm.weight",
    "out": _LAYER + "attn_output.weight",
    **{part: f"{_LAYER}ffn_{part}.weight" for part in ("gate", "up", "down")},
}  # fmt: skip

READABLE = {
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS",
}  # fmt: skip

LINES = 256  # of the numbers read at a time


def load_gguf(
    path: Path, *, dtype: str | None = None, report: Report = None, on_config: OnConfig = lambda cfg: None
) -> LoadedModel:
    """Loads the model in a GGUF file; matrices in `dtype`, bfloat16 by default.

    `report`: numbers read and in all. Raises UserError, in a sentence, for whatever is damaged, unknown, or does not fit
    the rest; all of that is found before `on_config` gets the architecture and the first weight is read.
    """
    header = read_header(path)
    for name, tensor in header.tensors.items():
        if tensor.kind.name not in READABLE:
            raise UserError(f"{path}: the tensor {quote(name)} is {tensor.kind.name}, which cannot be read here.")
    cfg = config_from(header)
    shapes = {name: tensor.shape for name, tensor in header.tensors.items() if name != FREQUENCIES}
    leaves = check_tensors(layout_of(cfg, NAMES), shapes, path)
    tokenizer, tokenizer_config, ends = tokenizer_from(header, cfg.vocab)
    in_pairs = header.metadata["general.architecture"] == "llama"
    paired = {part.name for leaf in leaves for part in leaf.parts if part.paired and in_pairs}

    def rows(name: str, start: int, stop: int) -> np.ndarray:
        tensor = header.tensors[name]
        if len(tensor.shape) == 1:  # a row of its own
            return dequantize(read_at(path, tensor.offset, tensor.size), tensor.kind)[start:stop]
        row = tensor.size // tensor.shape[0]
        data = read_at(path, tensor.offset + start * row, (stop - start) * row)
        # The library goes by 16 rows: of short ones that takes as long to call as to compute, so they are laid in line.
        blocks = data.size // GGML_QUANT_SIZES[tensor.kind][1]
        lines = next(lines for lines in range(min(LINES, blocks), 0, -1) if blocks % lines == 0)
        values = dequantize(data.reshape(lines, -1), tensor.kind).reshape(stop - start, -1)
        return regroup_rows(values, cfg.head_dim // 2, 2) if name in paired else values

    on_config(cfg)
    params = read_params(leaves, rows, dtype or cfg.dtype, report)
    title = header.metadata.get("general.name")
    name = title if isinstance(title, str) else path.stem
    return LoadedModel(name, cfg, params, build_tokenizer(lambda: Tokenizer(tokenizer, tokenizer_config), path), ends, path)


def read_config(path: Path) -> ModelConfig:
    """Reads the architecture of the model in a GGUF file, from its header alone; raises UserError as `load_gguf` does."""
    return config_from(read_header(path))


def regroup_rows(rows: np.ndarray, outer: int, inner: int) -> np.ndarray:
    """Reorders the rows of each head, `outer` groups of `inner`, to `inner` groups of `outer`.

    By (2, H / 2) RoPE's pairs, (i, i + H / 2), come to lie side by side, as in `llama` files' q and k; (H / 2, 2) undoes it.
    """
    heads = rows.reshape(-1, outer, inner, *rows.shape[1:])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(rows.shape)


def save_gguf(
    path: Path,
    cfg: ModelConfig,
    params: dict[str, Any],
    metadata: dict[str, Any],
    *,
    name: str,
    dtype: str,
    report: Report = None,
) -> None:
    """Writes the model to `path`, complete or not at all; matrices in `dtype`, gains and biases in float32.

    params: Arrays, or Int8 and LoRA leaves, which are made plain one at a time. A matrix whose rows are no whole number
    of Q8_0's blocks of 32 is written as F16. `report`: numbers written and in all. Raises UserError for an architecture
    that GGUF has no name for.
    """
    architecture = architecture_of(cfg)
    F32, F16, wanted = GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType[KINDS[dtype]]
    file_type = LlamaFileType.ALL_F32 if wanted == F32 else LlamaFileType[f"MOSTLY_{KINDS[dtype]}"]
    leaves, kinds = list(layout_of(cfg, NAMES)), {}
    with whole_file(path) as file:
        writer = GGUFWriter(file.name, architecture)
        writer.add_name(name)
        writer.add_file_type(file_type)
        writer.add_quantization_version(2)
        for key, value in ({f"{architecture}.{key}": value for key, value in metadata_of(cfg).items()} | metadata).items():
            kind = GGUFValueType.get_type(value)
            writer.add_key_value(key, value, GGUFValueType.UINT32 if kind == GGUFValueType.INT32 else kind)
        for part in (part for leaf in leaves for part in leaf.parts):
            quantisation = wanted if len(part.shape) == 2 else F32
            quantisation = F16 if part.shape[-1] % GGML_QUANT_SIZES[quantisation][0] else quantisation
            kinds[part.name] = quantisation
            block, width = GGML_QUANT_SIZES[quantisation]
            size = math.prod(part.shape) // block * width
            writer.add_tensor_info(part.name, part.shape, np.dtype(np.float32), size, quantisation)
        if cfg.rope_scaling:
            factors = scaling_factors(cfg.rope_scaling, cfg.rope_theta, cfg.head_dim)
            writer.add_tensor_info(FREQUENCIES, factors.shape, factors.dtype, factors.nbytes, F32)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for part, array in split_params(leaves, params, report):
            rows = np.ascontiguousarray(array, np.float32)
            rows = regroup_rows(rows, 2, cfg.head_dim // 2) if part.paired and architecture == "llama" else rows
            writer.write_tensor_data(quantize(rows, kinds[part.name]))
        if cfg.rope_scaling:
            writer.write_tensor_data(factors)
        writer.close()
