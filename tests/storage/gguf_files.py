"""Small GGUF files, made with the gguf library's own writer and not with the code under test."""

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize, quantize

from engine.model.weights.block_layout import FILE_ORDERS, KINDS
from engine.text.tokenizer import SYMBOLS
from tests.storage.golden.random_weights import draw

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


def random_blocks(
    generator: np.random.Generator, kind: str, shape: tuple[int, int], scale: Any = 1.0
) -> np.ndarray:
    """Blocks of a matrix (in, out), as a file has them, (out, bytes of a row): any bits, with
    normally distributed factors of a size, or of one for each row, (out, 1, 1).
    """
    inputs, out = shape
    blocks = inputs // KINDS[kind].inputs
    data = generator.integers(0, 256, (out, blocks, FILE_ORDERS[kind].bytes), np.uint8)
    factors = generator.standard_normal((out, blocks, KINDS[kind].factors)) * scale
    in_bytes = factors.astype(np.float16).view(np.uint8)
    if kind == "Q6_K":
        data[..., -in_bytes.shape[2] :] = in_bytes
    else:
        data[..., : in_bytes.shape[2]] = in_bytes
    return data.reshape(out, -1)


def k_quants_gguf(path: Path) -> Path:
    """A model of random blocks in the kinds that Q4_K_M files mix, Q4_K, Q6_K and Q5_0, and in IQ4_NL.

    The library rounds to none of the K kinds and not to IQ4_NL. Their blocks hold 256 numbers of a row, hence the width.
    """
    sizes = {
        "embedding_length": 256,
        "feed_forward_length": 256,
        "attention.head_count": 8,
        "attention.head_count_kv": 4,
        "attention.key_length": 32,
        "attention.value_length": 32,
        "rope.dimension_count": 32,
    }
    kinds = {
        "attn_q": "Q4_K",
        "attn_k": "Q5_0",
        "attn_v": "Q6_K",
        "attn_output": "IQ4_NL",
        "ffn_gate": "Q4_K",
        "ffn_up": "Q4_K",
        "ffn_down": "Q6_K",
    }
    kind_of = {"token_embd.weight": "Q6_K"}
    for layer in range(SIZES["block_count"]):
        for name, kind in kinds.items():
            kind_of[f"blk.{layer}.{name}.weight"] = kind
    outs = {"token_embd": SHAPES["token_embd.weight"][0], "attn_k": 128, "attn_v": 128}
    generator = np.random.default_rng(0)
    tensors = {}
    for name, shape in SHAPES.items():
        kind = kind_of.get(name)
        if kind:
            wide = 256, outs.get(name.removesuffix(".weight").rpartition(".")[2], 256)
            size = dequantize(random_blocks(generator, kind, wide), GGMLQuantizationType[kind]).std()
            tensors[name] = random_blocks(generator, kind, wide, 0.06 / size)
        else:
            assert len(shape) == 1
            tensors[name] = np.ones(256, np.float32)
    return tiny_gguf(path, sizes=sizes, tensors=tensors, kinds=kind_of)


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
    part_size: int = 0,
) -> Path:
    """A model of `SHAPES`; None in sizes, words or other leaves a key out. Matrices in `kind`, or
    that of their tensor in `kinds`, where its blocks fit.

    Tensors of bytes are blocks of `kind` already. `part_size`: tensors of a part, all but the last;
    returns the first part's path, and writes one file without it.
    """
    writer = GGUFWriter(path, arch, split_max_tensors=part_size)
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
    return writer.format_shard_names(path)[0]


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
