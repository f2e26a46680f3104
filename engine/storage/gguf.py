"""Opens the model in a GGUF file (llama.cpp) of any READABLE quantisation; writes one in F32, BF16, F16, Q8_0, Q4_0 or Q4_1.

The gguf library reads what is not multiplied as it is; its reader of files is not used (see `gguf_header.py`).
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter, LlamaFileType
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize, quant_shape_to_byte_shape, quantize

from engine.errors import UserError
from engine.model.config import ModelConfig
from engine.model.weights.blocks import GROUP, KINDS, pack_blocks, round_to_blocks, served_kind, unpack_blocks
from engine.storage.architectures import (
    FREQUENCIES,
    architecture_of,
    config_from_gguf,
    config_to_gguf,
    note_unknown_gguf,
    rope_factors,
)
from engine.storage.gguf_header import read_header
from engine.storage.gguf_tokenizer import read_tokenizer
from engine.storage.tensor_layout import (
    DTYPE_NAMES,
    GGUF_NAMES,
    StoredModel,
    check_tensors,
    file_tensors,
    infinite_weights,
    layout_of,
)
from engine.text import OnProgress
from engine.untrusted import quote, read_at

READABLE = {
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS",
}  # fmt: skip

LINES = 256  # of the numbers read at a time
MAX_NAME = 96  # characters


def open_model(path: Path) -> StoredModel:
    """Opens a file: checks its architecture and tensors against one another; reads no weights."""
    header = read_header(path)
    for name, tensor in header.tensors.items():
        if tensor.kind.name not in READABLE:
            raise UserError(f"{path}: the tensor {quote(name)} is {tensor.kind.name}, which cannot be read here.")
    cfg = config_from_gguf(header)
    shapes = {name: tensor.shape for name, tensor in header.tensors.items() if name != FREQUENCIES}
    leaves = check_tensors(layout_of(cfg, GGUF_NAMES), shapes, path)
    architecture = header.metadata["general.architecture"]
    paired = {leaf.name for leaf in leaves if leaf.paired and architecture == "llama"}

    kinds = {
        name: tensor.kind.name
        for name, tensor in header.tensors.items()
        if tensor.kind.name in KINDS and len(tensor.shape) == 2
    }

    def rows(name: str, start: int, stop: int) -> np.ndarray:
        tensor = header.tensors[name]
        if len(tensor.shape) == 1:  # a row of its own
            return dequantize(read_at(path, tensor.offset, tensor.size), tensor.kind)[start:stop]
        row = tensor.size // tensor.shape[0]
        data = read_at(path, tensor.offset + start * row, (stop - start) * row)
        # The library goes by 16 rows: for short ones the calls take as long as the computing, so they are joined.
        blocks = data.size // GGML_QUANT_SIZES[tensor.kind][1]
        lines = next(lines for lines in range(min(LINES, blocks), 0, -1) if blocks % lines == 0)
        values = dequantize(data.reshape(lines, -1), tensor.kind).reshape(stop - start, -1)
        return regroup_rows(values, cfg.head_dim // 2, 2) if name in paired else values

    def packed(name: str) -> np.ndarray:
        tensor = header.tensors[name]
        data = read_at(path, tensor.offset, tensor.size).reshape(tensor.shape[0], -1)
        try:
            return pack_blocks(regroup_rows(data, cfg.head_dim // 2, 2) if name in paired else data, tensor.kind.name)
        except ValueError:
            raise infinite_weights(name) from None

    title, context = header.metadata.get("general.name"), header.metadata[f"{architecture}.context_length"]
    name = title if isinstance(title, str) and title.isprintable() and 0 < len(title) <= MAX_NAME else path.stem
    return StoredModel(
        name,
        cfg,
        leaves,
        rows,
        lambda: read_tokenizer(header, cfg.vocab),
        context,
        "",
        note_unknown_gguf(header),
        kinds,
        packed,
    )


def regroup_rows(rows: np.ndarray, outer: int, inner: int) -> np.ndarray:
    """Reorders the rows of each head for RoPE: `outer` groups of `inner` become `inner` groups of `outer`.

    (2, H / 2) lays RoPE's pairs (i, i + H / 2) side by side, as in `llama` files' q and k; (H / 2, 2) undoes it.
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
    report: OnProgress = None,
) -> None:
    """Writes the model to `path`, a temporary file; matrices in `dtype`, gains and biases in float32.

    params, report: as in `file_tensors`. With q4_0 and q4_1 embedding and head have 8 bits, as in `serve --weights q4`. A
    matrix whose rows are no whole number of blocks of 32 becomes F16. Raises UserError for an architecture without a name in
    GGUF.
    """
    architecture = architecture_of(cfg)
    F32, F16, wanted = GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType[DTYPE_NAMES[dtype]]
    leaves, kinds = list(layout_of(cfg, GGUF_NAMES)), {}
    writer = GGUFWriter(path, architecture)
    writer.add_name(name)
    writer.add_file_type(LlamaFileType.ALL_F32 if wanted == F32 else LlamaFileType[f"MOSTLY_{wanted.name}"])
    writer.add_quantization_version(2)
    for key, value in ({f"{architecture}.{key}": value for key, value in config_to_gguf(cfg).items()} | metadata).items():
        value_type = GGUFValueType.get_type(value)
        writer.add_key_value(key, value, GGUFValueType.UINT32 if value_type == GGUFValueType.INT32 else value_type)
    for leaf in leaves:
        kind = wanted if len(leaf.stored) == 2 else F32
        if kind.name in KINDS:
            kind = F16 if leaf.stored[1] % GROUP else GGMLQuantizationType[served_kind(leaf.path, kind.name)]
        kinds[leaf.name] = kind
        size = math.prod(quant_shape_to_byte_shape(leaf.stored, kind))
        writer.add_tensor_info(leaf.name, leaf.stored, np.dtype(np.float32), size, kind)
    if cfg.rope_scaling:
        factors = rope_factors(cfg.rope_scaling, cfg.rope_theta, cfg.head_dim)
        writer.add_tensor_info(FREQUENCIES, factors.shape, factors.dtype, factors.nbytes, F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for leaf, array in file_tensors(leaves, params, report):
        rows = np.ascontiguousarray(array, np.float32)
        if leaf.paired and architecture == "llama":
            rows = regroup_rows(rows, 2, cfg.head_dim // 2)
        if (kind := kinds[leaf.name]).name in KINDS:
            data = unpack_blocks(round_to_blocks(rows, kind.name, axis=0))
        else:
            with np.errstate(over="ignore"):  # infinity is refused when the file is read
                data = quantize(rows, kind)
        writer.write_tensor_data(data)
    if cfg.rope_scaling:
        writer.write_tensor_data(factors)
    writer.close()
