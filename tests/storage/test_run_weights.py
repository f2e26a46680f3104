"""A run's weights are those that its config describes, or they are refused in a sentence, whoever made the manifests."""

import dataclasses
import functools
import json
import re
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
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import manifest
from engine.errors import UserError
from engine.model.config import LoraConfig, ModelConfig
from engine.model.paths import leaf_paths, unflatten
from engine.model.shapes import leaf_shapes
from engine.model.weights.block_layout import KINDS
from engine.model.weights.blocks import Blocks, factors_to_train, round_to_blocks, with_factors
from engine.model.weights.lora import init_lora, to_dense
from engine.storage import checkpoint
from engine.storage.adapter import PART, base_digest
from engine.storage.adapter_writer import adapter_tensors, saved_run_adapter
from engine.storage.model_loader import LoadedModel, load_model
from engine.storage.run_weights import expected_arrays
from engine.text.tokenizer import byte_tokenizer, save_tokenizer
from tests.storage.refusals import refusal
from tests.tiny import lively_params, tiny_config

CFG = tiny_config(vocab=260, width=32, head_dim=6, ff=64, kv_heads=2)
CFG_SHAPES = leaf_shapes(CFG)
LORA = LoraConfig(3, 6.0, ("q", "down"))
PACKED = {
    "embed": "Q8_0",
    "head": "Q8_0",
    "blocks/0/gate": "Q4_0",
    "blocks/0/up": "Q4_1",
    "blocks/1/down": "Q4_1",
}
TRAINED = ("blocks/0/gate", "blocks/1/down")  # of these the factors
OTHER = {"float16": np.float16, "int32": np.int32, "bool": np.bool_, "uint8": np.uint8, "int8": np.int8}

Arrays = dict[str, np.ndarray]


