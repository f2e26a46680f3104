"""GGUF files: every quantisation, the rows of q and k put back, and the same model as the Hugging Face folder it came from."""

import dataclasses
import functools
import json
import math
from typing import Any

import gguf
import jax
import numpy as np
import pytest

from engine.inference.config import EngineConfig
from engine.model.config import Llama3Scaling, YarnScaling
from engine.model.paths import leaf_paths, unflatten
from engine.model.shapes import leaf_shapes
from engine.model.transformer import forward
from engine.model.weights.block_layout import KINDS
from engine.model.weights.blocks import Blocks
from engine.model.weights.int8 import Int8
from engine.model.weights.lora import to_dense
from engine.storage import model_loader
from engine.storage.gguf import regroup_rows
from engine.storage.gguf_writer import save_gguf
from engine.storage.kinds_in_words import describe_kinds
from engine.storage.model_loader import load_model
from engine.storage.tensor_layout import GGUF_NAMES, file_tensors, layout_of
from engine.text.tokenizer import train_bpe
from tests.storage.gguf_files import SHAPES, tiny_gguf, weights, words_of
from tests.storage.refusals import refusal
from tests.tiny import lively_params, positions_of, tiny_config, tokens_of

KINDS_READ = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]


@pytest.mark.parametrize("kind", KINDS_READ)
def test_every_quantisation_is_read_as_the_library_reads_it(kind, tmp_path):
    path = tiny_gguf(tmp_path / "x.gguf", kind=kind, arch="qwen3", tensors=weights(QWEN3))
    params = load_model(path, dtype="float32").params
    stored = {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(path).tensors
    }
    block = params["blocks"]["1"]
    part = lambda name: stored[f"blk.1.{name}.weight"]
    for name in "qkv":
        np.testing.assert_array_equal(block[name], part(f"attn_{name}").T)
    for name in ("gate", "up", "down"):
        np.testing.assert_array_equal(block[name], part(f"ffn_{name}").T)
    np.testing.assert_array_equal(params["embed"], stored["token_embd.weight"])
    np.testing.assert_array_equal(block["q_norm"], part("attn_q_norm"))


QWEN3 = SHAPES | {f"blk.{layer}.attn_{part}_norm.weight": (8,) for layer in range(2) for part in "qk"}
QWEN2 = SHAPES | {
    f"blk.{i}.attn_{part}.bias": (n,) for i in range(2) for part, n in (("q", 48), ("k", 24), ("v", 24))
}


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_are_read(kind, tmp_path):
    """The library cannot write them, but any bytes are some weights; 256 numbers a block, so rows
    must be as long.
    """
    _, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    raw = np.random.default_rng(0).integers(0, 60, (64, width), np.uint8)
    scale = np.frombuffer(
        np.float16(0.01).tobytes(), np.uint8
    )  # a block's own, which random bits might make infinite
    raw[:, -2:], raw[:, :4] = scale, np.tile(scale, 2)
    wide = {f"blk.{i}.ffn_{part}.weight": (256, 64) for i in range(2) for part in ("gate", "up")}
    stored = weights(SHAPES | wide) | {f"blk.{i}.ffn_down.weight": raw for i in range(2)}
    path = tiny_gguf(tmp_path / "k.gguf", kind=kind, sizes={"feed_forward_length": 256}, tensors=stored)
    down = load_model(path, dtype="float32").params["blocks"]["0"]["down"]
    expected = gguf.dequantize(raw, gguf.GGMLQuantizationType[kind])
    assert np.isfinite(expected).all()
    assert expected.std() > 0
    np.testing.assert_array_equal(down, expected.T)
    model = load_model(path, keep_kinds=KINDS)
    kept = model.params["blocks"]["0"]["down"]
    written = {
        leaf.path: array
        for leaf, array in file_tensors([*layout_of(model.cfg, GGUF_NAMES)], model.params, None)
    }
    if kind in KINDS:
        # As numbers: no file is written in K kinds.
        np.testing.assert_array_equal(written["blocks/0/down"], expected)
        assert kept.kind == kind
        np.testing.assert_array_equal(to_dense(kept), expected.T)
    else:
        assert kept.dtype == "bfloat16"


