"""Opens the model in a Hugging Face folder (config.json, safetensors, tokenizer, EOS ids), and writes one.

Nothing in a folder is ever run: no pickle is opened, no code is imported, nothing is fetched.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from engine.errors import UserError
from engine.files import write_json
from engine.model.config import ModelConfig, RopeScaling
from engine.storage import safetensors
from engine.storage.hub import cached_id
from engine.storage.tensor_layout import HUGGING_FACE_NAMES, StoredModel, check_tensors, file_tensors, layout_of
from engine.text import OnProgress
from engine.text.tokenizer import ModelTokenizer, load_tokenizer, save_tokenizer
from engine.untrusted import Fields, known_name, quote, read_json_object

# Architecture -> the options of its block that its fields do not state. Mistral's block is Llama's.
BLOCKS: dict[str, dict[str, Any]] = {"llama": {}, "mistral": {}, "qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}}

# Fields that change what the weights compute, in a way that is not built here -> the values that do not.
ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,), "attention_dropout": (0,),
    "rope_interleaved": (False,), "partial_rotary_factor": (1,), "quantization_config": (None,), "auto_map": (None,),
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale"), (1,)),
    **dict.fromkeys(("num_experts", "num_local_experts", "clip_qkv", "no_rope_layers", "attention_chunk_size"), (None, 0)),
    **dict.fromkeys(("logit_softcapping", "attn_logit_softcapping", "final_logit_softcapping"), (None, 0)),
}  # fmt: skip

# Fields of most published models that say nothing about what the weights compute.
HARMLESS = (
    "_.*|.*_token_id|(transformers|unsloth|is_llama).*|(torch_)?dtype|architectures|initializer_range|model_type|"
    "pretraining_tp|use_cache"
)

# Our name of a size -> theirs.
SIZES = {
    "vocab": "vocab_size", "width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads", "head_dim": "head_dim", "ff": "intermediate_size", "context": "max_position_embeddings",
}  # fmt: skip
USED = {
    *SIZES.values(), "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings", "sliding_window",
    "use_sliding_window", "max_window_layers", "layer_types",
}  # fmt: skip

# What a field that is left out means: the defaults of each family's config class in transformers 5.24.0. The rest are None
# there, and derived; rope_theta is `default_theta`. tests/storage/golden/omitted.txt holds what transformers makes of each.
_COMMON = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
    "tie_word_embeddings": False,
}  # fmt: skip
_QWEN = _COMMON | {
    "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768,
    "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28,
}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _COMMON | {"vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048},
    "mistral": _COMMON | {
        "vocab_size": 32000, "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
}  # fmt: skip

LLAMA3_FIELDS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ROPE_FIELDS: dict[str, tuple[str, ...]] = {"default": (), "llama3": LLAMA3_FIELDS}


def config_from(values: dict[str, Any], path: Path) -> ModelConfig:
    """Returns the architecture in a config.json, whose context is at most its attention window.

    A field that is left out has its family's default. Raises UserError, naming it, for one that cannot be computed here.
    """
    kind = known_name(values.get("model_type"), BLOCKS, "model_type", path)
    Fields(values, path).check(ONLY)
    fields = Fields(DEFAULTS[kind] | values, path)
    derived = {"kv_heads": 0, "head_dim": 0}  # where they are null
    sizes: dict[str, Any] = {ours: fields.number(theirs, int, derived.get(ours)) for ours, theirs in SIZES.items()}
    theta, scaling = _rope(fields, sizes["context"])
    sizes["context"] = min(sizes["context"], _window(fields, kind, sizes["layers"]) or sizes["context"])
    return ModelConfig(
        **sizes,
        rope_theta=theta,
        rope_scaling=scaling,
        eps=fields.number("rms_norm_eps", float),
        tied=fields.flag("tie_word_embeddings"),
        **BLOCKS[kind],
        dtype="float32" if "float32" in (values.get("dtype"), values.get("torch_dtype")) else "bfloat16",
    )


def note_unknown(values: dict[str, Any], path: Path) -> tuple[str, ...]:
    return Fields(values, path).note_unknown({*USED, *ONLY}, HARMLESS)


def _window(fields: Fields, kind: str, layers: int) -> int:
    """Returns how many keys some layer attends to at most, 0 for all.

    Attention in windows is not built here; among as many tokens as a window has keys, it is the plain one.
    """
    types = fields.values.get("layer_types")
    if not isinstance(types, list | None):
        raise UserError(f"{fields.path}: layer_types should be a list, not {quote(types)}.")
    in_windows = fields.values.get("sliding_window") is not None and "sliding_window" in DEFAULTS[kind]
    if in_windows and kind != "mistral":
        has_windows = "sliding_attention" in types if types else fields.number("max_window_layers", int) < layers
        in_windows = fields.flag("use_sliding_window") and has_windows
    for layer in types or ():
        if layer != "full_attention" and not (in_windows and layer == "sliding_attention"):
            raise UserError(f"{fields.path}: layer_types has {quote(layer)}, and only full_attention is built here.")
    return fields.number("sliding_window", int) if in_windows else 0


def _rope(fields: Fields, context: int) -> tuple[float, RopeScaling | None]:
    """Returns theta and scaling; since transformers 5 they are both in `rope_parameters`."""
    path = fields.path
    values = {"rope_theta": fields.values["rope_theta"]}
    for name in ("rope_scaling", "rope_parameters"):
        value = fields.values.get(name)
        if not isinstance(value, dict | None):
            raise UserError(f"{path}: {name} should be an object or null, not {quote(value)}.")
        values |= value or {}
    rope = Fields(values, path)
    theta = rope.number("rope_theta", float)
    kind = known_name(values.get("rope_type", values.get("type", "default")), ROPE_FIELDS, "rope_type", path)
    for name, value in values.items():
        extra = name not in ("rope_type", "type", "rope_theta", *ROPE_FIELDS[kind])
        if extra and not (name == "partial_rotary_factor" and value == 1):
            raise UserError(f"{path}: the rope scaling {kind!r} has a field {quote(name)} that is not known here.")
    if kind == "default":
        return theta, None
    factor, low, high = (rope.number(name, float) for name in LLAMA3_FIELDS[:3])
    original = rope.number(LLAMA3_FIELDS[3], int, context)
    if not (low < high and factor > 0 and original > 0):
        raise UserError(f"{path}: the rope scaling needs low_freq_factor below high_freq_factor, and sizes above 0.")
    return theta, RopeScaling(factor, low, high, original)


def config_to(cfg: ModelConfig, dtype: str, tokens: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a config.json in transformers 4's names, which 5 reads too. `tokens`: bos_token_id and the like."""
    kind = architecture_of(cfg)
    scaling = cfg.rope_scaling and dict(zip(LLAMA3_FIELDS, dataclasses.astuple(cfg.rope_scaling)))
    return {
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "model_type": kind,
        **{theirs: getattr(cfg, ours) for ours, theirs in SIZES.items()},
        "hidden_act": "silu",
        "rms_norm_eps": cfg.eps,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": scaling and {"rope_type": "llama3", **scaling},
        "tie_word_embeddings": cfg.tied,
        **({"attention_bias": False} if kind != "qwen2" else {}),
        "attention_dropout": 0.0,
        "torch_dtype": dtype,
        "use_cache": True,
        **tokens,
    }