def write_run(folder: Path, arrays: Arrays, **record: Any) -> Path:
    """Writes a run of CFG, with a checkpoint of these arrays at step 7."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CFG.to_json()))
    (folder / "run.json").write_text(json.dumps({"kind": "model", "result": {"steps": 7}} | record))
    save_tokenizer(folder / "tokenizer", byte_tokenizer(), (256,), {})
    write_step(folder, arrays)
    return folder


def write_step(folder: Path, arrays: Arrays, step: int = 7) -> None:
    shutil.rmtree(folder / "checkpoints" / str(step), ignore_errors=True)
    record = json.loads((folder / "run.json").read_text())
    part, adapted = "params", None
    if record["kind"] == "adapter":
        part, adapted = PART, saved_run_adapter(LORA, base=record["base"]["digest"], base_name="plain")
    state = {"step": step, "seconds": 1.0}
    checkpoint.write(folder, step, {part: arrays, "optimizer": {}}, state, keep=9, adapted=adapted)
    names = [
        "config.json",
        "run.json",
        *(f"tokenizer/{path.name}" for path in (folder / "tokenizer").iterdir()),
    ]
    (folder / manifest.NAME).write_bytes(manifest.make_manifest(folder, names))


@pytest.fixture(scope="module")
def arrays() -> dict[str, Arrays]:
    """The arrays of a run's checkpoint: in float32, with weights in blocks, of which some trained,
    and of a LoRA.
    """
    plain = {path: np.asarray(leaf) for path, leaf in leaf_paths(lively_params(CFG)).items()}
    packed = dict(plain)
    for path, kind in PACKED.items():
        weight = round_to_blocks(jnp.asarray(plain[path]), kind, int(path != "embed"))
        del packed[path]
        packed[f"packed/{path}"] = np.asarray(weight.packed)
        if path in TRAINED:
            packed[path] = np.asarray(factors_to_train(weight)) * 1.01
    pairs = leaf_paths(init_lora(CFG, jax.random.key(1), LORA))
    pairs = {path: dataclasses.replace(pair, b=pair.b + 0.01) for path, pair in pairs.items()}
    return {"plain": plain, "packed": packed, "adapter": adapter_tensors(pairs)}


@pytest.fixture(scope="module")
def runs(arrays, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    plain = write_run(root / "plain", arrays["plain"])
    packed = write_run(root / "packed", arrays["packed"], trained_blocks=list(TRAINED))
    base = {"model": str(plain), "digest": base_digest(unflatten(arrays["plain"])), "name": "plain"}
    adapter = write_run(root / "adapter", arrays["adapter"], kind="adapter", base=base)
    return {"plain": plain, "packed": packed, "adapter": adapter}


def dense(loaded: LoadedModel) -> Arrays:
    return {path: np.asarray(to_dense(leaf)) for path, leaf in leaf_paths(loaded.params).items()}


ROOT = Path(__file__).parents[2]


def transpose_gate(arrays: Arrays) -> None:
    arrays["blocks/0/gate"] = arrays["blocks/0/gate"].T.copy()


def drop_gate(arrays: Arrays) -> None:
    del arrays["blocks/0/gate"]


def widen_vocabulary(arrays: Arrays) -> None:
    """Of the embedding in blocks, to 400,000 tokens."""
    packed = arrays["packed/embed"]
    arrays["packed/embed"] = np.resize(packed, (400_000 * packed.shape[0] // CFG.vocab, *packed.shape[1:]))


@pytest.mark.parametrize(
    ("kind", "change", "sentence"),
    [
        ("plain", transpose_gate, r"blocks/0/gate should be .* \[32, 64\], and is float32 \[64, 32\]"),
        ("plain", drop_gate, "it has no blocks/0/gate"),
        ("packed", widen_vocabulary, "packed/embed should be"),
    ],
)
def test_the_command_refuses_weights_that_are_not_its_configs(kind, change, sentence, runs, arrays, tmp_path):
    """In one sentence, with its own exit code: it does not crash, and writes no token."""
    folder = shutil.copytree(runs[kind], tmp_path / "run")
    hostile = dict(arrays[kind])
    change(hostile)
    write_step(folder, hostile)
    words = [sys.executable, "-m", "stages.generate", "--model", folder, "--prompt", "a", "--max-tokens", "3"]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (ended.returncode, ended.stdout) == (2, ""), ended.stderr
    assert re.search(sentence, " ".join(ended.stderr.split())), ended.stderr
    assert "Traceback" not in ended.stderr


def test_runs_of_every_kind_load_as_they_were_saved(runs, arrays):
    assert all(
        np.array_equal(leaf, arrays["plain"][path])
        for path, leaf in dense(load_model(str(runs["plain"]))).items()
    )
    blocks: dict[str, Any] = {}
    kept = leaf_paths(load_model(str(runs["packed"]), keep_kinds=KINDS, on_blocks=blocks.update).params)
    assert {path: leaf.kind for path, leaf in kept.items() if isinstance(leaf, Blocks)} == PACKED
    assert {path: leaf.shape for path, leaf in blocks.items()} == {path: CFG_SHAPES[path] for path in PACKED}
    stored = arrays["packed"]
    weight = Blocks(jnp.asarray(stored["packed/blocks/1/down"]), CFG.width)
    assert np.array_equal(kept["blocks/1/down"].packed, with_factors(weight, stored["blocks/1/down"]).packed)
    assert {path: leaf.shape for path, leaf in dense(load_model(str(runs["packed"]))).items()} == CFG_SHAPES
    assert leaf_paths(load_model(str(runs["adapter"])).params)["blocks/1/q"].rank == LORA.rank


def change(arrays: Arrays, data: st.DataObject) -> tuple[str, Arrays]:
    """Returns a way to change one array, and arrays so changed."""
    path = data.draw(st.sampled_from(sorted(arrays)))
    array, others = arrays[path], {name: other for name, other in arrays.items() if name != path}
    way = data.draw(
        st.sampled_from(
            ["missing", "renamed", "another", "dtype", "transposed", "flat", "longer", "cut", "axis"]
        )
    )
    if way == "missing":
        return way, others
    if way == "renamed":
        names = [
            "x",
            "blocks/2/q",
            "blocks/0",
            "packed",
            "packed/norm",
            f"packed/{path}",
            f"{path}/a",
            path.replace("/", "//"),
        ]
        return way, others | {data.draw(st.sampled_from(names)): array}
    if way == "another":
        name = data.draw(
            st.sampled_from(["x", "blocks/2/q", "packed/blocks/0/q", "blocks/0/q_bias", "packed/x", "norm2"])
        )
        return way, arrays | {name: array}
    if way == "dtype":
        # Of an adapter any type of floats is read, as other programs write them.
        kinds = [kind for kind in sorted(OTHER) if kind != "float16" or "lora" not in path]
        return way, others | {path: array.astype(OTHER[data.draw(st.sampled_from(kinds))])}
    if way == "transposed":
        return way, others | {path: np.ascontiguousarray(array.T)}
    if way == "flat":
        return way, others | {path: array.reshape(-1)}
    if way == "axis":
        return way, others | {path: array[None]}
    axis = data.draw(st.integers(0, array.ndim - 1))
    longer = np.concatenate([array, array.take([0], axis)], axis)
    return way, others | {path: longer if way == "longer" else array.take(range(array.shape[axis] - 1), axis)}


@pytest.mark.law("hostile files")
@pytest.mark.parametrize("kind", ["plain", "packed", "adapter"])
@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_change_of_one_array_is_refused_or_changes_nothing(runs, arrays, kind, data):
    """Manifests are made anew. Bits that remain those of an array of its path, shape and type tell
    nothing.
    """
    way, changed = change(arrays[kind], data)
    same = changed.keys() == arrays[kind].keys()
    same = same and all(
        (a.dtype, a.shape) == (changed[path].dtype, changed[path].shape) for path, a in arrays[kind].items()
    )
    try:
        write_step(runs[kind], changed)
        keep_kinds = KINDS if kind != "adapter" and data.draw(st.booleans()) else ()
        if same:
            load_model(str(runs[kind]), keep_kinds=keep_kinds)
        else:
            sentence = refusal(lambda: load_model(str(runs[kind]), keep_kinds=keep_kinds))
            assert str(runs[kind] / "checkpoints" / "7") in sentence, (way, sentence)
    finally:
        write_step(runs[kind], arrays[kind])


def test_the_sentence_names_the_array_what_was_wanted_what_came_and_the_file(runs, arrays):
    file, folder = runs["plain"] / "checkpoints" / "7" / "params.safetensors", runs["plain"]
    gate = arrays["plain"]["blocks/0/gate"]
    others = {path: array for path, array in arrays["plain"].items() if path != "blocks/0/gate"}
    remedy = "Restore the run from a copy, or train anew."
    start = f"{file} does not hold the model that the config describes: "
    wanted = "blocks/0/gate should be float32 or bfloat16 [32, 64]"
    for changed, sentence in (
        ({"blocks/0/gate": gate.astype(np.int32)}, f"{wanted}, and is int32 [32, 64]. {remedy}"),
        ({"blocks/0/gate": gate.T.copy()}, f"{wanted}, and is float32 [64, 32]. {remedy}"),
        ({}, f"it has no blocks/0/gate, which should be float32 or bfloat16 [32, 64]. {remedy}"),
        ({"blocks/0/gate": gate, "x": gate}, f"it has an array 'x', which has no place there. {remedy}"),
        (
            {"x": gate},
            "it has no blocks/0/gate, which should be float32 or bfloat16 [32, 64] (1 more arrays "
            f"differ). {remedy}",
        ),
    ):
        write_step(folder, others | changed)
        assert refusal(load_model, str(folder)) == start + sentence
    write_step(folder, arrays["plain"])


def test_matrices_that_stayed_frozen_may_be_of_bfloat16(runs, arrays):
    half = {
        path: array.astype(ml_dtypes.bfloat16) if array.ndim == 2 else array
        for path, array in arrays["plain"].items()
    }
    write_step(runs["plain"], half)
    assert load_model(str(runs["plain"])).params["blocks"]["0"]["q"].dtype == jnp.bfloat16
    write_step(runs["plain"], half | {"norm": half["norm"].astype(ml_dtypes.bfloat16)})
    assert "norm should be float32 [32], and is bfloat16 [32]" in refusal(load_model, str(runs["plain"]))
    write_step(runs["plain"], arrays["plain"])


@pytest.mark.parametrize("path", ["packed/embed", "packed/blocks/0/up", "blocks/0/gate"])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_a_block_whose_scale_is_not_finite_is_refused(runs, arrays, path, value):
    damaged = arrays["packed"][path].copy()
    if path.startswith("packed/"):
        damaged[-1, -1, -2:] = np.array([value], np.float16).view(np.uint8)
    else:
        damaged[-1, -1, -1, -1] = value
    write_step(runs["packed"], arrays["packed"] | {path: damaged})
    for keep_kinds in ((), KINDS):
        sentence = refusal(functools.partial(load_model, str(runs["packed"]), keep_kinds=keep_kinds))
        name = path.removeprefix("packed/")
        assert f"{name} has a block whose scale or minimum is not a finite number" in sentence
    write_step(runs["packed"], arrays["packed"])


def test_an_adapter_of_an_earlier_version_is_refused(runs, arrays):
    """It had pairs by path, and no file that PEFT reads."""
    run = runs["adapter"]
    pairs = {"blocks/0/q/a": np.ones((32, 3), np.float32), "blocks/0/q/b": np.ones((3, 24), np.float32)}
    shutil.rmtree(run / "checkpoints" / "7")
    checkpoint.write(run, 7, {"params": pairs, "optimizer": {}}, {"step": 7, "seconds": 1.0}, keep=9)
    sentence = refusal(load_model, str(run))
    assert re.search(
        r"checkpoints/7 has no adapter_config\.json .* of an earlier version .* Train the adapter anew",
        sentence,
    )
    write_step(run, arrays["adapter"])


def test_an_earlier_versions_run_does_not_tell_which_blocks_trained(runs, arrays, tmp_path):
    folder = write_run(tmp_path / "run", arrays["packed"])
    wanted = load_model(str(runs["packed"]), keep_kinds=KINDS).params["blocks"]["1"]["down"]
    assert np.array_equal(
        load_model(str(folder), keep_kinds=KINDS).params["blocks"]["1"]["down"].packed, wanted.packed
    )


def test_a_config_of_more_layers_than_there_are_arrays_takes_no_time(runs, arrays):
    """Of a billion layers a list of arrays would take all memory."""
    claimed = dataclasses.replace(CFG, layers=10**5)
    for kind in ("plain", "packed"):
        assert len(expected_arrays(claimed, arrays[kind], None)) < 1000
    file = runs["plain"] / "config.json"
    before = file.read_text()
    file.write_text(json.dumps(claimed.to_json()))
    write_step(runs["plain"], arrays["plain"])
    assert "it has no blocks/2/" in refusal(load_model, str(runs["plain"]))
    file.write_text(before)
    write_step(runs["plain"], arrays["plain"])


def test_what_was_planned_of_one_checkpoint_is_not_loaded_from_another_with_other_blocks(runs, arrays):
    """The newest, whose shapes a server compiles for, is damaged where only its SHA-256 tells."""
    other = round_to_blocks(jnp.asarray(arrays["plain"]["head"]), "Q4_0")
    write_step(runs["packed"], arrays["packed"] | {"packed/head": np.asarray(other.packed)}, step=8)
    with (runs["packed"] / "checkpoints" / "8" / "params.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    assert "has other weights in blocks than a newer checkpoint" in refusal(
        lambda: load_model(str(runs["packed"]), keep_kinds=KINDS)
    )
    shutil.rmtree(runs["packed"] / "checkpoints" / "8")


def test_the_architecture_is_known_before_weights_are_read(runs, arrays, monkeypatch):
    """A command is told the config once the arrays fit it, and may end there."""

    def stop(cfg: ModelConfig) -> None:
        raise UserError(f"{cfg.layers} layers")

    write_step(runs["plain"], {"norm": arrays["plain"]["norm"]})
    assert "it has no embed" in refusal(lambda: load_model(str(runs["plain"]), on_config=stop))
    write_step(runs["plain"], arrays["plain"])
    assert refusal(lambda: load_model(str(runs["plain"]), on_config=stop)) == "2 layers"


@pytest.mark.parametrize("result", [[1], "7", *({"kept_step": step} for step in (10**400, -1, True, "7"))])
def test_a_record_that_names_no_step_as_its_best_is_refused(runs, arrays, result):
    file = runs["plain"] / "run.json"
    before = file.read_text()
    file.write_text(json.dumps(json.loads(before) | {"result": result}))
    write_step(runs["plain"], arrays["plain"])
    assert f"{file} does not say which step of the run is its best" in refusal(load_model, str(runs["plain"]))
    file.write_text(before)
    write_step(runs["plain"], arrays["plain"])
