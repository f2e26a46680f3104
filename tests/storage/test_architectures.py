"""config.json to ModelConfig and back: published models are what their presets say, and what is not known is refused."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from engine.model.config import PRESETS, ModelConfig, YarnScaling, preset
from engine.storage.architectures import DEFAULTS, config_from_json, config_to_json, note_unknown_json
from tests.storage.refusals import refusal

PATH = Path("config.json")
COMMON = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.0",
    "use_cache": True,
}
LLAMA = COMMON | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
SMOLLM2 = LLAMA | {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "rope_interleaved": False,
    "rope_theta": 100000,
    "transformers.js_config": {"dtype": "q4"},
    "vocab_size": 49152,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "smollm2-135m": SMOLLM2,
    "tinyllama-1.1b": LLAMA
    | {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "max_position_embeddings": 2048,
        "num_attention_heads": 32,
        "num_hidden_layers": 22,
        "num_key_value_heads": 4,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "llama-3.2-1b": LLAMA
    | {
        "bos_token_id": 128000,
        "eos_token_id": [128001],
        "head_dim": 64,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "rope_theta": 500000.0,
        "vocab_size": 128256,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    },
    "mistral-7b-v0.3": COMMON
    | {
        "architectures": ["MistralForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "vocab_size": 32768,
    },
    "qwen2.5-0.5b": COMMON
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 21,
        "model_type": "qwen2",
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "qwen3-0.6b": COMMON
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": 128,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000,
        "sliding_window": None,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
}


MISTRAL = PUBLISHED["mistral-7b-v0.3"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_their_presets(name):
    assert config_from_json(PUBLISHED[name], PATH) == preset(name)
    assert not note_unknown_json(PUBLISHED[name], PATH)


def test_a_field_that_is_not_known_is_named_once_and_ignored():
    future = SMOLLM2 | {"next_month": {"a": 1}, "num_key_value_head": 9} | {f"field_{n}": n for n in range(9)}
    assert config_from_json(future, PATH) == preset("smollm2-135m")
    (note,) = note_unknown_json(future, PATH)
    assert "'next_month', 'num_key_value_head', 'field_0'" in note
    assert note.endswith("and 3 more")


YARN = dataclasses.replace(
    preset("qwen2.5-0.5b"), rope_scaling=YarnScaling(2.5, 32768, 1.25, fast_turns=20.0), context=81920
)


@pytest.mark.parametrize("cfg", [*PRESETS.values(), YARN], ids=[*PRESETS, "yarn"])
def test_what_is_written_is_read_as_the_same(cfg):
    config = config_to_json(cfg, cfg.dtype, {"eos_token_id": 2})
    assert config_from_json(config, PATH) == cfg
    assert config["eos_token_id"] == 2


def test_float32_files_are_computed_in_float32():
    assert config_from_json(SMOLLM2 | {"torch_dtype": "float32"}, PATH).dtype == "float32"
    assert config_from_json(SMOLLM2 | {"torch_dtype": None, "dtype": "float32"}, PATH).dtype == "float32"
    assert config_from_json(SMOLLM2 | {"torch_dtype": "float16"}, PATH).dtype == "bfloat16"


QWEN = PUBLISHED["qwen2.5-0.5b"] | {"use_sliding_window": True, "sliding_window": 100}


@pytest.mark.parametrize(
    ("values", "context"),
    [
        (MISTRAL | {"sliding_window": 32768}, 32768),
        (
            MISTRAL
            | {"sliding_window": 4000, "use_sliding_window": False, "layer_types": ["sliding_attention"]},
            4000,
        ),
        # no field of Llama's
        (SMOLLM2 | {"sliding_window": 100, "use_sliding_window": True}, 8192),
        (QWEN, 100),
        (QWEN | {"max_window_layers": 24, "layer_types": ["full_attention", "sliding_attention"]}, 100),
        (QWEN | {"layer_types": ["full_attention"]}, 32768),
    ],
)
def test_the_context_is_one_window(values, context):
    assert config_from_json(values, PATH).context == context


OMITTED = json.loads((Path(__file__).parent / "golden" / "omitted.txt").read_text())["families"]


@pytest.mark.parametrize(
    ("family", "field"), [(family, field) for family in OMITTED for field in OMITTED[family]["omitted"]]
)
def test_a_field_left_out_means_what_it_means_to_transformers(family, field):
    config = OMITTED[family]["config"] | {"model_type": family}
    rest = {name: value for name, value in config.items() if name != field}
    assert config_from_json(rest, PATH) == config_from_json(config | OMITTED[family]["omitted"][field], PATH)


def test_every_default_was_asked_for():
    assert all(OMITTED[family]["omitted"].keys() >= DEFAULTS[family].keys() for family in DEFAULTS)
    read = config_from_json(scaled(original_max_position_embeddings=None), PATH)
    assert read.rope_scaling.original_context == read.context == 131072


def scaled(**changes):
    llama = PUBLISHED["llama-3.2-1b"]
    return llama | {"rope_scaling": llama["rope_scaling"] | changes}


def yarn(**changes):
    """Qwen2.5's config with the scaling that its authors name for long texts."""
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    return PUBLISHED["qwen2.5-0.5b"] | {"rope_scaling": scaling | changes}