def test_llama_files_keep_rotary_pairs_side_by_side(tmp_path):
    stored = weights()
    model = load_model(tiny_gguf(tmp_path / "llama.gguf"), dtype="float32")
    block = {name: np.asarray(leaf).T for name, leaf in model.params["blocks"]["0"].items()}
    q = stored["blk.0.attn_q.weight"].reshape(6, 4, 2, 64)  # head, pair, side
    np.testing.assert_array_equal(block["q"].reshape(6, 2, 4, 64), q.transpose(0, 2, 1, 3))
    k = stored["blk.0.attn_k.weight"].reshape(3, 4, 2, 64)
    np.testing.assert_array_equal(block["k"].reshape(3, 2, 4, 64), k.transpose(0, 2, 1, 3))
    np.testing.assert_array_equal(block["v"], stored["blk.0.attn_v.weight"])
    rows = np.arange(48.0).reshape(24, 2)
    np.testing.assert_array_equal(regroup_rows(regroup_rows(rows, 2, 4), 4, 2), rows)
    assert regroup_rows(rows, 2, 4)[:4, 0].tolist() == [0, 8, 2, 10]


def test_qwen2_has_biases_and_plain_rows(tmp_path):
    stored = weights(QWEN2)
    model = load_model(tiny_gguf(tmp_path / "qwen2.gguf", arch="qwen2", tensors=stored), dtype="float32")
    assert model.cfg.qkv_bias
    block = model.params["blocks"]["1"]
    for part in "qkv":
        np.testing.assert_array_equal(block[f"{part}_bias"], stored[f"blk.1.attn_{part}.bias"])
    np.testing.assert_array_equal(np.asarray(block["q"]).T, stored["blk.1.attn_q.weight"])


def test_what_the_metadata_says_is_the_architecture(tmp_path):
    sizes = {
        "rope.freq_base": 100000.0,
        "attention.key_length": None,
        "attention.value_length": None,
        "embedding_length": 48,
    }
    stored = {name: value[..., :48] if value.shape[-1] == 64 else value for name, value in weights().items()}
    stored = {
        name: value[:48] if name.endswith(("output.weight", "down.weight")) else value
        for name, value in stored.items()
    }
    head = {"output.weight": weights()["token_embd.weight"][:, :48] * 2}
    sizes |= {"attention.sliding_window": 100, "next_month": 3}
    # as llama.cpp writes when it merges parts
    whole = {"split.count": 0, "mradermacher.quantized_by": "a"}
    values = {"temp": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05, "penalty_repeat": 1.05, "mirostat": 0}
    other = (
        whole
        | {"general.name": "Small"}
        | {f"general.sampling.{name}": value for name, value in values.items()}
    )
    path = tiny_gguf(tmp_path / "x.gguf", sizes=sizes, tensors=stored | head, other=other)
    model = load_model(path)
    cfg = model.cfg
    assert (cfg.vocab, cfg.width, cfg.layers, cfg.heads, cfg.kv_heads, cfg.head_dim, cfg.ff) == (
        262,
        48,
        2,
        6,
        3,
        8,
        96,
    )
    assert (cfg.rope_theta, cfg.eps, cfg.tied, cfg.context, cfg.dtype) == (
        100000.0,
        1e-5,
        False,
        100,
        "bfloat16",
    )
    assert model.name == "Small"
    assert "ignored: 'llama.next_month'" in model.notes[0]
    assert "the context of 128 ends with the first, of 100" in model.notes[1]
    assert model.sampling == {
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.8,
        "min_p": 0.05,
        "repetition_penalty": 1.05,
    }
    assert model.params["head"].dtype == "bfloat16"


def test_the_scalings_of_llama_3_are_recognised_by_what_they_make(tmp_path):
    for factor in (8.0, 32.0):
        scaling = Llama3Scaling(factor, 1.0, 4.0, 8192)
        cfg = tiny_config(qk_norm=False, head_dim=16, rope_theta=500_000.0, rope_scaling=scaling)
        save_gguf(
            tmp_path / "x.gguf", cfg, lively_params(cfg), words_of(cfg.vocab), name="x", dtype="float32"
        )
        assert load_model(tmp_path / "x.gguf").cfg.rope_scaling == scaling


def test_the_numbers_of_yarn_are_keys_of_the_file(tmp_path):
    scaling = YarnScaling(4.0, 40, 1.25)
    cfg = tiny_config(qk_norm=False, rope_theta=100.0, context=160, rope_scaling=scaling)
    params = lively_params(cfg)
    save_gguf(tmp_path / "x.gguf", cfg, params, words_of(cfg.vocab), name="x", dtype="float32")
    loaded = load_model(tmp_path / "x.gguf").cfg
    assert loaded.context == 160
    stated = dataclasses.asdict(loaded.rope_scaling)
    assert stated == pytest.approx(dataclasses.asdict(scaling), rel=1e-6), "GGUF keeps float32"


def test_yarn_without_its_own_numbers_has_those_of_its_authors(tmp_path):
    sizes = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "context_length": 128}
    path = tiny_gguf(tmp_path / "x.gguf", sizes=sizes | {"rope.scaling.original_context_length": 32})
    assert load_model(path).cfg.rope_scaling == YarnScaling(4.0, 32, 0.1 * math.log(4) + 1, 32.0, 1.0)


