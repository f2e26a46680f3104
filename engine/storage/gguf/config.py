"""Reads ModelConfig from a GGUF file's metadata, and writes it."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType

from engine.errors import UserError
from engine.model.config import ModelConfig, RopeScaling
from engine.storage.gguf.header import Header
from engine.storage.huggingface.config import BLOCKS
from engine.untrusted import Fields, known_name, read_at

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
# SamplingParams' name -> llama.cpp's key of the recommended value.
SAMPLING_KEYS = {name: f"general.sampling.{name}" for name in ("top_k", "top_p", "min_p")}
SAMPLING_KEYS |= {"temperature": "general.sampling.temp", "repetition_penalty": "general.sampling.penalty_repeat"}
FREQUENCIES = "rope_freqs.weight"

# Llama 3.1's and 3.2's; a file holds only what they make of each frequency.
KNOWN_SCALINGS = [RopeScaling(factor, 1.0, 4.0, 8192) for factor in (8.0, 32.0)]


def shortest_decimal(value: float) -> float:
    """Returns the shortest decimal of a float32: 1e-05 and not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


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


def read_sampling(metadata: dict[str, Any]) -> dict[str, Any]:
    """Returns the recommended sampling, {SamplingParams' name: value as in the file}."""
    values = {name: metadata[key] for name, key in SAMPLING_KEYS.items() if key in metadata}
    return {name: shortest_decimal(value) if isinstance(value, float) else value for name, value in values.items()}


def sampling_metadata(sampling: Mapping[str, Any]) -> dict[str, Any]:
    return {SAMPLING_KEYS[name]: value if name == "top_k" else float(value) for name, value in sampling.items()}


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