def test_yarn_without_its_own_numbers_has_those_of_its_authors():
    cfg = config_from_json(yarn(), PATH)
    assert cfg.rope_scaling == YarnScaling(4.0, 32768, 0.1 * math.log(4) + 1, 32.0, 1.0)
    assert cfg.context == 131072


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model_type": "gemma"},
            ["model_type 'gemma' is not known here; llama, mistral, qwen2, qwen3 are."],
        ),
        ({"model_type": ["llama"]}, ["model_type"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "'gelu'", "silu"]),
        ({"hidden_size": None}, ["hidden_size"]),
        ({"hidden_size": "576"}, ["hidden_size", "'576'"]),
        ({"hidden_size": 2**60}, ["hidden_size"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps"]),
        ({"tie_word_embeddings": "yes"}, ["tie_word_embeddings"]),
        ({"num_attention_heads": 10}, ["not a multiple of heads 10"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope_type", "'linear'"]),
        ({"rope_scaling": "llama3"}, ["rope_scaling should be an object"]),
        (scaled(beta_fast=32), ["'beta_fast'"]),
        (scaled(factor=None), ["factor"]),
        (scaled(low_freq_factor=4.0), ["low_freq_factor below high_freq_factor"]),
        (yarn(factor=None), ["factor"]),
        (yarn(factor=0.5), ["a factor of at least 1"]),
        (yarn(factor=1e300), ["factor"]),
        (yarn(beta_fast=1.0), ["beta_fast above beta_slow"]),
        (yarn(attention_factor=0.0), ["attention factor should be above 0"]),
        (yarn(mscale=0.7), ["'yarn' has a field 'mscale'"]),
        (yarn(truncate=False), ["'truncate'"]),
        (MISTRAL | {"sliding_window": "4096"}, ["sliding_window", "'4096'"]),
        (
            PUBLISHED["qwen3-0.6b"] | {"layer_types": ["sliding_attention"]},
            ["layer_types", "'sliding_attention'"],
        ),
        (PUBLISHED["qwen3-0.6b"] | {"layer_types": 3}, ["layer_types"]),
    ],
)
def test_what_is_not_understood_is_refused_by_name(changes, words):
    sentence = refusal(config_from_json, SMOLLM2 | changes, PATH)
    assert all(word in sentence for word in words), sentence


def test_each_field_that_changes_the_mathematics_is_refused():
    fields = {
        "attention_bias": True,
        "mlp_bias": True,
        "rope_interleaved": True,
        "attention_dropout": 0.1,
        "logit_softcapping": 30.0,
        "num_local_experts": 8,
        "partial_rotary_factor": 0.5,
        "residual_multiplier": 2.0,
        "attention_chunk_size": 64,
        "auto_map": {"AutoModel": "model.Mine"},
        "quantization_config": {"bits": 4},
    }
    for name, value in fields.items():
        assert f"{name} is " in refusal(config_from_json, SMOLLM2 | {name: value}, PATH)


def test_a_block_that_nobody_has_cannot_be_written():
    both = ModelConfig(
        vocab=41, width=20, layers=2, heads=6, head_dim=4, ff=28, context=9, qk_norm=True, qkv_bias=True
    )
    assert "both qkv_bias and qk_norm" in refusal(config_to_json, both, "float32", {})
