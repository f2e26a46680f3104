"""GGUF files written, for llama.cpp and what is built on it: F32, BF16, F16 or Q8_0 matrices, through the gguf library."""

import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter, LlamaFileType
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import quantize

from engine.files import sync_folder
from engine.model.config import ModelConfig
from engine.model.paths import leaf_paths
from engine.model.weights.matmul import dense
from engine.storage.assemble import leaves_of, split
from engine.storage.gguf.config import ARCHITECTURES, FREQUENCIES, architecture_of, metadata_of, scaling_factors
from engine.storage.gguf.load import NAMES, paired
from engine.storage.gguf.tokenizer_metadata import Words

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
    words: Words,
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
        for key, value in words.items():
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
    turned: bool,
    report: Callable[[int, int], None] | None,
) -> None:
    leaves = list(leaves_of(cfg, NAMES))
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
        parts = split(leaf, dense(values[leaf.path]))
        for part in leaf.parts:
            rows = parts[part.name].astype(np.float32)
            rows = paired(rows, cfg.head_dim) if part.heads and turned else np.ascontiguousarray(rows)
            writer.write_tensor_data(quantize(rows, kinds[part.name]))
            done += rows.size
            if report:
                report(done, total)
    if cfg.rope_scaling:
        writer.write_tensor_data(factors)
