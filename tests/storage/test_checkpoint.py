"""Checkpoints come back bit for bit or not at all: damaged, of another model, or of a folder that holds other things."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from refusals import refusal
from tiny_checkpoints import (
    MODEL,
    STATE,
    hidden,
    is_step,
    load_tiny,
    make_optimizer,
    make_params,
    same_bits,
    save,
    save_model,
    save_tiny,
    tiny,
)

from engine.storage import checkpoint
from engine.storage.checkpoint import load, load_params, steps
from engine.storage.digest import digest
from engine.storage.manifest import verify

# Bit for bit


def test_everything_comes_back_bit_for_bit(tmp_path):
    path = save_model(tmp_path, 7)
    assert path == tmp_path / "checkpoints" / "7"
    loaded = load(tmp_path, *MODEL)
    assert same_bits(loaded.params, make_params(7))
    assert same_bits(loaded.optimizer, make_optimizer(7))
    assert (loaded.path, loaded.step, loaded.state, loaded.damaged) == (path, 7, STATE, [])
    assert {type(leaf) for leaf in jax.tree.leaves(loaded.params)} == {type(jnp.ones(1))}
    assert verify(path) == []
    below = {"params", "optimizer", "state.json", "manifest.json", "_CHECKPOINT_METADATA", "orbax.checkpoint"}
    assert {entry.name for entry in path.iterdir()} == below


def test_restored_arrays_behave_like_fresh_ones(tmp_path):
    save_model(tmp_path, 1)
    weights = load(tmp_path, *MODEL).params["layers"]
    assert not any(leaf.committed for leaf in jax.tree.leaves(weights))
    step = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
    assert same_bits(step(weights), step(make_params(1)["layers"]))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(weights))


def test_host_arrays_scalars_and_strides_come_back(tmp_path):
    host = {"turned": np.arange(6, dtype=np.float32).reshape(2, 3).T, "one": np.float32(-0.0), "flag": np.bool_(True)}
    save(tmp_path, 0, host, {}, {})
    back = load(tmp_path, host, {})
    assert digest(back.params) == digest(host)
    assert back.optimizer == {}


def test_a_sharding_that_is_asked_for_is_used(tmp_path):
    save_model(tmp_path, 1)
    sharding = jax.sharding.NamedSharding(jax.make_mesh((1,), ("data",)), jax.sharding.PartitionSpec())
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), MODEL[0])
    params = load(tmp_path, like, MODEL[1]).params
    assert same_bits(params, make_params(1))
    assert {leaf.sharding for leaf in jax.tree.leaves(params)} == {sharding}


def test_params_load_alone(tmp_path):
    path = save_model(tmp_path, 3)
    shutil.rmtree(path / "optimizer")
    for where in (tmp_path, path, os.path.relpath(path)):
        loaded = load_params(where)
        assert digest(loaded.params) == digest(make_params(3))
        assert loaded.params["quantized"].keys() == {"values", "scale"}
        assert (loaded.path.resolve(), loaded.optimizer, loaded.state) == (path, None, STATE)
    assert verify(path, skip=("optimizer",)) == []
    assert verify(path) != []


def test_orbax_itself_reads_a_step_folder(tmp_path):
    from orbax.checkpoint import v1 as ocp

    path = save_tiny(tmp_path, 3)
    tree = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), tiny(0)[0])
    assert digest(ocp.load(path, tree, checkpointable_name="params")) == digest(tiny(3)[0])


@pytest.mark.parametrize(
    ("params", "state", "named"),
    [
        ({"a": {"b": 1.0}}, {}, "params/a/b.*float"),
        ({"a": {"b": jax.random.key(0)}}, {}, "params/a/b.*key_data"),
        ({"a": {"b": jnp.zeros((0, 3))}}, {}, "params/a/b.*without elements"),
        ({"a": {"b": np.arange(3)}}, {}, "params/a/b.*int64"),
        ({"a": {"b": jax.ShapeDtypeStruct((2,), jnp.float32)}}, {}, "params/a/b.*ShapeDtypeStruct"),
        ({"x": {"y": jnp.ones(1)}, "x.y": jnp.zeros(1)}, {}, r"params/x/y and params/x\.y"),
        ({}, {"loss": float("nan")}, "JSON"),
        ({}, {"path": Path()}, "JSON"),
    ],
)
def test_what_could_not_come_back_is_refused_before_anything_is_written(tmp_path, params, state, named):
    with pytest.raises((TypeError, ValueError), match=named):
        save(tmp_path, 1, params, {}, state)
    assert list(tmp_path.iterdir()) == []


# Another model, other keys


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"seed": jnp.int32(0), "more": jnp.ones(2)}, r"more float32 \(2,\) was wanted and no such array came"),
        ({"seed": None}, r"seed no such array was wanted and int32 \(\) came"),
        ({"seed": jnp.float32(0)}, r"seed float32 \(\) was wanted and int32 \(\) came"),
        ({"seed": jnp.zeros(1, jnp.int32)}, r"seed int32 \(1,\) was wanted and int32 \(\) came"),
        ({"embedding": jnp.zeros((256, 256))}, r"embedding float32 .* was wanted and bfloat16 \(256, 256\) came"),
        ({"layers": {"0": {"norm": jnp.ones(5)}}, "nans": jnp.ones(4)}, r"layers/0/qkv .*\(5 more arrays differ\)"),
    ],
)
def test_another_model_is_named(tmp_path, changed, words):
    save_model(tmp_path, 1)
    like = MODEL[0] | jax.eval_shape(lambda: changed)
    assert re.search(f"checkpoints/1/params is of another model: at {words}", refusal(load, tmp_path, like, MODEL[1]))


def test_another_optimizer_is_named(tmp_path):
    save_model(tmp_path, 1)
    like = jax.eval_shape(lambda: optax.sgd(0.1, momentum=0.9).init({"w": jnp.ones((4, 3))}))
    assert "checkpoints/1/optimizer is of another model" in refusal(load, tmp_path, MODEL[0], like)


def test_64_bits_are_not_halved_in_silence(tmp_path):
    with jax.enable_x64(True):
        save(tmp_path, 1, {"w": jnp.arange(3, dtype=jnp.int64)}, {}, {})
        assert load_params(tmp_path).params["w"].dtype == jnp.int64
    assert "w int64 (3,) was wanted and int32 (3,) came" in refusal(load_params, tmp_path)


@pytest.mark.parametrize(("name", "value"), [("jax_default_prng_impl", "rbg"), ("jax_threefry_partitionable", False)])
def test_other_prng_settings_are_refused_for_training_alone(tmp_path, name, value):
    save_tiny(tmp_path, 1)
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        assert re.search(f"{name}={before}.*now.*{name}={value}.*{name.upper()}", refusal(load_tiny, tmp_path))
        assert load_params(tmp_path).step == 1
    finally:
        jax.config.update(name, before)


# T2: damage is named, and the previous good one is used


DAMAGE = {
    "delete": None,
    "truncate": lambda data: data[:-1],
    "zero": lambda data: bytes(len(data)),
    "flip": lambda data: data[: len(data) // 3] + bytes([data[len(data) // 3] ^ 0x20]) + data[len(data) // 3 + 1 :],
}


@pytest.mark.parametrize("way", DAMAGE)
def test_every_damage_to_every_file_is_named_and_passed_over(tmp_path, way):
    save_tiny(tmp_path, 1)
    newest = save_tiny(tmp_path, 2)
    intact = shutil.copytree(newest, tmp_path / "whole")
    files = [path for path in newest.rglob("*") if path.is_file()]
    assert len(files) > 10
    for file in files:
        if way == "delete":
            file.unlink()
        elif data := file.read_bytes():
            file.write_bytes(DAMAGE[way](data))
        else:
            continue
        loaded = load_tiny(tmp_path)
        assert is_step(loaded, 1), file
        assert len(loaded.damaged) == 1
        assert loaded.damaged[0].startswith(f"{file} "), file
        assert ("bytes instead of" in loaded.damaged[0]) == (way == "truncate" and file.name != "manifest.json")
        assert verify(newest) == loaded.damaged
        if file.relative_to(newest).parts[0] == "optimizer":
            assert load_params(tmp_path).step == 2
        else:
            fallen_back = load_params(tmp_path)
            assert (fallen_back.step, fallen_back.damaged) == (1, loaded.damaged)
            assert str(file) in refusal(load_params, newest)
        shutil.copy(intact / file.relative_to(newest), file)
    assert is_step(load_tiny(tmp_path), 2)


def test_every_bit_of_the_manifest_guards_itself(tmp_path):
    listing = save_tiny(tmp_path, 1) / "manifest.json"
    data = listing.read_bytes()
    for place in range(0, len(data), 7):
        listing.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        assert verify(listing.parent) == [f"{listing} is damaged"]
    for text in (b"", b"{}", b"[]", b"null", b'{"files": 3}', data + b" ", data.replace(b"\n", b"\r\n")):
        listing.write_bytes(text)
        assert verify(listing.parent) == [f"{listing} is damaged"]


def test_a_file_too_many_is_named(tmp_path):
    save_tiny(tmp_path, 1)
    stranger = save_tiny(tmp_path, 2) / "params" / "d" / "stranger"
    stranger.write_text("?")
    loaded = load_tiny(tmp_path)
    assert (loaded.step, loaded.damaged) == (1, [f"{stranger} does not belong there"])


def test_when_none_is_sound_all_damage_is_named(tmp_path):
    paths = [save_tiny(tmp_path, step) / "state.json" for step in (1, 2)]
    for path in paths:
        path.write_text("{}")
    sentence = refusal(load_tiny, tmp_path)
    assert all(str(path) in sentence for path in paths)


def test_no_checkpoint_is_said(tmp_path):
    for read, folder in ((load_tiny, tmp_path), (load_params, tmp_path), (load_params, tmp_path / "none")):
        assert "no checkpoint" in refusal(read, folder)


# Which are kept


def test_the_newest_are_kept(tmp_path):
    for step in range(5):
        save_tiny(tmp_path, step, keep=2)
        assert steps(tmp_path) == [earlier for earlier in (step - 1, step) if earlier >= 0]
    assert hidden(tmp_path) == []


def test_going_back_removes_no_future_and_is_not_removed_by_it(tmp_path):
    for step in (10, 20, 30):
        save_tiny(tmp_path, step)
    save_tiny(tmp_path, 15, keep=1)
    assert steps(tmp_path) == [15, 20, 30]
    assert load_params(tmp_path / "checkpoints" / "15").step == 15


def test_a_step_is_replaced_whole(tmp_path):
    save(tmp_path, 5, {"w": jnp.ones(3)}, {}, {})
    save_tiny(tmp_path, 5)
    assert is_step(load_tiny(tmp_path), 5)
    assert hidden(tmp_path) == []


def test_only_folders_named_by_a_number_are_checkpoints(tmp_path):
    assert steps(tmp_path) == []
    save_tiny(tmp_path, 12)
    save_tiny(tmp_path, 3)
    for name in ("best", "12.bak", ".7.tmp", "-1", "007"):
        (tmp_path / "checkpoints" / name).mkdir()
    (tmp_path / "checkpoints" / "99").write_text("a file")
    assert steps(tmp_path) == [3, 12]


def test_a_relative_folder_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny(Path("runs/demo"), 1)
    assert load_tiny(Path("runs/demo")).path == tmp_path / "runs/demo/checkpoints/1"


@pytest.mark.parametrize("options", [{"keep": 0}, {"step": -1}])
def test_nonsense_is_refused(tmp_path, options):
    with pytest.raises(ValueError, match="step must be at least 0 and keep at least 1"):
        save(**{"folder": tmp_path, "step": 1, "params": {}, "optimizer": {}, "state": {}} | options)


def test_orbax_is_imported_only_when_arrays_move():
    code = "import sys, engine.storage.checkpoint; sys.exit(any(name.startswith('orbax') for name in sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(checkpoint.__file__).parents[2])


def test_state_is_readable_without_us(tmp_path):
    record = json.loads((save_model(tmp_path, 1) / "state.json").read_text(encoding="utf-8"))
    assert (record["step"], record["state"]) == (1, STATE)
    assert record["prng"] == {"jax_default_prng_impl": "threefry2x32", "jax_threefry_partitionable": True}
