"""ModelConfig: a description that is wrong is refused by the name of what is wrong, and one that is right survives JSON."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import by_hand
from engine.counting.params import count_params
from engine.errors import UserError
from engine.model.config import PRESETS, Llama3Scaling, LoraConfig, ModelConfig, YarnScaling, preset
from engine.model.paths import leaf_paths
from engine.model.shapes import leaf_shapes
from engine.model.transformer import forward, init_params
from tests.tiny import tiny_config

# Of the published models: the numbers on their cards, or the sum of the shapes in their files.
PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "tinyllama-1.1b": 1_100_048_384,
    "llama-3.2-1b": 1_235_814_400,
    "qwen2.5-0.5b": 494_032_768,
    "qwen3-0.6b": 596_049_920,
}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_the_shapes_it_promises(name):
    """The engine makes the leaves that the formulas count: traced, not computed, and in two blocks,
    for they are all alike.
    """
    assert count_params(preset(name)).total == PUBLISHED.get(name, count_params(preset(name)).total)
    cfg = dataclasses.replace(preset(name), layers=2)
    params = jax.eval_shape(lambda key: init_params(cfg, key), jax.random.key(0))
    leaves = leaf_paths(params)
    assert {path: leaf.shape for path, leaf in leaves.items()} == leaf_shapes(cfg)
    assert sum(leaf.size for leaf in leaves.values()) == count_params(cfg).total
    assert all(leaf.dtype == np.float32 for leaf in leaves.values())
    assert ("head" in params) == (not cfg.tied)

    tokens = jax.ShapeDtypeStruct((2, 7), np.int32)
    logits, cache = jax.eval_shape(
        lambda params, tokens: forward(cfg, params, tokens, tokens), params, tokens
    )
    assert (logits.shape, logits.dtype, cache) == ((2, 7, cfg.vocab), np.float32, None)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.whole] * (name not in ("tiny", "demo"))) for name in PRESETS],
)
def test_every_preset_starts_at_chance(name):
    """The first loss is within 1% of ln V whatever the key, as if nothing were known, at a width
    where the own logit shows.
    """
    cfg = preset(name)
    cfg = dataclasses.replace(
        cfg,
        vocab=min(cfg.vocab, 4096),
        width=min(cfg.width, 768),
        layers=2,
        heads=cfg.groups,
        kv_heads=1,
        head_dim=64,
        ff=512,
        dtype="float32",
    )
    for seed in range(8 if name == "tiny" else 1 + cfg.tied):  # the fewest tokens stray most
        params = init_params(cfg, jax.random.key(seed))
        tokens, targets = np.random.default_rng(seed).integers(0, cfg.vocab, (2, 8, 64))
        logits = by_hand.forward(cfg, params, tokens)
        own, wanted = (np.take_along_axis(logits, ids[..., None], -1).mean() for ids in (tokens, targets))
        assert np.log(np.exp(logits).sum(-1)).mean() - wanted == pytest.approx(np.log(cfg.vocab), rel=0.01)
        assert abs(own) < 1, "a token does not predict itself"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"vocab": 0}, "vocab"),
        ({"width": -20}, "width"),
        ({"layers": 0}, "layers"),
        ({"layers": 2.0}, "layers"),
        ({"heads": 0}, "heads"),
        ({"heads": 0, "head_dim": 0}, "heads"),
        ({"ff": "28"}, "ff"),
        ({"context": None}, "context"),
        ({"kv_heads": -3}, "kv_heads"),
        ({"kv_heads": 4}, "6 query heads cannot share 4 key heads"),
        ({"kv_heads": 12}, "6 query heads cannot share 12 key heads"),
        ({"head_dim": 3}, "head_dim 3 is odd"),
        ({"head_dim": 0}, "width 20 is not a multiple of heads 6"),
        ({"dtype": "float16"}, "dtype"),
        ({"remat": "all"}, "remat"),
        ({"heads": "6"}, "heads"),
        ({"vocab": True}, "vocab"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"eps": 0.0}, "eps"),
    ],
)
def test_a_wrong_number_is_refused_by_name(changes, named):
    with pytest.raises(UserError, match=named):
        tiny_config(**changes)


def test_what_is_left_out_is_derived():
    cfg = ModelConfig(vocab=41, width=24, layers=2, heads=6, ff=28, context=9)
    assert (cfg.kv_heads, cfg.head_dim, cfg.groups, cfg.qkv_width) == (6, 4, 1, 72)
    assert (tiny_config().groups, tiny_config().qkv_width) == (2, (6 + 2 * 3) * 4)


configs = st.builds(
    lambda heads, kv, head_dim, scaling, **rest: ModelConfig(
        heads=heads * kv, kv_heads=kv, head_dim=2 * head_dim, rope_scaling=scaling, **rest
    ),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 40),
    st.none()
    | st.builds(Llama3Scaling, st.floats(1, 64), st.just(1.0), st.just(4.0), st.integers(1, 8192))
    | st.builds(YarnScaling, st.floats(1, 64), st.integers(1, 8192), st.floats(0.5, 2)),
    vocab=st.integers(1, 99),
    width=st.integers(1, 99),
    layers=st.integers(1, 9),
    ff=st.integers(1, 99),
    context=st.integers(1, 99),
    rope_theta=st.floats(1, 1e7),
    eps=st.floats(1e-9, 1e-3),
    tied=st.booleans(),
    qk_norm=st.booleans(),
    qkv_bias=st.booleans(),
    dtype=st.sampled_from(["bfloat16", "float32"]),
    scan=st.booleans(),
    remat=st.sampled_from(["none", "block"]),
)


@given(configs)
def test_json_and_back_is_the_same_config(cfg):
    again = ModelConfig.from_json(json.loads(json.dumps(cfg.to_json())))
    assert again == cfg
    assert hash(again) == hash(cfg)
    assert cfg.architecture_differences(again) == []


SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context": 64}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_thetta": 1.0}, "'rope_thetta'.*'rope_theta'"),
        ({"sliding_window": 128}, "sliding_window"),
        ({"rope_scaling": SCALING | {"beta_fast": 32.0}}, "beta_fast"),
        ({"rope_scaling": {"original_context": 64}}, "factor"),
        ({"vocab": None}, "vocab"),
    ],
)
def test_a_field_that_is_unknown_or_missing_is_named(changes, named):
    fields = {name: value for name, value in (tiny_config().to_json() | changes).items() if value is not None}
    with pytest.raises(UserError, match=named):
        ModelConfig.from_json(fields)


def test_an_unknown_preset_names_the_nearest_and_lists_all():
    with pytest.raises(UserError, match=r"'smolm2-135m'.*Did you mean 'smollm2-135m'"):
        preset("smolm2-135m")
    with pytest.raises(UserError, match="tiny, demo, nano"):
        preset("")


def test_how_a_model_is_computed_is_not_its_architecture():
    cfg = tiny_config()
    assert (
        cfg.architecture_differences(tiny_config(dtype="bfloat16", scan=True, remat="block", context=9)) == []
    )
    assert cfg.architecture_differences(tiny_config(ff=30, qk_norm=False)) == ["ff", "qk_norm"]


def test_an_adapters_targets_are_put_in_the_models_order():
    assert LoraConfig(targets=("v", "q", "q")).adapted_matrices == ("q", "v")
    assert LoraConfig(targets=("o", "gate")).adapted_matrices == ("out", "gate")
    assert LoraConfig().adapted_matrices == (*tiny_config().matrices,)
    assert str(LoraConfig(4, targets=("q", "v"))) == "rank=4,alpha=16,targets=q,v"


@pytest.mark.parametrize(
    ("field", "sentence"),
    [
        ({"targets": ("query",)}, "no target 'query'"),
        ({"targets": ("dwon",)}, "Did you mean 'down'?"),
        ({"targets": ()}, "at least one target"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"alpha": 0.0}, "alpha must be above 0"),
    ],
)
def test_an_adapter_that_no_model_can_have_is_refused(field, sentence):
    with pytest.raises(UserError, match=sentence):
        LoraConfig(**field)
