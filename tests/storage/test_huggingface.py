"""Hugging Face folders: strict about what is in them, in any dtype and number of files; logits equal those of transformers."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from engine.model.paths import leaf_paths
from engine.model.transformer import forward
from engine.storage.architectures import BLOCKS
from engine.storage.model_loader import load_model, model_name
from engine.untrusted import build_tokenizer
from tests.storage.gguf_files import tiny_gguf
from tests.storage.golden.random_weights import draw
from tests.storage.hf_folders import CONFIG, WEIGHTS, tiny_tokenizer, write_folder
from tests.storage.refusals import refusal
from tests.tiny import positions_of


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "model", CONFIG, WEIGHTS)


def same_params(first: Any, second: Any) -> bool:
    ours, theirs = leaf_paths(first), leaf_paths(second)
    return ours.keys() == theirs.keys() and all(
        ours[path].dtype == theirs[path].dtype and np.array_equal(ours[path], theirs[path]) for path in ours
    )


def test_names_are_readable_and_ids_are_those_of_the_hub(tmp_path, monkeypatch):
    snapshot = "models--Org--Tiny-1.5b/snapshots/7e27bd9f95328f0f"
    for place, source, name, hub_id in (
        ("qwen2.5-0.5b", "Org/Parent", "qwen2.5-0.5b", ""),
        (snapshot, "/fsx/run/7", "Tiny-1.5b", "Org/Tiny-1.5b"),
        ("mine", "../out--1/x", "mine", ""),
    ):
        monkeypatch.chdir(write_folder(tmp_path / place, CONFIG | {"_name_or_path": source}, WEIGHTS))
        model = load_model(".")
        assert (model.name, model.hub_id, model_name(".")) == (name, hub_id, name)
    path = tiny_gguf(tmp_path / "x.y.gguf", other={"general.name": "8k-lc100k\nmix1"})
    assert load_model(path).name == model_name(str(path)) == "x.y"
    assert model_name("runs/sea/checkpoints/20") == model_name("runs/sea/") == "sea"
    monkeypatch.setattr("engine.storage.model_loader.fetch", lambda name, report: {"model": path})
    model = load_model("smollm2-135m-instruct")
    assert (model.name, model.hub_id) == ("smollm2-135m-instruct", "HuggingFaceTB/SmolLM2-135M-Instruct")


def test_shards_hold_the_same_model(folder, tmp_path):
    sharded = write_folder(tmp_path / "sharded", CONFIG, WEIGHTS, shards=3)
    assert same_params(load_model(sharded).params, load_model(folder).params)


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_read_exactly(kind, tmp_path):
    halved = {name: value.astype(kind) for name, value in WEIGHTS.items()}
    folder = write_folder(tmp_path / "half", CONFIG | {"torch_dtype": "bfloat16"}, halved)
    wide = {name: value.astype(np.float32) for name, value in halved.items()}
    exact = load_model(write_folder(tmp_path / "wide", CONFIG, wide)).params
    assert same_params(load_model(folder, dtype="float32").params, exact)
    native = load_model(folder).params
    assert native["embed"].dtype == native["blocks"]["0"]["q"].dtype == jnp.bfloat16
    assert native["norm"].dtype == native["blocks"]["0"]["attn_norm"].dtype == jnp.float32
    assert np.array_equal(native["embed"], exact["embed"].astype(jnp.bfloat16))


def test_a_table_kept_twice_is_read_once_if_both_are_the_same(tmp_path):
    twice = WEIGHTS | {"lm_head.weight": WEIGHTS["model.embed_tokens.weight"].copy()}
    extra = twice | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    assert "head" not in load_model(write_folder(tmp_path / "twice", CONFIG, extra)).params
    twice["lm_head.weight"][40, 19] += 1
    assert "lm_head.weight that differs" in refusal(
        load_model, write_folder(tmp_path / "other", CONFIG, twice)
    )


def without(name: str) -> dict[str, np.ndarray]:
    return {other: value for other, value in WEIGHTS.items() if other != name}


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("changes", "weights", "words"),
    [
        ({}, without(Q), ["no tensor", Q, "Did you mean"]),
        (
            {},
            WEIGHTS | {"model.layers.2.mlp.up_proj.weight": np.zeros((2, 2), np.float32)},
            ["layers.2.mlp", "no place"],
        ),
        (
            {},
            WEIGHTS | {"model.layers.0.self_attn.q_proj.bias": np.zeros(24, np.float32)},
            ["q_proj.bias", "no place"],
        ),
        ({}, WEIGHTS | {Q: np.zeros((20, 24), np.float32)}, [Q, "should be [24, 20] and is [20, 24]"]),
        ({}, WEIGHTS | {Q: np.zeros((24, 20), np.float64)}, [Q, "F64", "F32, F16, BF16"]),
        ({"tie_word_embeddings": False}, WEIGHTS, ["lm_head.weight"]),
        ({"num_hidden_layers": 1}, WEIGHTS, ["layers.1", "no place"]),
        ({"num_hidden_layers": 2**39}, WEIGHTS, ["layers.2"]),
        ({"model_type": "qwen3"}, WEIGHTS, ["no tensor", "q_norm"]),
    ],
)
def test_a_folder_is_taken_whole_or_not_at_all(changes, weights, words, tmp_path):
    sentence = refusal(load_model, write_folder(tmp_path / "model", CONFIG | changes, weights))
    assert all(word in sentence for word in words), sentence


def replace(folder: Path, name: str, data: bytes | str | dict[str, Any] | None) -> None:
    if data is None:
        (folder / name).unlink(missing_ok=True)
    else:
        text = json.dumps(data) if isinstance(data, dict) else data
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("config.json", b" " * (3 * 2**20), "are the most that is read"),
        ("tokenizer.json", None, "no tokenizer.json"),
        ("tokenizer.json", {"model": {}}, "tokenizer that can be read"),
        ("tokenizer_config.json", {"eos_token": "</s>"}, "no token '</s>'"),
        ("tokenizer_config.json", {"eos_token": "<|endoftext|>", "chat_template": 3}, "chat_template"),
        ("chat_template.jinja", b"\xff", "not UTF-8"),
        *(
            ("generation_config.json", {"eos_token_id": ids}, "ids below 41")
            for ids in (41, [1, "2"], [[1]], "7", True)
        ),
    ],
)
def test_a_damaged_file_is_named(name, data, words, folder):
    replace(folder, name, data)
    sentence = refusal(load_model, folder)
    assert words in sentence
    assert str(folder) in sentence


def test_a_tokenizer_that_is_not_the_models_is_refused(folder):
    tiny_tokenizer(folder, 43)
    assert "do not belong together" in refusal(load_model, folder)
    shutil.move(folder / "tokenizer.json", folder / "tokenizer.model")
    assert "only tokenizer.model: save the model's fast tokenizer" in refusal(load_model, folder)


def test_every_end_is_known_the_tokenizers_own_first_and_the_recommended_sampling(folder):
    replace(folder, "config.json", CONFIG | {"eos_token_id": 7})
    assert load_model(folder).eos_ids == (40, 7)
    replace(folder, "generation_config.json", {"eos_token_id": None})
    assert load_model(folder).eos_ids == (40,)
    replace(folder, "generation_config.json", {"eos_token_id": [3, 40, 5], "temperature": 0.7})
    assert load_model(folder).eos_ids == (40, 3, 5)
    replace(folder, "tokenizer_config.json", {"eos_token": {"content": "%", "__type": "AddedToken"}})
    model = load_model(folder)
    assert model.eos_ids == (model.tokenizer.id_of("%"), 3, 40, 5)
    assert model.sampling == {"temperature": 0.7}
    replace(
        folder,
        "generation_config.json",
        {"do_sample": False, "temperature": 0.7, "top_p": None, "repetition_penalty": 1.1},
    )
    assert load_model(folder).sampling == {"temperature": 0.0, "repetition_penalty": 1.1}


def test_an_end_that_only_the_config_knows_is_taken_by_its_id(folder):
    replace(folder, "tokenizer_config.json", None)
    replace(folder, "config.json", CONFIG | {"eos_token_id": 40})
    assert load_model(folder).tokenizer.config["eos_token"] == "<|endoftext|>"


def test_the_chat_template_is_found_wherever_it_is_kept(folder):
    template = lambda: load_model(folder).tokenizer.config.get("chat_template")
    assert template() is None
    end = {"eos_token": "<|endoftext|>"}
    replace(folder, "tokenizer_config.json", end | {"chat_template": "one"})
    assert template() == "one"
    named = [{"name": "tool_use", "template": "other"}, {"name": "default", "template": "two"}]
    replace(folder, "tokenizer_config.json", end | {"chat_template": named})
    assert template() == "two"
    replace(folder, "chat_template.jinja", "three")
    assert template() == "three"


def test_a_panic_of_the_library_is_a_sentence(folder):
    class PanicException(BaseException):
        pass

    def panic():
        raise PanicException("called `Option::unwrap()` on a `None` value")

    assert "does not hold a tokenizer" in refusal(build_tokenizer, panic, folder)


AUDIT = """
import os, sys
from pathlib import Path
from engine.storage.model_loader import load_model, model_name
folder, file = Path(sys.argv[1]), Path(sys.argv[2])
load_model(folder), load_model(file)  # whatever is imported late is imported now
seen = set()
KINDS = "pickle marshal socket subprocess pty shutil urllib http ctypes import exec compile".split()
STARTS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.startfile")
EVENTS = (*STARTS, "os.remove", "os.rename", "os.mkdir", "os.symlink")
def note(event, args):
    if event == "open":
        mode = args[1] or ""
        if any(letter in str(mode) for letter in "wax+") or (args[2] or 0) & 3:
            seen.add((event, str(args[0])))
    elif event.split(".")[0] in KINDS or event.startswith(EVENTS):
        seen.add((event, str(args)[:200]))