def with_fault(value):
    stored = weights()
    stored["blk.1.ffn_down.weight"][63, 95] = value
    return stored


OTHER_TOKENIZER = json.dumps(train_bpe(["the other text"], 262).to_json())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arch": "gemma2"}, ["architecture 'gemma2'", "llama, qwen2, qwen3"]),
        ({"sizes": {"attn_logit_softcapping": 30.0}}, ["llama.attn_logit_softcapping is 30.0"]),
        ({"sizes": {"rope.scaling.type": "linear"}}, ["rope.scaling.type", "'linear'"]),
        ({"sizes": {"rope.scaling.type": "yarn"}}, ["rope.scaling.factor"]),
        ({"sizes": {"rope.scaling.type": "yarn", "rope.scaling.factor": 0.5}}, ["a factor of at least 1"]),
        (
            {"sizes": {"rope.scaling.type": "yarn", "rope.scaling.yarn_beta_fast": 16.0}},
            ["llama.rope.scaling.yarn_beta_fast is 16.0"],
        ),
        ({"sizes": {"rope.scaling.yarn_ext_factor": 0.5}}, ["llama.rope.scaling.yarn_ext_factor is 0.5"]),
        ({"sizes": {"block_count": None}}, ["does not say llama.block_count"]),
        ({"sizes": {"attention.head_count_kv": [3, 3]}}, ["llama.attention.head_count_kv"]),
        ({"sizes": {"block_count": 4_000_000_000}}, ["blk.2.attn_norm.weight"]),
        ({"sizes": {"block_count": 1}}, ["blk.1", "no place"]),
        ({"sizes": {"attention.head_count": 0}}, ["heads"]),
        ({"sizes": {"attention.value_length": 16}}, ["value_length is 16 and not 8"]),
        ({"sizes": {"rope.dimension_count": 4}}, ["rope.dimension_count is 4 and not 8"]),
        ({"arch": "qwen3"}, ["no tensor 'blk.0.attn_q_norm.weight'"]),
        ({"tensors": {"output_norm.weight": np.zeros(64, np.float32)}}, ["no embedding"]),
        (
            {"tensors": weights() | {"blk.0.extra.weight": np.zeros((2, 32), np.float32)}},
            ["'blk.0.extra.weight'", "no place"],
        ),
        ({"tensors": weights() | {"rope_freqs.weight": np.zeros((2, 4), np.float32)}}, ["rope_freqs.weight"]),
        ({"tensors": with_fault(np.nan)}, ["'blk.1.ffn_down.weight' holds weights that are not finite"]),
        ({"words": {"tokens": None}}, ["no list tokenizer.ggml.tokens"]),
        ({"words": {"tokens": ["a"] * 262}}, ["twice in its vocabulary"]),
        ({"words": {"tokens": ["a", "b"]}}, ["262 texts, a row of the embedding each, and has 2"]),
        (
            {"words": {"tokens": ["a" * 5000, *map(str, range(261))]}},
            ["text in one of its arrays has 5,000 bytes"],
        ),
        (
            {"words": {"token_type": [1]}},
            ["token_type should be 262 numbers, a row of the embedding each, and has 1"],
        ),
        ({"words": {"merges": ["th"]}}, ["not two tokens"]),
        ({"words": {"merges": ["no where"]}}, ["does not hold a tokenizer"]),
        ({"words": {"pre": "smolm"}}, ["pre-tokenizer 'smolm'", "smollm, "]),
        ({"words": {"model": "t5"}}, ["tokenizer model 't5'"]),
        ({"words": {"eos_token_id": 262}}, ["eos_token_id is 262"]),
        ({"words": {"eos_token_id": None}}, ["does not say tokenizer.ggml.eos_token_id"]),
        ({"other": {"tokenizer.chat_template": 3}}, ["chat_template should be text"]),
        ({"other": {"tokenizer.huggingface.json": OTHER_TOKENIZER}}, ["do not say the same"]),
        ({"words": {"model": "llama"}}, ["no list tokenizer.ggml.scores"]),
    ],
)
def test_what_is_not_understood_is_refused_by_name(changes, words, tmp_path):
    sentence = refusal(load_model, tiny_gguf(tmp_path / "x.gguf", **changes))
    assert all(word in sentence for word in words), sentence


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
@pytest.mark.parametrize("heads", [24, 32])  # keys that end in the middle of a strip are not joined
def test_a_file_is_served_from_its_own_blocks(kind, heads, tmp_path):
    """All that has blocks: what has none, here `attn_output`, is int8; logits stay near those of
    the file's numbers.
    """
    sizes = (
        {"attention.head_count": 3, "attention.head_count_kv": heads // 8}
        if heads == 24
        else {"attention.head_count": 8, "attention.head_count_kv": 4}
    )
    queries = 8 * sizes["attention.head_count"]
    shapes = {
        f"blk.{i}.attn_{part}.weight": shape
        for i in range(2)
        for part, shape in {
            "q": (queries, 64),
            "k": (heads, 64),
            "v": (heads, 64),
            "output": (64, queries),
        }.items()
    }
    path = tiny_gguf(tmp_path / "x.gguf", kind=kind, sizes=sizes, tensors=weights(SHAPES | shapes))
    shapes_ahead: dict[str, Blocks] = {}
    model, config = (
        load_model(path, keep_kinds=KINDS, on_blocks=shapes_ahead.update),
        EngineConfig(weights="file"),
    )
    cfg, params = config.model_config(model.cfg), config.prepare_params(model.cfg, model.params)
    loaded: Any = {path: jax.ShapeDtypeStruct(shape, "float32") for path, shape in leaf_shapes(cfg).items()}
    ahead = jax.eval_shape(
        lambda params: config.prepare_params(cfg, params), unflatten(loaded | shapes_ahead)
    )
    described = lambda tree: (
        jax.tree.structure(tree),
        [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)],
    )
    assert described(ahead) == described(params)  # `serve` compiles by these before it reads
    leaves = leaf_paths(params)
    assert ("blocks/0/qkv" in leaves) == (heads == 32)
    assert isinstance(leaves["blocks/1/out"], Int8 if queries % 32 else Blocks)
    assert {leaves[name].kind for name in ("embed", "blocks/0/gate_up", "blocks/1/down")} == {kind}
    tokens, positions = tokens_of(0, 3, 11), positions_of(3, 11)
    ours = forward(cfg, params, tokens, positions)[0]
    plain = load_model(path, dtype="float32")
    expected = forward(plain.cfg, plain.params, tokens, positions)[0]
    assert np.sqrt(((ours - expected) ** 2).mean() / (expected**2).mean()) < 0.03


