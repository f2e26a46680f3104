"""A Hugging Face config.json and our ModelConfig, both ways. What is not understood is refused by name, never ignored."""

from pathlib import Path
from typing import Any, NamedTuple

from engine.errors import UserError, nearest
from engine.model.config import ModelConfig, RopeScaling
from engine.storage.untrusted import quote


class Family(NamedTuple):
    """The architecture that a model_type implies beyond the fields of its config."""

    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False
    head_dim: int = 0  # where the config does not say; 0: width / heads


FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True, head_dim=128),
}

# Fields that describe a part of the model which is not built here: they must say that it is absent.
ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,), "pretraining_tp": (1,),
    "rope_interleaved": (False,), "partial_rotary_factor": (1, 1.0), "attention_dropout": (0, 0.0), "resid_pdrop": (0, 0.0),
    "embd_pdrop": (0, 0.0), "hidden_dropout": (0, 0.0), "is_encoder_decoder": (False,), "is_decoder": (False, True),
    "add_cross_attention": (False,), "chunk_size_feed_forward": (0,), "quantization_config": (None,), "auto_map": (None,),
    "cross_attention_hidden_size": (None,), "pruned_heads": (None, {}), "tie_encoder_decoder": (False,),
    "logits_to_keep": (0,),
}  # fmt: skip

# Fields that say nothing about what the weights compute.
IGNORED = {
    "_name_or_path", "_attn_implementation", "_attn_implementation_autoset", "architectures", "bos_token_id", "bad_words_ids",
    "begin_suppress_tokens", "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype", "early_stopping",
    "encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty", "finetuning_task",
    "forced_bos_token_id", "forced_eos_token_id", "id2label", "initializer_range", "is_llama_config", "label2id",
    "length_penalty", "max_length", "max_window_layers", "min_length", "model_type", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_return_sequences", "output_attentions", "output_hidden_states", "output_scores",
    "pad_token_id", "prefix", "problem_type", "remove_invalid_values", "repetition_penalty", "return_dict",
    "return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss",
    "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript", "transformers.js_config", "transformers_version",
    "typical_p", "unsloth_fixed", "unsloth_version", "use_bfloat16", "use_cache",
}  # fmt: skip

USED = {
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters",
    "tie_word_embeddings", "sliding_window", "use_sliding_window", "layer_types",
}  # fmt: skip

ROPE_FIELDS = {
    "default": {"rope_type", "type", "rope_theta"},
    "llama3": {
        "rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    },
}  # fmt: skip


def config_from(fields: dict[str, Any], path: Path) -> ModelConfig:
    """Returns the architecture that a config.json describes; `path` is what an error calls it.

    Raises UserError naming a field that is missing, unknown, or asks for something that is not built here.
    """
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        close = nearest(str(kind), list(FAMILIES))
        raise UserError(f"{path}: model_type {quote(kind)} is not known here; {', '.join(FAMILIES)} are.{close}")
    family = FAMILIES[kind]
    for name, value in fields.items():
        if name in ONLY and value not in ONLY[name]:
            raise UserError(f"{path}: {name} is {quote(value)}, and only {ONLY[name][0]} can be computed here.")
        if name not in ONLY and name not in USED and name not in IGNORED:
            close = nearest(name, sorted(USED))
            raise UserError(f"{path}: the field {quote(name)} is not known here, and what it changes would be missing.{close}")
    context = _number(fields, "max_position_embeddings", path, int)
    _check_window(fields, kind, context, path)
    theta, scaling = _rope(fields, path)
    heads = _number(fields, "num_attention_heads", path, int)
    width = _number(fields, "hidden_size", path, int)
    return ModelConfig(
        vocab=_number(fields, "vocab_size", path, int),
        width=width,
        layers=_number(fields, "num_hidden_layers", path, int),
        heads=heads,
        kv_heads=_number(fields, "num_key_value_heads", path, int, heads),
        head_dim=_number(fields, "head_dim", path, int, family.head_dim),
        ff=_number(fields, "intermediate_size", path, int),
        context=context,
        rope_theta=theta,
        rope_scaling=scaling,
        eps=_number(fields, "rms_norm_eps", path, float, 1e-6),
        tied=_flag(fields, "tie_word_embeddings", path),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        dtype="float32" if "float32" in (fields.get("dtype"), fields.get("torch_dtype")) else "bfloat16",
    )


def _number(fields: dict[str, Any], name: str, path: Path, kind: type, default: Any = None) -> Any:
    value = fields.get(name)
    value = default if value is None else value
    if value is None:
        raise UserError(f"{path} does not say {name}.")
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float) or not 0 <= value < 2**40:
        raise UserError(f"{path}: {name} should be a number of ordinary size, not {quote(value)}.")
    return kind(value)


