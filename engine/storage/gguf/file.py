"""Opens the model in a GGUF file (llama.cpp) of any READABLE quantisation; writes one in F32, BF16, F16 or Q8_0.

The gguf library quantises; its reader is not used (see `header.py`).
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter, LlamaFileType
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize, quant_shape_to_byte_shape, quantize

from engine.errors import UserError
from engine.model.config import ModelConfig, RopeScaling
from engine.storage.gguf.header import Header, read_header
from engine.storage.gguf.tokenizer import read_tokenizer, shortest_decimal
from engine.storage.huggingface import BLOCKS, architecture_of
from engine.storage.tensor_layout import DTYPE_NAMES, GGUF_NAMES, StoredModel, check_tensors, file_tensors, layout_of
from engine.text import OnProgress
from engine.untrusted import Fields, known_name, quote, read_at

ARCHITECTURES = ("llama", "qwen2", "qwen3")
# Our name of a size -> theirs.
SIZES = {
    "width": "embedding_length", "layers": "block_count", "heads": "attention.head_count", "ff": "feed_forward_length",
    "kv_heads": "attention.head_count_kv", "head_dim": "attention.key_length", "context": "context_length",
}  # fmt: skip
HEAD_WIDTHS = ("attention.value_length", "rope.dimension_count")
EPS, THETA, WINDOW = "attention.layer_norm_rms_epsilon", "rope.freq_base", "attention.sliding_window"
USED = {*SIZES.values(), *HEAD_WIDTHS, EPS, THETA, WINDOW, "vocab_size"}
HARMLESS = "rope.scaling.(original_context_length|finetuned)|tensor_data_layout|use_parallel_residual"
# Keys that change what the weights compute, in a way that is not built here -> the values that do not.
ONLY: dict[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("none",), "rope.scaling.factor": (1.0, 0.0), "rope.scale_linear": (1.0,), "expert_count": (0,),
    "expert_used_count": (0,), "attention.causal": (True,), "logit_scale": (1.0,), "rope.scaling.attn_factor": (1.0,),
    "residual_scale": (1.0,), "embedding_scale": (1.0,), "attention.scale": (0.0,), "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
}  # fmt: skip
FREQUENCIES = "rope_freqs.weight"

# Llama 3.1's and 3.2's; a file holds only what they make of each frequency.
KNOWN_SCALINGS = [RopeScaling(factor, 1.0, 4.0, 8192) for factor in (8.0, 32.0)]


def config_from(header: Header) -> ModelConfig:
    """Returns a file's architecture; refuses, by name, a key that is missing or cannot be computed here."""
    path, metadata = header.path, header.metadata
    kind = known_name(metadata.get("general.architecture"), ARCHITECTURES, "general.architecture", path)
    fields = _fields(header)
    fields.check(ONLY)
    if metadata.get("split.count", 0) not in (0, 1):
        raise UserError(f"{path} is one of several parts, by its key 'split.count': merge them first.")
    table = header.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise UserError(f"{path} has no embedding, token_embd.weight, or not one of two dimensions.")
    theta = shortest_decimal(fields.number(THETA, float, 10000.0))
    derived = {"kv_heads": 0, "head_dim": 0}  # by ModelConfig, where they are left out
    sizes: dict[str, Any] = {ours: fields.number(theirs, int, derived.get(ours)) for ours, theirs in SIZES.items()}
    # Within the first window of keys, attention in windows is the plain one.
    sizes["context"] = min(sizes["context"], fields.number(WINDOW, int, 0) or sizes["context"])
    cfg = ModelConfig(
        **sizes,
        vocab=table.shape[0],
        rope_theta=theta,
        rope_scaling=_read_scaling(header, theta),
        eps=shortest_decimal(fields.number(EPS, float)),
        tied="output.weight" not in header.tensors,
        **BLOCKS[kind],
    )
    for key in HEAD_WIDTHS:
        if (value := fields.number(key, int, cfg.head_dim)) != cfg.head_dim:
            raise UserError(f"{path}: {kind}.{key} is {value} and not {cfg.head_dim}, a head's width; that is not built here.")
    return cfg


def _fields(header: Header) -> Fields:
    prefix = f"{header.metadata['general.architecture']}."
    own = {key.removeprefix(prefix): value for key, value in header.metadata.items() if key.startswith(prefix)}
    return Fields(own, header.path, prefix)


