"""Export: the files are the model, as other programs read it; what cannot be written is an error that says so."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from engine.errors import UserError
from engine.inference.config import EngineConfig
from engine.model.config import Llama3Scaling, LoraConfig, YarnScaling
from engine.model.paths import leaf_paths, map_paths, merge
from engine.model.transformer import forward
from engine.model.weights.block_layout import KINDS
from engine.model.weights.convert import cast_matrices, weight_types
from engine.model.weights.lora import LoRA, init_lora
from engine.storage.digest import digest
from engine.storage.gguf_writer import save_gguf, tokenizer_metadata
from engine.storage.model_loader import LoadedModel, check_loads, load_model
from engine.text.corpus import Corpus
from stages import export
from stages.evaluate import __main__ as evaluate
from stages.export import compare, compare_adapter
from tests.tiny import lively_params, positions_of


def exported(model: Path, out: Path, *flags: object) -> Path:
    assert export.main(["--model", str(model), "--out", str(out), *map(str, flags)]) == 0
    return out


@pytest.mark.parametrize("name", ["folder", "file.gguf"])
def test_an_export_in_float32_is_the_same_model(name, trained, text, tmp_path, capsys, monkeypatch):
    sampling = {"temperature": 0.3, "top_k": 20, "repetition_penalty": 1.1}
    loading(monkeypatch, trained, sampling=sampling)
    out = exported(trained, tmp_path / name, "--dtype", "float32", "--check")
    assert "by at most 0.0e+00 of the" in capsys.readouterr().out
    source, model = load_model(str(trained)), load_model(str(out), dtype="float32")
    expected, actual = leaf_paths(source.params), leaf_paths(model.params)
    assert all(np.array_equal(expected[path], actual[path]) for path in expected)
    assert (model.run, model.sampling) == (None, sampling)
    assert (model.eos_ids, model.tokenizer.bos_ids) == (source.eos_ids, source.tokenizer.bos_ids)
    assert evaluate.main(["--model", str(out), "--data", str(text)]) == 0
    assert "unchanged" in capsys.readouterr().out
    assert evaluate.main(["--model", str(out)]) == 2
    assert "give --data" in capsys.readouterr().err


def test_a_folder_holds_what_others_look_for(trained, tmp_path):
    out = exported(trained, tmp_path / "folder")
    assert {file.name for file in out.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((out / "config.json").read_text())
    assert (config["architectures"], config["torch_dtype"]) == (["Qwen3ForCausalLM"], "float32")
    assert (
        config["eos_token_id"]
        == json.loads((out / "generation_config.json").read_text())["eos_token_id"]
        == 299
    )
    assert load_file(out / "model.safetensors")["model.embed_tokens.weight"].shape == (300, 32)


@pytest.mark.whole
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0"])
def test_gguf_files_hold_smaller_weights(dtype, trained, tmp_path, capsys):
    out = exported(trained, tmp_path / "file.gguf", "--dtype", dtype, "--check")
    output = capsys.readouterr().out
    said = ("file.gguf, ", "llama.cpp has no name", f"--model {out}", "by at most 0.0e+00 of the")
    for words in ("writing ... ", "reading it again ... ", *said):
        assert words in output
    reports: list[tuple[int, int]] = []
    check_loads(out, out, lambda *counts: reports.append(counts))
    assert len(reports) > 10
    assert reports[-1][0] == reports[-1][1] > 0
    assert re.search(
        r"loss +-?0\.00\d+ bits per byte by rounding .* on 1,025 tokens of python, held out\)", output
    )
    assert out.stat().st_size < 204_096


@pytest.mark.whole
@pytest.mark.parametrize("dtype", ["q4_0", "q4_1"])
def test_a_file_of_4_bits_holds_the_blocks_that_are_served(dtype, trained, tmp_path, capsys, monkeypatch):
    """To the bit, from weights and from an adapter over weights in 16 bits, which both merge in
    float32.
    """
    cfg = dataclasses.replace(load_model(str(trained)).cfg, ff=64)
    plain, adapters = lively_params(cfg), init_lora(cfg, jax.random.key(0), LoraConfig(3, 6.0, ("q", "down")))
    narrow = merge(jax.tree.map(lambda leaf: leaf + 0.1, adapters), cast_matrices(plain, "bfloat16"))
    for params in (plain, narrow):
        loading(monkeypatch, trained, cfg=cfg, params=params)
        out = exported(trained, tmp_path / "file.gguf", "--dtype", dtype, "--check", "--overwrite")
        assert "by at most 0.0e+00 of the" in capsys.readouterr().out
        file = load_model(str(out), keep_kinds=KINDS)
        from_file = EngineConfig(weights="file").prepare_params(file.cfg, file.params)
        served = EngineConfig(weights="q4").prepare_params(cfg, params)
        assert weight_types(from_file) == f"{dtype.upper()}, Q8_0"
        assert (digest(from_file) == digest(served)) == (dtype == "q4_0")
        ahead = jax.eval_shape(functools.partial(EngineConfig(weights="q4").prepare_params, cfg), params)
        described = lambda tree: (
            jax.tree.structure(tree),
            [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)],
        )
        assert described(ahead) == described(served)  # `serve` compiles by these before it reads


def loading(monkeypatch: pytest.MonkeyPatch, path: Path, **changes: object) -> LoadedModel:
    """The model at `path` with changes, which is what the export finds there."""
    changed = dataclasses.replace(load_model(str(path)), **changes)
    load = lambda name, **options: changed if name == str(path) else load_model(name, **options)
    monkeypatch.setattr("engine.storage.model_loader.load_model", load)
    return changed


def test_half_precision_is_not_rounded_twice(trained, tmp_path):
    """Ten bits of float16 do not pass through the seven of bfloat16. An earlier export is replaced
    when asked.
    """
    half, again = exported(trained, tmp_path / "half"), tmp_path / "again.gguf"
    again.write_bytes(b"")
    exported(exported(trained, half, "--dtype", "float16", "--overwrite"), again, "--overwrite", "--check")
    first, second = (leaf_paths(load_model(str(path), dtype="float32").params) for path in (half, again))
    assert all(np.array_equal(first[path], second[path]) for path in first)


def test_rounding_that_costs_too_much_is_told(trained, tmp_path, monkeypatch, capsys):
    """The same function, to the bit, with an input in 32 of each matrix 4,096 times as large, and
    its norm's gain as small.
    """
    params = load_model(str(trained)).params
    scale = np.where(np.arange(32) == 0, 4096, 1).astype(np.float32)
    scaled = {
        "attn_norm": 1 / scale,
        "mlp_norm": 1 / scale,
        **dict.fromkeys(("q", "k", "v", "gate", "up"), scale[:, None]),
    }
    block = lambda leaves: leaves | {name: leaves[name] * factor for name, factor in scaled.items()}
    loading(
        monkeypatch,
        trained,
        params=params | {"blocks": {layer: block(params["blocks"][layer]) for layer in "01"}},
    )
    exported(trained, tmp_path / "y.gguf", "--dtype", "float16", "--check")
    assert (
        export.main(
            ["--model", str(trained), "--out", str(tmp_path / "x.gguf"), "--dtype", "q8_0", "--check"]
        )
        == 1
    )
    output = capsys.readouterr().out
    assert "DIFFERS: the loss in bits per byte: " in output
    assert output.count("by at most 0.0e+00 of the") == 2  # as the format rounds


@pytest.mark.parametrize(
    ("fields", "weight", "sentence", "remedy"),
    [
        (
            {"rope_scaling": Llama3Scaling(5.0, 1.0, 4.0, 8192)},
            0.0,
            "none of the RoPE scalings that Llama 3.1 and 3.2",
            "does, in config.json. A Hugging Face folder may hold it.",
        ),
        (
            {"rope_scaling": YarnScaling(5.0, 8, 1.0, fast_turns=9.0)},
            0.0,
            "yarn_beta_fast is 9.0",
            "A Hugging Face folder may hold it.",
        ),
        (
            {},
            1e6,
            "'blk.1.ffn_down.weight' holds weights that are not finite",
            "Another type of weights, or a Hugging Face folder, may hold it.",
        ),
    ],
)
def test_what_could_not_be_loaded_is_not_written(
    fields, weight, sentence, remedy, trained, tmp_path, monkeypatch, failing
):
    plain, out, alone = load_model(str(trained)), tmp_path / "out" / "x.gguf", tmp_path / "x.gguf"
    plain.params["blocks"]["1"]["down"] += weight
    model = loading(monkeypatch, trained, cfg=dataclasses.replace(plain.cfg, **fields), params=plain.params)
    save_gguf(
        alone,
        model.cfg,
        model.params,
        tokenizer_metadata(model.tokenizer, (299,), 300),
        name="x",
        dtype="float16",
    )
    with pytest.raises(UserError, match=re.escape(sentence)) as refused:
        load_model(str(alone))
    error = failing(export.main, ["--model", trained, "--out", out])
    assert "Nothing was written" in error
    assert error.endswith(f" {remedy}\n")
    assert str(refused.value).replace(str(alone), str(out)) in error
    out.write_bytes(b"an earlier one")
    assert failing(export.main, ["--model", trained, "--out", out, "--overwrite"]) == error
    assert [file.read_bytes() for file in out.parent.iterdir()] == [b"an earlier one"]
    if weight:
        error = failing(export.main, ["--model", trained, "--out", tmp_path / "folder", "--dtype", "float16"])
        assert error.endswith("Another type of weights may hold it.\n")


def test_an_export_that_was_damaged_is_seen(trained, tmp_path):
    text = "the king and queen of a far land\n" * 9
    model, source = load_model(str(trained)), Corpus("a text", lambda: iter([lambda: iter([text])]))
    out = exported(trained, tmp_path / "folder")
    reports: list[tuple[int, int]] = []
    report = lambda *counts: reports.append(counts)
    assert compare(model, out, "float32", source, report)[1] == []
    assert reports == [(done, 5) for done in range(1, 6)]
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-3000:] = bytes(3000)
    (out / "model.safetensors").write_bytes(data)
    assert "the logits" in compare(model, out, "float32", source, report)[1]
    generation = json.loads((out / "generation_config.json").read_text())
    (out / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": [299, 5]}))
    assert compare(model, out, "float32", source, report)[1] == ["the EOS ids"]


def test_an_adapter_is_merged_or_written_alone(trained, tmp_path, monkeypatch, capsys, failing):
    plain = load_model(str(trained))
    adapters = init_lora(plain.cfg, jax.random.key(0), LoraConfig(3, 6.0, ("q", "v", "down")))
    # b begins at zero, and would change nothing
    adapters = jax.tree.map(lambda leaf: leaf + 0.1, adapters)
    tuned = loading(monkeypatch, trained, params=merge(adapters, plain.params))
    merged = exported(trained, tmp_path / "merged", "--check")
    tokens, positions = np.arange(24, dtype=np.int32).reshape(2, 12), positions_of(2, 12)
    cfg = dataclasses.replace(plain.cfg, dtype="float32")
    logits = lambda params: np.asarray(jax.jit(forward, static_argnums=0)(cfg, params, tokens, positions)[0])
    params = load_model(str(merged), dtype="float32").params
    np.testing.assert_allclose(logits(params), logits(tuned.params), atol=1e-5)
    assert np.abs(logits(plain.params) - logits(tuned.params)).max() > 1e-2

    capsys.readouterr()
    alone = exported(trained, tmp_path / "alone", "--adapter", "--check", "--base-name", "Org/Sea-1")
    assert "of 6 matrices, to the bit" in capsys.readouterr().out
    config = json.loads((alone / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    named = lambda: json.loads((alone / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named() == "Org/Sea-1"
    again = ["--model", trained, "--out", alone, "--adapter", "--overwrite"]
    assert "no id there is known for sea: give --base-name ORG/NAME" in failing(export.main, again)
    assert "--base-name is an id on the Hugging Face hub" in failing(
        export.main, [*again, "--base-name", trained]
    )
    exported(*again[1:4:2], *again[4:], "--base-name", merged)
    assert named() == str(merged)
    # in PEFT's layout
    loading(monkeypatch, trained, params=tuned.params, run=None, bases=(merged,))
    exported(*again[1:4:2], *again[4:])
    assert named() == str(merged)
    stabilised = lambda _, leaf: (
        dataclasses.replace(leaf, scale=13 / 3**0.5) if isinstance(leaf, LoRA) else leaf
    )
    params = map_paths(
        stabilised, tuned.params
    )  # no lora_alpha divided by this rank is this scale in float64
    tuned = loading(monkeypatch, trained, params=params, hub_id="HuggingFaceTB/SmolLM2-135M-Instruct")
    exported(*again[1:4:2], *again[4:], "--check")
    assert named() == tuned.hub_id
    loading(monkeypatch, trained, params=tuned.params, merged=("blocks/0/q",))
    assert "blocks/0/q is trained whole or a DoRA" in failing(export.main, [*again, "--base-name", merged])
    data = bytearray((alone / "adapter_model.safetensors").read_bytes())
    data[-3] ^= 1
    (alone / "adapter_model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=r"adapter_model.safetensors is damaged: its SHA-256 is another"):
        compare_adapter(tuned, alone)
