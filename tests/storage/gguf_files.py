"""Small GGUF files, made with the gguf library's own writer and not with the code under test."""

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import quantize
from golden.random_weights import draw

from engine.text.tokenizer import SYMBOLS

SHAPES = {"token_embd.weight": (262, 64), "output_norm.weight": (64,)} | {
    f"blk.{layer}.{name}.weight": shape
    for layer in range(2)
    for name, shape in {
        "attn_norm": (64,),
        "ffn_norm": (64,),
        "attn_q": (48, 64),
        "attn_k": (24, 64),
        "attn_v": (24, 64),
        "attn_output": (64, 48),
        "ffn_gate": (96, 64),
        "ffn_up": (96, 64),
        "ffn_down": (64, 96),
    }.items()
}
SIZES = {
    "block_count": 2,
    "context_length": 128,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 6,
    "attention.head_count_kv": 3,
    "attention.key_length": 8,
    "attention.value_length": 8,
    "rope.dimension_count": 8,
    "attention.layer_norm_rms_epsilon": 1e-5,
}
MERGES = ["t h", "th e", "Ġ the", "1 2", "12 3"]
TOKENS = [*SYMBOLS, "th", "the", "Ġthe", "12", "123", "<|end|>"]
WORDS: dict[str, Any] = {
    "model": "gpt2",
    "pre": "smollm",
    "tokens": TOKENS,
    "token_type": [1] * 261 + [3],
    "merges": MERGES,
    "eos_token_id": 261,
    "bos_token_id": 261,
    "add_bos_token": False,
}


def weights(shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, np.ndarray]:
    return draw(shapes)


def tiny_gguf(
    path: Path,
    *,
    arch: str = "llama",
    kind: str = "F32",
    sizes: dict[str, Any] | None = None,
    words: dict[str, Any] | None = None,
    other: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    kinds: dict[str, str] | None = None,
) -> Path:
    """A model of `SHAPES`; None in sizes, words or other leaves a key out. Matrices in `kind`, or
    that of their tensor in `kinds`, where its blocks fit.

    Tensors of bytes are blocks of `kind` already.
    """
    writer = GGUFWriter(path, arch)
    sizes = {f"{arch}.{key}": value for key, value in (SIZES | (sizes or {})).items()}
    words = {f"tokenizer.ggml.{key}": value for key, value in (WORDS | (words or {})).items()}
    for key, value in (sizes | words | (other or {})).items():
        if value is not None:
            kind_of_value = GGUFValueType.get_type(value)
            unsigned = kind_of_value == GGUFValueType.INT32
            writer.add_key_value(key, value, GGUFValueType.UINT32 if unsigned else kind_of_value)
    for name, value in (tensors or weights()).items():
        type_ = GGMLQuantizationType[(kinds or {}).get(name, kind)]
        fits = value.dtype == np.uint8 or (
            value.ndim == 2 and value.shape[-1] % GGML_QUANT_SIZES[type_][0] == 0
        )
        type_ = type_ if fits else GGMLQuantizationType.F32
        writer.add_tensor(name, value if value.dtype == np.uint8 else quantize(value, type_), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def words_of(vocab: int) -> dict[str, Any]:
    """Metadata of a tokenizer of `vocab` tokens, of which most mean nothing."""
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.eos_token_id": vocab - 1,
        "tokenizer.ggml.tokens": [*"abc", "ab", *(f"[PAD{i}]" for i in range(4, vocab))],
        "tokenizer.ggml.token_type": [1] * 4 + [5] * (vocab - 4),
        "tokenizer.ggml.merges": ["a b"],
    }