def architecture_of(cfg: ModelConfig) -> str:
    """Returns the published architecture with this qkv_bias and qk_norm. Raises UserError when there is none."""
    options = {option: True for option in ("qkv_bias", "qk_norm") if getattr(cfg, option)}
    for name, block in BLOCKS.items():
        if block == options:
            return name
    raise UserError("No published architecture has both qkv_bias and qk_norm, so this model cannot be written for others.")


def open_model(path: Path) -> StoredModel:
    """Opens a folder: checks its architecture and tensors against one another; reads no weights."""
    fields = read_json_object(path / "config.json")
    cfg = config_from(fields, path / "config.json")
    files = safetensors.read_folder(path)
    stored = {name: tensor for name, tensor in files.items() if not name.endswith(".rotary_emb.inv_freq")}
    head = stored.pop(HUGGING_FACE_NAMES["head"], None) if cfg.tied else None
    leaves = check_tensors(layout_of(cfg, HUGGING_FACE_NAMES), {name: tensor.shape for name, tensor in stored.items()}, path)
    for name, tensor in stored.items():
        if tensor.dtype not in safetensors.FLOATS:
            readable = ", ".join(safetensors.FLOATS)
            raise UserError(f"{tensor.path}: the tensor {quote(name)} is {tensor.dtype}; weights are read as {readable}.")
    if head and not _are_equal(head, stored[HUGGING_FACE_NAMES["embed"]]):  # which of the two is meant cannot be known
        raise UserError(f"{path} says tie_word_embeddings but has a lm_head.weight that differs from its embedding.")
    rows = lambda name, start, stop: safetensors.read_slice(stored[name], start, stop)
    hub_id = cached_id(path)  # `_name_or_path` is often the parent's, whose weights are others
    name = hub_id.partition("/")[2] or path.resolve().name
    context = (DEFAULTS[fields["model_type"]] | fields)["max_position_embeddings"]
    tokenizer = lambda: load_tokenizer(path, cfg.vocab, fields.get("eos_token_id"))
    return StoredModel(name, cfg, leaves, rows, tokenizer, context, hub_id, note_unknown(fields, path / "config.json"))


def read_config(path: Path) -> ModelConfig:
    return config_from(read_json_object(path / "config.json"), path / "config.json")


def _are_equal(first: safetensors.StoredTensor, second: safetensors.StoredTensor) -> bool:
    read = lambda stored, start: safetensors.read_slice(stored, start, min(start + 4096, first.shape[0])).tobytes()
    same_kind = (first.shape, first.dtype) == (second.shape, second.dtype)
    return same_kind and all(read(first, start) == read(second, start) for start in range(0, first.shape[0], 4096))


def save_folder(
    folder: Path, cfg: ModelConfig, params: dict[str, Any], tokenizer: ModelTokenizer, *, dtype: str, report: OnProgress = None
) -> None:
    """Writes config.json, model.safetensors, every weight in `dtype`, and what `save_tokenizer` writes.

    params, report: as in `file_tensors`. Raises UserError for an architecture that no family has.
    """
    write_json(folder / "config.json", config_to(cfg, dtype, save_tokenizer(folder, *tokenizer)))
    leaves = list(layout_of(cfg, HUGGING_FACE_NAMES))
    tensors = {leaf.name: jax.ShapeDtypeStruct(leaf.stored, dtype) for leaf in leaves}
    arrays = (array for _, array in file_tensors(leaves, params, report))
    safetensors.write_file(folder / "model.safetensors", tensors, arrays)