def note_unknown(header: Header) -> tuple[str, ...]:
    return _fields(header).note_unknown({*USED, *ONLY}, HARMLESS)


def rope_factors(scaling: RopeScaling, theta: float, head_dim: int) -> np.ndarray:
    """Returns the divisor of each RoPE frequency (H / 2,) float32 in Llama 3's scaling (The Llama 3 Herd of Models, 3.4.1)."""
    frequencies = theta ** (-np.arange(head_dim // 2) * 2 / head_dim)
    turns = scaling.original_context * frequencies / (2 * np.pi)
    blend = np.clip((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0.0, 1.0)
    return (1 / (blend + (1 - blend) / scaling.factor)).astype(np.float32)


def _read_scaling(header: Header, theta: float) -> RopeScaling | None:
    tensor = header.tensors.get(FREQUENCIES)
    if tensor is None:
        return None
    if tensor.kind != GGMLQuantizationType.F32 or len(tensor.shape) != 1 or tensor.shape[0] > 4096:
        raise UserError(f"{header.path}: {FREQUENCIES} should be a short row of float32.")
    factors = read_at(header.path, tensor.offset, tensor.size).view("<f4")
    if (factors == 1).all():
        return None
    for scaling in KNOWN_SCALINGS:
        if np.allclose(rope_factors(scaling, theta, 2 * len(factors)), factors, rtol=1e-3):
            return scaling
    raise UserError(
        f"{header.path}: {FREQUENCIES} is none of the RoPE scalings that Llama 3.1 and 3.2 were published with. A GGUF file "
        "does not say how it was made; the model's Hugging Face folder does, in config.json."
    )


def metadata_of(cfg: ModelConfig) -> dict[str, Any]:
    """Returns the metadata {key: int | float} of an architecture, without its prefix; floats are to be written as float32."""
    sizes = {theirs: getattr(cfg, ours) for ours, theirs in SIZES.items()} | dict.fromkeys(HEAD_WIDTHS, cfg.head_dim)
    return sizes | {EPS: cfg.eps, THETA: cfg.rope_theta, "vocab_size": cfg.vocab}


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
    cfg = config_from(header)
    shapes = {name: tensor.shape for name, tensor in header.tensors.items() if name != FREQUENCIES}
    leaves = check_tensors(layout_of(cfg, GGUF_NAMES), shapes, path)
    architecture = header.metadata["general.architecture"]
    paired = {leaf.name for leaf in leaves if leaf.paired and architecture == "llama"}

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

    title, context = header.metadata.get("general.name"), header.metadata[f"{architecture}.context_length"]
    name = title if isinstance(title, str) and title.isprintable() and 0 < len(title) <= MAX_NAME else path.stem
    return StoredModel(name, cfg, leaves, rows, lambda: read_tokenizer(header, cfg.vocab), context, "", note_unknown(header))


def read_config(path: Path) -> ModelConfig:
    return config_from(read_header(path))


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

    params, report: as in `file_tensors`. A matrix whose rows are no whole number of Q8_0's blocks of 32 becomes F16. Raises
    UserError for an architecture without a name in GGUF.
    """
    architecture = architecture_of(cfg)
    F32, F16, wanted = GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType[DTYPE_NAMES[dtype]]
    leaves, kinds = list(layout_of(cfg, GGUF_NAMES)), {}
    writer = GGUFWriter(path, architecture)
    writer.add_name(name)
    writer.add_file_type(LlamaFileType.ALL_F32 if wanted == F32 else LlamaFileType[f"MOSTLY_{wanted.name}"])
    writer.add_quantization_version(2)
    for key, value in ({f"{architecture}.{key}": value for key, value in metadata_of(cfg).items()} | metadata).items():
        value_type = GGUFValueType.get_type(value)
        writer.add_key_value(key, value, GGUFValueType.UINT32 if value_type == GGUFValueType.INT32 else value_type)
    for leaf in leaves:
        kind = wanted if len(leaf.stored) == 2 else F32
        kinds[leaf.name] = kind = F16 if leaf.stored[-1] % GGML_QUANT_SIZES[kind][0] else kind
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
        with np.errstate(over="ignore"):  # infinity is refused when the file is read
            writer.write_tensor_data(quantize(rows, kinds[leaf.name]))
    if cfg.rope_scaling:
        writer.write_tensor_data(factors)
    writer.close()
