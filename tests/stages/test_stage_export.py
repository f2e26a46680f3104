"""Export: the files are the model, as other programs read it; what cannot be written is an error that says so."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny import positions_of

from engine.errors import UserError
from engine.model.paths import leaf_paths, merge, unflatten
from engine.model.transformer import forward
from engine.model.weights.lora import make_adapter
from engine.storage.model_loader import LoadedModel, load_model
from engine.storage.run_folder import save_tokenizer
from stages import generate
from stages.evaluate import __main__ as evaluate
from stages.export import __main__ as export
from stages.export.run import compare, compare_adapter


def exported(model: Path, out: Path, *flags: object) -> Path:
    assert export.main(["--model", str(model), "--out", str(out), *map(str, flags)]) == 0
    return out


def generated(capsys: pytest.CaptureFixture[str], model: Path) -> str:
    capsys.readouterr()
    assert generate.main(["--model", str(model), "--prompt", "The king", "--max-tokens", "30", "--seed", "3"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", ["folder", "file.gguf"])
def test_an_export_in_float32_is_the_same_model(name, trained, text, tmp_path, capsys):
    out = exported(trained, tmp_path / name, "--dtype", "float32", "--check")
    assert "0.0e+00 of the largest apart" in capsys.readouterr().out
    source, model = load_model(str(trained)), load_model(str(out))
    expected, actual = leaf_paths(source.params), leaf_paths(model.params)
    assert all(
        np.array_equal(expected[path], actual[path].astype(jnp.float32)) for path in expected if expected[path].ndim == 1
    )
    exact = leaf_paths(load_model(str(out), dtype="float32").params)
    assert all(np.array_equal(expected[path], exact[path]) for path in expected)
    assert model.run is None
    assert (model.eos_ids, model.tokenizer.bos_ids) == (source.eos_ids, source.tokenizer.bos_ids)
    if name == "file.gguf":  # a folder of float32 says that it is computed in float32, which the run is not
        assert generated(capsys, out) == generated(capsys, trained)
    assert evaluate.main(["--model", str(out), "--data", str(text)]) == 0
    assert "unchanged" in capsys.readouterr().out
    assert evaluate.main(["--model", str(out)]) == 2
    assert "give --data" in capsys.readouterr().err


def test_a_folder_holds_what_others_look_for(trained, tmp_path):
    out = exported(trained, tmp_path / "folder")
    assert {file.name for file in out.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    config = json.loads((out / "config.json").read_text())
    assert (config["architectures"], config["torch_dtype"]) == (["Qwen3ForCausalLM"], "float32")
    assert config["eos_token_id"] == json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 299
    assert load_file(out / "model.safetensors")["model.embed_tokens.weight"].shape == (300, 32)
    halved = exported(trained, tmp_path / "half", "--dtype", "bfloat16", "--check")
    assert {leaf.dtype.name for leaf in load_file(halved / "model.safetensors").values()} == {"bfloat16"}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0"])
def test_gguf_files_hold_smaller_weights(dtype, trained, tmp_path, capsys):
    out = exported(trained, tmp_path / "file.gguf", "--dtype", dtype, "--check")
    output = capsys.readouterr().out
    for words in ("writing ... ", "file.gguf, ", "llama.cpp has no name", f"--model {out}"):
        assert words in output
    assert out.stat().st_size < (trained / "checkpoints" / "20" / "params").stat().st_size + 200_000


def test_an_export_that_was_damaged_is_seen(trained, tmp_path):
    model = load_model(str(trained))
    out = exported(trained, tmp_path / "folder")
    assert compare(model, out, "float32")[1] == []
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-3000:] = bytes(3000)
    (out / "model.safetensors").write_bytes(data)
    assert compare(model, out, "float32")[1] == ["the logits"]
    generation = json.loads((out / "generation_config.json").read_text())
    (out / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": [299, 5]}))
    assert compare(model, out, "float32")[1] == ["the EOS ids"]


def with_adapter(model: LoadedModel) -> LoadedModel:
    """The model with an adapter that does something on q, v and down (how PEFT lays it out: tests/storage/test_adapter.py)."""
    key, adapters = jax.random.key(0), {}
    for layer in range(model.cfg.layers):
        for name, parts in (("qkv", ("q", "v")), ("down", ("down",))):
            path = f"blocks/{layer}/{name}"
            rows, columns = leaf_paths(model.params)[path].shape[0], [model.cfg.parts[name][part] for part in parts]
            leaf = make_adapter(key, rows, columns, 3, 6.0)
            b = 0.2 * jax.random.normal(jax.random.fold_in(key, layer), leaf.b.shape)
            adapters[path] = dataclasses.replace(leaf, b=b)
    return dataclasses.replace(model, params=merge(unflatten(adapters), model.params))


def test_an_adapter_is_merged_or_written_alone(trained, tmp_path, monkeypatch, capsys):
    plain = load_model(str(trained))
    tuned = with_adapter(plain)
    load = lambda name, **options: tuned if name == str(trained) else load_model(name, **options)
    monkeypatch.setattr("stages.export.run.load_model", load)
    merged = exported(trained, tmp_path / "merged", "--check")
    tokens, positions = np.arange(24, dtype=np.int32).reshape(2, 12), positions_of(2, 12)
    cfg = dataclasses.replace(plain.cfg, dtype="float32")
    logits = lambda params: np.asarray(jax.jit(forward, static_argnums=0)(cfg, params, tokens, positions)[0])
    params = load_model(str(merged), dtype="float32").params
    np.testing.assert_allclose(logits(params), logits(tuned.params), atol=1e-5)
    assert np.abs(logits(plain.params) - logits(tuned.params)).max() > 1e-2

    capsys.readouterr()
    alone = exported(trained, tmp_path / "alone", "--adapter", "--check")
    assert "of 4 matrices, to the bit" in capsys.readouterr().out
    config = json.loads((alone / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    data = bytearray((alone / "adapter_model.safetensors").read_bytes())
    data[-3] ^= 1
    (alone / "adapter_model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match="checksum does not hold"):
        compare_adapter(tuned, alone)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--out full", ["full is there already", "--overwrite"]),
        ("--out strange", ["strange holds mine.txt, which no export wrote"]),
        ("--out strange --overwrite", ["strange holds mine.txt"]),
        ("--out file", ["file is a file"]),
        ("--out folder.gguf", ["folder.gguf is a folder"]),
        ("--out new --dtype q8_0", ["q8_0 is of GGUF"]),
        ("--out new --dtype int8", ["wanted one of float32"]),
        ("--out new.gguf --adapter", ["goes with neither"]),
        ("--out new --adapter --dtype float16", ["goes with neither"]),
        ("--out new --adapter", ["no LoRA adapters"]),
        ("--out new --model smollm2", ["Did you mean 'smollm2-135m-instruct'"]),
        ("--out new --model bad.gguf", ["does not begin with GGUF"]),
        ("--out new --model theirs", ["model_type 'mamba'"]),
        ("", ["--out"]),
    ],
)
def test_what_cannot_be_exported_is_an_error(flags, words, trained, tmp_path, failing, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("full", "strange", "folder.gguf", "theirs"):
        Path(name).mkdir()
    Path("full", "config.json").write_text("{}")
    Path("strange", "mine.txt").write_text("mine")
    Path("theirs", "config.json").write_text('{"model_type": "mamba"}')
    Path("file").write_text("")
    Path("bad.gguf").write_bytes(b"PK\x03\x04 is another kind of file")
    output = failing(export.main, ["--model", trained, *flags.split()])  # the last --model counts
    plain = " ".join(output.replace("│", " ").split())
    assert all(word in plain for word in words), plain
    assert Path("strange", "mine.txt").read_text() == "mine"
    assert not Path("new").exists()
    assert not Path("new.gguf").exists()


def test_an_earlier_export_is_replaced_when_asked(trained, tmp_path):
    out = exported(trained, tmp_path / "folder")
    (out / "config.json").write_text("{}")
    exported(trained, out, "--overwrite", "--check")
    file = exported(trained, tmp_path / "x.gguf")
    file.write_bytes(b"")
    exported(trained, file, "--overwrite", "--check")


def test_words_survive_in_a_run(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    model = dataclasses.replace(load_model(str(trained)), eos_ids=(299, 7))
    model.tokenizer.config["chat_template"] = "{{ messages }}"
    save_tokenizer(run, model.tokenizer, model.eos_ids)
    again = load_model(str(run))
    assert again.eos_ids == (299, 7)
    assert again.tokenizer.config["chat_template"] == "{{ messages }}"
    out = exported(run, tmp_path / "out", "--check")
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [299, 7]
    assert json.loads((out / "tokenizer_config.json").read_text())["chat_template"] == "{{ messages }}"
