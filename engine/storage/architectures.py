"""The families of models known here: ModelConfig from a config.json or a GGUF file's metadata, and back."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from engine.errors import UserError
from engine.model.config import ModelConfig, YarnScaling
from engine.storage.rope_scaling import (
    GGUF_YARN,
    rope_from_gguf,
    rope_from_json,
    rope_to_gguf,
    rope_to_json,
)
from engine.untrusted import Fields, known_name, quote

if TYPE_CHECKING:
    from engine.storage.gguf_header import Header

# Architecture -> the options of its block that its fields do not state. Mistral's block is Llama's;
# GGUF has no name for it.
BLOCKS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
}
GGUF_BLOCKS = {name: block for name, block in BLOCKS.items() if name != "mistral"}

# Our name of a size -> its name in a config.json, and in a GGUF file.
SIZES = {
    "vocab": ("vocab_size", "vocab_size"),
    "width": ("hidden_size", "embedding_length"),
    "layers": ("num_hidden_layers", "block_count"),
    "heads": ("num_attention_heads", "attention.head_count"),
    "kv_heads": ("num_key_value_heads", "attention.head_count_kv"),
    "head_dim": ("head_dim", "attention.key_length"),
    "ff": ("intermediate_size", "feed_forward_length"),
    "context": ("max_position_embeddings", "context_length"),
}
JSON_SIZES = {ours: json_name for ours, (json_name, _) in SIZES.items()}
GGUF_SIZES = {ours: gguf_name for ours, (_, gguf_name) in SIZES.items()}


def _read_sizes(fields: Fields, names: dict[str, str]) -> dict[str, int]:
    derived = {"kv_heads": 0, "head_dim": 0}  # by ModelConfig, where they are left out or null
    return {ours: fields.number(theirs, int, derived.get(ours)) for ours, theirs in names.items()}


def architecture_of(cfg: ModelConfig) -> str:
    """Returns the published architecture with this qkv_bias and qk_norm. Raises UserError when
    there is none.
    """
    options = {option: True for option in ("qkv_bias", "qk_norm") if getattr(cfg, option)}
    for name, block in BLOCKS.items():
        if block == options:
            return name
    raise UserError(
        "No published architecture has both qkv_bias and qk_norm, so this model cannot be written for others."
    )


# config.json

# Fields that change what the weights compute, in a way that is not built here -> the values that do
# not.
JSON_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0,),
    "rope_interleaved": (False,),
    "partial_rotary_factor": (1,),
    "quantization_config": (None,),
    "auto_map": (None,),
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale"), (1,)),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "clip_qkv", "no_rope_layers", "attention_chunk_size"), (None, 0)
    ),
    **dict.fromkeys(("logit_softcapping", "attn_logit_softcapping", "final_logit_softcapping"), (None, 0)),
}

# Fields of most published models that say nothing about what the weights compute.
JSON_HARMLESS = (
    "_.*|.*_token_id|(transformers|unsloth|is_llama).*|(torch_)?dtype|architectures|"
    "initializer_range|model_type|pretraining_tp|use_cache"
)

JSON_USED = {
    *JSON_SIZES.values(),
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "tie_word_embeddings",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
}

# What a field that is left out means: the defaults of each family's config class in transformers
# 5.24.0. The rest are None there, and derived; rope_theta is `default_theta`.
# tests/storage/golden/omitted.txt holds what transformers makes of each.
_COMMON = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
}
_QWEN = _COMMON | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _COMMON | {"vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048},
    "mistral": _COMMON
    | {
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
}


def config_from_json(values: dict[str, Any], path: Path) -> ModelConfig:
    """Returns the architecture in a config.json, whose context is at most its attention window.

    A field that is left out has its family's default. Raises UserError, naming it, for one that
    cannot be computed here.
    """
    kind = known_name(values.get("model_type"), BLOCKS, "model_type", path)
    Fields(values, path).check(JSON_ONLY)
    fields = Fields(DEFAULTS[kind] | values, path)
    sizes: dict[str, Any] = _read_sizes(fields, JSON_SIZES)
    theta, scaling = rope_from_json(fields, sizes["context"])
    if isinstance(scaling, YarnScaling):
        sizes["context"] = scaling.context
    window = _window(fields, kind, sizes["layers"])
    if window:
        sizes["context"] = min(sizes["context"], window)
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    if "float32" in (values.get("dtype"), values.get("torch_dtype")):
        dtype = "float32"
    return ModelConfig(
        **sizes,
        rope_theta=theta,
        rope_scaling=scaling,
        eps=fields.number("rms_norm_eps", float),
        tied=fields.flag("tie_word_embeddings"),
        **BLOCKS[kind],
        dtype=dtype,
    )


def note_unknown_json(values: dict[str, Any], path: Path) -> tuple[str, ...]:
    return Fields(values, path).note_unknown({*JSON_USED, *JSON_ONLY}, JSON_HARMLESS)


def _window(fields: Fields, kind: str, layers: int) -> int:
    """Returns how many keys a layer with a window attends to at most, 0 without one: a context of
    no more tokens needs none.

    Raises UserError for a kind of layer that is not built here.
    """
    types = fields.values.get("layer_types")
    if not isinstance(types, list | None):
        raise UserError(f"{fields.path}: layer_types should be a list, not {quote(types)}.")
    has_windows = _has_windows(fields, kind, types or [], layers)
    allowed = ["full_attention"]
    if has_windows:
        allowed.append("sliding_attention")
    for layer_type in types or []:
        if layer_type not in allowed:
            raise UserError(
                f"{fields.path}: layer_types has {quote(layer_type)}, and only full_attention is built here."
            )
    if has_windows:
        return fields.number("sliding_window", int)
    return 0


def _has_windows(fields: Fields, kind: str, types: list[Any], layers: int) -> bool:
    """Whether a layer attends in windows. `types`: of the layers, where the fields list them."""
    if fields.values.get("sliding_window") is None or "sliding_window" not in DEFAULTS[kind]:
        return False
    if kind == "mistral":
        return True
    if types:
        any_layer = "sliding_attention" in types
    else:
        any_layer = fields.number("max_window_layers", int) < layers
    return fields.flag("use_sliding_window") and any_layer


def config_to_json(cfg: ModelConfig, dtype: str, tokens: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a config.json in transformers 4's names, which 5 reads too. `tokens`:
    bos_token_id and the like.
    """
    kind = architecture_of(cfg)
    return {
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "model_type": kind,
        **{theirs: getattr(cfg, ours) for ours, theirs in JSON_SIZES.items()},
        "hidden_act": "silu",
        "rms_norm_eps": cfg.eps,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": rope_to_json(cfg.rope_scaling),
        "tie_word_embeddings": cfg.tied,
        **({"attention_bias": False} if kind != "qwen2" else {}),
        "attention_dropout": 0.0,
        "torch_dtype": dtype,
        "use_cache": True,
        **tokens,
    }


