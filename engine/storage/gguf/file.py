"""GGUF files, llama.cpp's format: read with weights of any quantisation, written in F32, BF16, F16 or Q8_0.

Weights go both ways through the gguf library's quantisation; its own reader is not used (see `header.py`).
"""

import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter, LlamaFileType
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize

from engine.errors import UserError
from engine.files import sync_folder
from engine.model.config import ModelConfig
from engine.model.paths import leaf_paths
from engine.model.weights.matmul import dense
from engine.storage.gguf.config import ARCHITECTURES, FREQUENCIES, architecture_of, config_from, metadata_of, scaling_factors
from engine.storage.gguf.header import Header, read_header
from engine.storage.gguf.tokenizer import tokenizer_from
from engine.storage.loaded_model import LoadedModel
from engine.storage.tensor_layout import check_tensors, layout_of, read_params, split_leaf
from engine.storage.untrusted import build_tokenizer, quote, read_exactly
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
    path: Path,
    *,
    dtype: str | None = None,
    report: Callable[[int, int], None] | None = None,
    on_config: Callable[[ModelConfig], None] = lambda cfg: None,
) -> LoadedModel:
    """Loads the model in a GGUF file; matrices in `dtype`, bfloat16 by default.

    `report`: numbers read and in all. `on_config` gets the architecture before the first weight is read. Raises UserError,
    in a sentence, for whatever is damaged, unknown, or does not fit the rest; all of that is found before that.
    """
    header = read_header(path)
    for name, tensor in header.tensors.items():
        if tensor.kind.name not in READABLE:
            raise UserError(f"{path}: the tensor {quote(name)} is {tensor.kind.name}, which cannot be read here.")
    cfg = _config(header)
    shapes = {name: tensor.shape for name, tensor in header.tensors.items() if name != FREQUENCIES}
    leaves = check_tensors(layout_of(cfg, NAMES), shapes, path)
    tokenizer, tokenizer_config, ends = tokenizer_from(header, cfg.vocab)
    rows_in_pairs = ARCHITECTURES[header.metadata["general.architecture"]][2]
    heads = {part.name: part.heads for leaf in leaves for part in leaf.parts if part.heads and rows_in_pairs}

    on_config(cfg)
    with path.open("rb", buffering=0) as file:

        def rows(name: str, start: int, stop: int) -> np.ndarray:
            tensor = header.tensors[name]
            flat = len(tensor.shape) == 1  # a row of its own
            file.seek(tensor.offset + (0 if flat else start * tensor.row))
            count = 1 if flat else stop - start
            data = np.frombuffer(read_exactly(file, count * tensor.row, path), np.uint8)
            if flat:
                return dequantize(data, tensor.kind)[start:stop]
            values = _dequantize_blocks(data, tensor.kind).reshape(count, -1)
            return unpair_rows(values, cfg.head_dim) if name in heads else values

        params = read_params(leaves, rows, dtype or cfg.dtype, report)
    title = header.metadata.get("general.name")
    name = title if isinstance(title, str) else path.stem
    return LoadedModel(name, cfg, params, build_tokenizer(lambda: Tokenizer(tokenizer, tokenizer_config), path), ends, path)


def _dequantize_blocks(data: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Returns the numbers of whole blocks. The library goes by 16 rows: of short ones that takes as long to call
    as to compute, so that they are laid in line to fewer."""
    blocks = data.size // GGML_QUANT_SIZES[kind][1]
    lines = next(lines for lines in range(min(LINES, blocks), 0, -1) if blocks % lines == 0)
    return dequantize(data.reshape(lines, -1), kind)


def read_config(path: Path) -> ModelConfig:
    """Reads the architecture of the model in a GGUF file, from its header alone; raises UserError as `load_gguf` does."""
    return _config(read_header(path))


def _config(header: Header) -> ModelConfig:
    return config_from(header, _factors(header) if FREQUENCIES in header.tensors else None)


def _factors(header: Header) -> np.ndarray:
    tensor = header.tensors[FREQUENCIES]
    if tensor.kind != GGMLQuantizationType.F32 or len(tensor.shape) != 1 or tensor.shape[0] > 4096:
        raise UserError(f"{header.path}: {FREQUENCIES} should be a short row of float32.")
    with header.path.open("rb") as file:
        file.seek(tensor.offset)
        return np.frombuffer(read_exactly(file, tensor.size, header.path), "<f4")


def pair_rows(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorders rows (N * H, ...) so that RoPE's pairs, (i, i + H / 2), lie side by side, as in `llama` files' q and k."""
    heads = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(rows.shape)


def unpair_rows(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Undoes `pair_rows`."""
    heads = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(rows.shape)


KINDS = {
    "float32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "bfloat16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "float16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}


def save_gguf(
    path: Path,
    cfg: ModelConfig,
    params: dict[str, Any],
    metadata: dict[str, Any],
    *,
    name: str,
    dtype: str,
    report: Callable[[int, int], None] | None = None,
) -> None:
    """Writes the model to `path`, complete or not at all; matrices in `dtype`, gains and biases in float32.

    params: Arrays, or Int8 and LoRA leaves, which are made plain one at a time. A matrix whose rows are no whole number
    of Q8_0's blocks of 32 is written as F16. `report`: numbers written and in all. Raises UserError for an architecture
    that GGUF has no name for.
    """
    kind = architecture_of(cfg)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as place:
        building = Path(place) / path.name
        writer = GGUFWriter(building, kind)
        writer.add_name(name)
        writer.add_file_type(KINDS[dtype][1])
        writer.add_quantization_version(2)
        for key, value in metadata_of(cfg).items():
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"{kind}.{key}", value)
        for key, value in metadata.items():
            _add(writer, key, value)
        _write_tensors(writer, cfg, params, KINDS[dtype][0], ARCHITECTURES[kind][2], report)
        writer.close()
        with building.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(building, path)
    sync_folder(path.parent)


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def _write_tensors(
    writer: GGUFWriter,
    cfg: ModelConfig,
    params: dict[str, Any],
    wanted: GGMLQuantizationType,
    rows_in_pairs: bool,
    report: Callable[[int, int], None] | None,
) -> None:
    leaves = list(layout_of(cfg, NAMES))
    F32, F16 = GGMLQuantizationType.F32, GGMLQuantizationType.F16
    kinds = {}
    for leaf in leaves:
        for part in leaf.parts:
            kind = wanted if len(part.shape) == 2 else F32
            kind = F16 if part.shape[-1] % GGML_QUANT_SIZES[kind][0] else kind
            kinds[part.name] = kind
            block, width = GGML_QUANT_SIZES[kind]
            size = math.prod(part.shape) // block * width
            writer.add_tensor_info(part.name, part.shape, np.dtype(np.float32), size, kind)
    if cfg.rope_scaling:
        factors = scaling_factors(cfg.rope_scaling, cfg.rope_theta, cfg.head_dim)
        writer.add_tensor_info(FREQUENCIES, factors.shape, factors.dtype, factors.nbytes, F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    values = leaf_paths(params)
    total, done = sum(math.prod(leaf.shape) for leaf in leaves), 0
    for leaf in leaves:
        parts = split_leaf(leaf, dense(values[leaf.path]))
        for part in leaf.parts:
            rows = parts[part.name].astype(np.float32)
            rows = pair_rows(rows, cfg.head_dim) if part.heads and rows_in_pairs else np.ascontiguousarray(rows)
            writer.write_tensor_data(quantize(rows, kinds[part.name]))
            done += rows.size
            if report:
                report(done, total)
    if cfg.rope_scaling:
        writer.write_tensor_data(factors)
