"""GGUF files, llama.cpp's format, read: weights of any quantisation, architecture, tokenizer, chat template."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from engine.errors import UserError
from engine.model.config import ModelConfig
from engine.storage.assemble import checked, leaves_of, read_params
from engine.storage.gguf.config import ARCHITECTURES, FREQUENCIES, config_from
from engine.storage.gguf.header import Header, read_header
from engine.storage.gguf.tokenizer import tokenizer_from
from engine.storage.loaded_model import LoadedModel
from engine.storage.reading import exactly, shown
from engine.storage.vocabulary import built
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
    """The model in a GGUF file; matrices in `dtype`, bfloat16 by default.

    `report`: numbers read and in all. `on_config` gets the architecture before the first weight is read. Raises UserError,
    in a sentence, for whatever is damaged, unknown, or does not fit the rest; all of that is found before that.
    """
    header = read_header(path)
    for name, tensor in header.tensors.items():
        if tensor.kind.name not in READABLE:
            raise UserError(f"{path}: the tensor {shown(name)} is {tensor.kind.name}, which cannot be read here.")
    cfg = _config(header)
    shapes = {name: tensor.shape for name, tensor in header.tensors.items() if name != FREQUENCIES}
    leaves = checked(leaves_of(cfg, NAMES), shapes, path)
    tokenizer, tokenizer_config, ends = tokenizer_from(header, cfg.vocab)
    turned = ARCHITECTURES[header.metadata["general.architecture"]][2]
    heads = {part.name: part.heads for leaf in leaves for part in leaf.parts if part.heads and turned}

    on_config(cfg)
    with path.open("rb", buffering=0) as file:

        def rows(name: str, start: int, stop: int) -> np.ndarray:
            tensor = header.tensors[name]
            flat = len(tensor.shape) == 1  # a row of its own
            file.seek(tensor.offset + (0 if flat else start * tensor.row))
            count = 1 if flat else stop - start
            data = np.frombuffer(exactly(file, count * tensor.row, path), np.uint8)
            if flat:
                return dequantize(data, tensor.kind)[start:stop]
            values = _dequantized(data, tensor.kind).reshape(count, -1)
            return unpaired(values, cfg.head_dim) if name in heads else values

        params = read_params(leaves, rows, dtype or cfg.dtype, report)
    title = header.metadata.get("general.name")
    name = title if isinstance(title, str) else path.stem
    return LoadedModel(name, cfg, params, built(lambda: Tokenizer(tokenizer, tokenizer_config), path), ends, path)


def _dequantized(data: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """The numbers of whole blocks, in whatever shape. The library goes by 16 rows: of short ones that takes as long to call
    as to compute, so that they are laid in line to fewer."""
    blocks = data.size // GGML_QUANT_SIZES[kind][1]
    lines = next(lines for lines in range(min(LINES, blocks), 0, -1) if blocks % lines == 0)
    return dequantize(data.reshape(lines, -1), kind)


def read_config(path: Path) -> ModelConfig:
    """The architecture of the model in a GGUF file, from its header alone; raises UserError as `load_gguf` does."""
    return _config(read_header(path))


def _config(header: Header) -> ModelConfig:
    return config_from(header, _factors(header) if FREQUENCIES in header.tensors else None)


def _factors(header: Header) -> np.ndarray:
    tensor = header.tensors[FREQUENCIES]
    if tensor.kind != GGMLQuantizationType.F32 or len(tensor.shape) != 1 or tensor.shape[0] > 4096:
        raise UserError(f"{header.path}: {FREQUENCIES} should be a short row of float32.")
    with header.path.open("rb") as file:
        file.seek(tensor.offset)
        return np.frombuffer(exactly(file, tensor.size, header.path), "<f4")


def paired(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """(N * H, ...) whose rotary pairs are (i, i + H / 2) -> the same, pairs side by side, as `llama` files keep q and k."""
    heads = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(rows.shape)


def unpaired(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """What `paired` was given."""
    heads = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(rows.shape)