@pytest.mark.parametrize(
    ("weights", "keeps_blocks", "words"),
    [
        (
            None,
            False,
            "of 15 matrices 2 are rounded to bfloat16 (F32), 13 are widened to bfloat16 (Q5_0, Q8_0)",
        ),
        (
            None,
            True,
            "of 15 matrices 13 stay as they are (Q5_0, Q8_0), 2 are rounded to bfloat16 (F32)",
        ),
        ("float32", True, "all 15 matrices stay as they are (Q5_0, Q8_0, F32)"),
        (
            "q4",
            True,
            "of 15 matrices 13 stay as they are (Q5_0, Q8_0), 2 are rounded to int8 (F32)",
        ),
    ],
)
def test_what_becomes_of_a_files_kinds_is_said(weights, keeps_blocks, words, tmp_path):
    """Of the weights as they are in use, of which some lie side by side."""
    names = ("token_embd.weight", "blk.0.attn_q.weight", "blk.1.ffn_up.weight")
    path = tiny_gguf(tmp_path / "model.gguf", kind="Q5_0", kinds=dict.fromkeys(names, "Q8_0"))
    model = load_model(str(path), keep_kinds=KINDS if keeps_blocks else ())
    config = EngineConfig(weights=weights)
    cfg = config.model_config(model.cfg)
    assert describe_kinds(model.kinds, config.prepare_params(cfg, model.params)) == words
    assert describe_kinds(model.kinds, config.prepare_params(cfg, model.params, whole=False)) == words
    two = {"a": np.zeros((3, 2), "float32"), "b": np.zeros((3, 2), "float32")}
    assert (
        describe_kinds({"a": "Q6_K", "b": "F32"}, two)
        == "of 2 matrices 1 stays as it is (F32), 1 is widened to float32 (Q6_K)"
    )
    assert describe_kinds(dict.fromkeys(two, "F16"), two) == "all 2 matrices are widened to float32 (F16)"
    assert describe_kinds({}, model.params) == ""


def test_a_named_models_recommended_sampling_is_known_here(tmp_path, monkeypatch):
    path = tiny_gguf(tmp_path / "x.gguf")
    monkeypatch.setattr(model_loader, "fetch", lambda name, report: {"model": path})
    assert load_model("smollm2-135m-instruct").sampling == {"temperature": 0.2, "top_p": 0.9}
    assert load_model(path).sampling == {}


def test_a_factor_that_is_not_finite_is_refused(tmp_path):
    with np.errstate(all="ignore"):
        path = tiny_gguf(tmp_path / "x.gguf", kind="Q4_1", tensors=with_fault(np.inf))
    sentence = refusal(functools.partial(load_model, keep_kinds=KINDS), path)
    assert "'blk.1.ffn_down.weight' holds weights that are not finite" in sentence