def _flag(fields: dict[str, Any], name: str, path: Path) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise UserError(f"{path}: {name} should be true or false, not {quote(value)}.")
    return value


def _check_window(fields: dict[str, Any], kind: str, context: int, path: Path) -> None:
    """Raises UserError for a window of attention that some token would reach beyond: that is not built here."""
    window = fields.get("sliding_window")
    used = _flag(fields, "use_sliding_window", path) if kind != "mistral" else window is not None
    if used and (type(window) is not int or window < context):
        raise UserError(
            f"{path}: sliding_window is {quote(window)} with a context of {context:,}, and attention in windows is not built "
            "here. Lower max_position_embeddings to the window to use the model within it."
        )
    layers = fields.get("layer_types")
    if layers is not None and (not isinstance(layers, list) or any(layer != "full_attention" for layer in layers)):
        other = next((layer for layer in layers if layer != "full_attention"), layers) if isinstance(layers, list) else layers
        raise UserError(f"{path}: layer_types has {quote(other)}, and only full_attention is built here.")


def _rope(fields: dict[str, Any], path: Path) -> tuple[float, RopeScaling | None]:
    """Returns theta and scaling: `rope_theta` and `rope_scaling` or, since transformers 5, `rope_parameters`."""
    rope: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        value = fields.get(name)
        if value is not None and not isinstance(value, dict):
            raise UserError(f"{path}: {name} should be an object or null, not {quote(value)}.")
        rope |= value or {}
    theta = _number(rope | {"rope_theta": rope.get("rope_theta", fields.get("rope_theta"))}, "rope_theta", path, float, 1e4)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_FIELDS:
        raise UserError(f"{path}: rope_type {quote(kind)} is not built here; {' and '.join(ROPE_FIELDS)} are.")
    for name, value in rope.items():
        if name not in ROPE_FIELDS[kind] and not (name == "partial_rotary_factor" and value == 1):
            raise UserError(f"{path}: the rope scaling {kind!r} has a field {quote(name)} that is not known here.")
    if kind == "default":
        return theta, None
    low, high = _number(rope, "low_freq_factor", path, float), _number(rope, "high_freq_factor", path, float)
    factor = _number(rope, "factor", path, float)
    original = _number(rope, "original_max_position_embeddings", path, int)
    if not (low < high and factor > 0 and original > 0):
        raise UserError(f"{path}: the rope scaling needs low_freq_factor below high_freq_factor, and sizes above 0.")
    return theta, RopeScaling(factor, low, high, original)


def family_of(cfg: ModelConfig) -> str:
    """Returns the model_type whose block this is. Raises UserError when no published one has it."""
    for kind in ("llama", "qwen2", "qwen3"):
        if (FAMILIES[kind].qkv_bias, FAMILIES[kind].qk_norm) == (cfg.qkv_bias, cfg.qk_norm):
            return kind
    raise UserError("No published architecture has both qkv_bias and qk_norm, so this model cannot be written for others.")


def config_to(cfg: ModelConfig, dtype: str, tokens: dict[str, Any]) -> dict[str, Any]:
    """Returns the config.json that transformers 4 and 5 read as this architecture; `tokens` adds bos_token_id and the like."""
    kind = family_of(cfg)
    scaling = cfg.rope_scaling and {
        "rope_type": "llama3",
        "factor": cfg.rope_scaling.factor,
        "low_freq_factor": cfg.rope_scaling.low_freq_factor,
        "high_freq_factor": cfg.rope_scaling.high_freq_factor,
        "original_max_position_embeddings": cfg.rope_scaling.original_context,
    }
    return {
        "architectures": [FAMILIES[kind].architecture],
        "model_type": kind,
        "vocab_size": cfg.vocab,
        "hidden_size": cfg.width,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads,
        "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.head_dim,
        "intermediate_size": cfg.ff,
        "max_position_embeddings": cfg.context,
        "hidden_act": "silu",
        "rms_norm_eps": cfg.eps,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": cfg.tied,
        **({"attention_bias": False} if kind != "qwen2" else {}),
        "attention_dropout": 0.0,
        "torch_dtype": dtype,
        "use_cache": True,
        **tokens,
    }
