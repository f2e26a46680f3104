"""A GGUF file's metadata and our ModelConfig, both ways."""

from typing import Any

import numpy as np

from engine.errors import UserError, nearest
from engine.model.config import ModelConfig, RopeScaling
from engine.storage.gguf.header import Header, Span
from engine.storage.untrusted import quote

# architecture -> (qkv_bias, qk_norm, q and k rows in pairs)
ARCHITECTURES = {"llama": (False, False, True), "qwen2": (True, False, False), "qwen3": (False, True, False)}

USED = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "rope.freq_base", "rope.dimension_count", "vocab_size", "attention.sliding_window",
}  # fmt: skip
IGNORED = {"rope.scaling.original_context_length", "rope.scaling.finetuned", "tensor_data_layout"}
ONLY: dict[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("none",), "rope.scaling.factor": (1.0, 0.0), "rope.scale_linear": (1.0,), "expert_count": (0,),
    "expert_used_count": (0,), "attention.causal": (True,), "use_parallel_residual": (False, True), "logit_scale": (1.0,),
    "rope.scaling.attn_factor": (1.0,), "residual_scale": (1.0,), "embedding_scale": (1.0,), "attention.scale": (0.0,),
}  # fmt: skip
OTHER_KEYS = ("general.", "tokenizer.", "quantize.", "mradermacher.")
FREQUENCIES = "rope_freqs.weight"

# The scalings that Llama 3.1 and 3.2 were published with; a file holds only what they make of each frequency.
KNOWN_SCALINGS = [RopeScaling(factor, 1.0, 4.0, 8192) for factor in (8.0, 32.0)]


def shortest_decimal(value: float) -> float:
    """Returns the shortest decimal number that is this float32: 1e-05 and not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def config_from(header: Header, factors: np.ndarray | None) -> ModelConfig:
    """Returns the file's architecture. `factors` (H / 2,): what each rotary frequency is divided by, if the file says so.

    Raises UserError naming a key that is missing, unknown, or asks for something that is not built here.
    """
    path, metadata = header.path, header.metadata
    kind = metadata.get("general.architecture")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        close = nearest(str(kind), list(ARCHITECTURES))
        raise UserError(f"{path}: the architecture {quote(kind)} is not known here; {known} are.{close}")
    own = {key.removeprefix(kind + "."): value for key, value in metadata.items() if key.startswith(kind + ".")}
    for key, value in own.items():
        if key in ONLY and value not in ONLY[key]:
            raise UserError(f"{path}: {kind}.{key} is {quote(value)}, and only {ONLY[key][0]} can be computed here.")
        if key not in ONLY and key not in USED and key not in IGNORED:
            raise UserError(f"{path}: the key {quote(f'{kind}.{key}')} is not known here.{nearest(key, sorted(USED))}")
    for key in metadata:
        if not key.startswith((kind + ".", *OTHER_KEYS)):
            part = "one of several parts: merge them first" if key.startswith("split.") else "not known here"
            raise UserError(f"{path}: the key {quote(key)} is {part}.")

    def number(key: str, default: float | None = None) -> Any:
        value = own.get(key, default)
        if value is None:
            raise UserError(f"{path} does not say {kind}.{key}.")
        if isinstance(value, bool | str | Span) or not 0 <= value < 2**40:
            raise UserError(f"{path}: {kind}.{key} should be one number of ordinary size, not {quote(value)}.")
        return value

    table = header.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise UserError(f"{path} has no embedding, token_embd.weight, or not one of two dimensions.")
    heads, width = number("attention.head_count"), number("embedding_length")
    head_dim = number("attention.key_length", width // heads if heads else 0)
    for key in ("attention.value_length", "rope.dimension_count"):
        if number(key, head_dim) != head_dim:
            raise UserError(
                f"{path}: {kind}.{key} is {number(key)} and not {head_dim}, a head's width; that is not built here."
            )
    context = number("context_length")
    theta = shortest_decimal(number("rope.freq_base", 10000.0))
    if 0 < number("attention.sliding_window", 0) < context:
        raise UserError(f"{path}: {kind}.attention.sliding_window is shorter than the context; windows are not built here.")
    qkv_bias, qk_norm, _ = ARCHITECTURES[kind]
    return ModelConfig(
        vocab=table.shape[0],
        width=width,
        layers=number("block_count"),
        heads=heads,
        kv_heads=number("attention.head_count_kv", heads),
        head_dim=head_dim,
        ff=number("feed_forward_length"),
        context=context,
        rope_theta=theta,
        rope_scaling=None if factors is None else _scaling_of(factors, theta, header),
        eps=shortest_decimal(number("attention.layer_norm_rms_epsilon")),
        tied="output.weight" not in header.tensors,
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
    )


def scaling_factors(scaling: RopeScaling, theta: float, head_dim: int) -> np.ndarray:
    """Returns (H / 2,) float32: what Llama 3's scaling divides each frequency by (The Llama 3 Herd of Models, 3.4.1)."""
    frequencies = theta ** (-np.arange(head_dim // 2) * 2 / head_dim)
    turns = scaling.original_context * frequencies / (2 * np.pi)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return (1 / (blend + (1 - blend) / scaling.factor)).astype(np.float32)


def _scaling_of(factors: np.ndarray, theta: float, header: Header) -> RopeScaling | None:
    if np.array_equal(factors, np.ones_like(factors)):
        return None
    for scaling in KNOWN_SCALINGS:
        if np.allclose(scaling_factors(scaling, theta, 2 * len(factors)), factors, rtol=1e-3):
            return scaling
    raise UserError(f"{header.path}: {FREQUENCIES} is none of the scalings that Llama 3.1 and 3.2 were published with.")


def architecture_of(cfg: ModelConfig) -> str:
    """Returns the GGUF architecture whose block this is. Raises UserError when none has it."""
    for kind, (qkv_bias, qk_norm, _) in ARCHITECTURES.items():
        if (qkv_bias, qk_norm) == (cfg.qkv_bias, cfg.qk_norm):
            return kind
    raise UserError("No published architecture has both qkv_bias and qk_norm, so this model cannot be written for others.")


def metadata_of(cfg: ModelConfig) -> dict[str, Any]:
    """Returns {key: int | float} of an architecture, without its prefix; floats are to be written as float32."""
    return {
        "block_count": cfg.layers,
        "context_length": cfg.context,
        "embedding_length": cfg.width,
        "feed_forward_length": cfg.ff,
        "attention.head_count": cfg.heads,
        "attention.head_count_kv": cfg.kv_heads,
        "attention.key_length": cfg.head_dim,
        "attention.value_length": cfg.head_dim,
        "attention.layer_norm_rms_epsilon": cfg.eps,
        "rope.freq_base": cfg.rope_theta,
        "rope.dimension_count": cfg.head_dim,
        "vocab_size": cfg.vocab,
    }