sys.addaudithook(note)
load_model(folder), load_model(file)
found = sorted(seen)
import pickle, subprocess  # the hook sees what it should
pickle.loads(pickle.dumps(Path)), subprocess.run(["true"]), os.system("true")
os.waitpid(os.posix_spawnp("true", ["true"], {}), 0)
if (child := os.fork()) == 0:
    os._exit(0)
os.waitpid(child, 0)
print(found, *sorted(event for event in dict(seen) if event.startswith((*STARTS, "pickle.f", "subprocess"))))
"""


@pytest.mark.law("hostile files")
def test_loading_runs_nothing_opens_no_connection_and_writes_no_file(folder, tmp_path):
    file = tiny_gguf(tmp_path / "x.gguf")
    result = subprocess.run(
        [sys.executable, "-c", AUDIT, str(folder), str(file)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[] os.fork os.posix_spawn os.system pickle.find_class subprocess.Popen"


GOLDEN = {
    path.stem: json.loads(path.read_text())
    for path in sorted((Path(__file__).parent / "golden").glob("*.json"))
}


def test_there_is_a_golden_file_for_every_family():
    assert {golden["config"]["model_type"] for golden in GOLDEN.values()} == set(BLOCKS)


def as_transformers_4(config: dict[str, Any]) -> dict[str, Any]:
    """The same config as releases before 5 wrote it."""
    old = {name: value for name, value in config.items() if name not in ("rope_parameters", "dtype")}
    rope = dict(config["rope_parameters"])
    theta = rope.pop("rope_theta")
    scaling = None if rope["rope_type"] == "default" else rope
    return old | {"rope_theta": theta, "rope_scaling": scaling, "torch_dtype": "float32"}


@pytest.mark.law("round trip")
@pytest.mark.parametrize("family", GOLDEN)
def test_logits_equal_those_of_transformers(family, tmp_path):
    golden = GOLDEN[family]
    weights = draw(golden["shapes"])
    folder = write_folder(tmp_path / "new", golden["config"], weights)
    model = load_model(folder)
    tokens = np.asarray(golden["tokens"], np.int32)
    logits, _ = jax.jit(forward, static_argnums=0)(
        model.cfg, model.params, tokens, positions_of(*tokens.shape)
    )
    expected = np.asarray(golden["logits"], np.float32)
    assert np.abs(expected).max() > 1  # lively enough to tell one model from another
    np.testing.assert_allclose(np.asarray(logits)[:, golden["positions"]], expected, atol=1e-4, rtol=0)
    older = load_model(write_folder(tmp_path / "old", as_transformers_4(golden["config"]), weights))
    assert older.cfg == model.cfg