# GGUF

HEAD_WIDTHS = ("attention.value_length", "rope.dimension_count")
EPS = "attention.layer_norm_rms_epsilon"
THETA = "rope.freq_base"
WINDOW = "attention.sliding_window"
GGUF_USED = {*GGUF_SIZES.values(), *HEAD_WIDTHS, EPS, THETA, WINDOW, *GGUF_YARN}
GGUF_HARMLESS = "rope.scaling.finetuned|tensor_data_layout|use_parallel_residual"
# Keys that change what the weights compute, in a way that is not built here -> the values that do
# not.
GGUF_ONLY: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    **dict.fromkeys(("expert_count", "expert_used_count"), (0,)),
    "rope.scale_linear": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0, -1.0),
    "rope.scaling.yarn_attn_factor": (1.0, -1.0),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    **dict.fromkeys(("logit_scale", "residual_scale", "embedding_scale"), (1.0,)),
    **dict.fromkeys(("attention.scale", "attn_logit_softcapping", "final_logit_softcapping"), (0.0,)),
}


def config_from_gguf(header: "Header") -> ModelConfig:
    """Returns a file's architecture; refuses, by name, a key that is missing or cannot be computed here."""
    path = header.path
    metadata = header.metadata
    kind = known_name(metadata.get("general.architecture"), GGUF_BLOCKS, "general.architecture", path)
    own = _gguf_fields(header)
    own.check(GGUF_ONLY)
    table = header.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise UserError(f"{path} has no embedding, token_embd.weight, or not one of two dimensions.")
    fields = own._replace(values=own.values | {"vocab_size": table.shape[0]})
    theta = fields.number(THETA, float, 10000.0)
    sizes: dict[str, Any] = _read_sizes(fields, GGUF_SIZES)
    scaling = rope_from_gguf(header, fields, theta, sizes["context"])
    if isinstance(scaling, YarnScaling):
        sizes["context"] = scaling.context
    # Within the first window of keys, attention in windows is the plain one.
    window = fields.number(WINDOW, int, 0)
    if window:
        sizes["context"] = min(sizes["context"], window)
    cfg = ModelConfig(
        **sizes,
        rope_theta=theta,
        rope_scaling=scaling,
        eps=fields.number(EPS, float),
        tied="output.weight" not in header.tensors,
        **BLOCKS[kind],
    )
    for key in HEAD_WIDTHS:
        value = fields.number(key, int, cfg.head_dim)
        if value != cfg.head_dim:
            raise UserError(
                f"{path}: {kind}.{key} is {value} and not {cfg.head_dim}, "
                "a head's width; that is not built here."
            )
    return cfg


def _gguf_fields(header: "Header") -> Fields:
    prefix = f"{header.metadata['general.architecture']}."
    own = {
        key.removeprefix(prefix): value for key, value in header.metadata.items() if key.startswith(prefix)
    }
    return Fields(own, header.path, prefix)


def note_unknown_gguf(header: "Header") -> tuple[str, ...]:
    return _gguf_fields(header).note_unknown({*GGUF_USED, *GGUF_ONLY}, GGUF_HARMLESS)


def config_to_gguf(cfg: ModelConfig) -> dict[str, Any]:
    """Returns the metadata {key: int | float | str} of an architecture, without its prefix; floats are to
    be written as float32.
    """
    sizes = {theirs: getattr(cfg, ours) for ours, theirs in GGUF_SIZES.items()}
    sizes |= dict.fromkeys(HEAD_WIDTHS, cfg.head_dim)
    return sizes | {EPS: cfg.eps, THETA: cfg.rope_theta} | rope_to_gguf(cfg.rope_scaling)
