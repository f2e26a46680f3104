"""Checkpoints come back bit for bit or not at all; saving runs beside training (T11), and no failure of it is lost."""

import dataclasses
import errno
import json
import os
import re
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from engine import manifest
from engine.errors import UserError
from engine.manifest import verify
from engine.storage import checkpoint, checkpoint_reader
from engine.storage.checkpoint import BackgroundSaver, steps
from engine.storage.checkpoint_reader import load
from engine.storage.digest import digest
from tests.storage.refusals import refusal
from tests.storage.tiny_checkpoints import (
    hidden,
    is_step,
    load_params,
    load_tiny,
    same_bits,
    save,
    tiny,
    write_tiny,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Int8:
    values: jax.Array
    scale: jax.Array


def make_params(seed: int) -> dict:
    """Every bfloat16, three NaNs, a -0.0, a 0-d array, one without elements, a node that is no
    dict, layers out of order.
    """
    draw = np.random.default_rng(seed)
    layers = {name: {"qkv": draw.normal(size=(5, 7)), "norm": np.full(5, -0.0)} for name in ("0", "1", "10")}
    return {
        "layers": jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), layers),
        "embedding": jnp.asarray(
            np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16).reshape(256, 256)
        ),
        "quantized": Int8(jnp.asarray(draw.integers(-128, 127, (3, 2)), jnp.int8), jnp.ones(2)),
        "nans": jnp.asarray(np.asarray([0x7FC00001, 0xFFC12345, 0x7F800001], np.uint32).view(np.float32)),
        "seed": jnp.int32(seed),
        "none": jnp.zeros((0, 3)),
    }


def make_optimizer(seed: int) -> dict:
    """Returns what an optax state holds (named tuples, empty states, masked leaves, a count), a
    PRNG key's data and a flag.
    """
    weights = {"w": jnp.full((4, 3), seed + 0.1), "frozen": jnp.ones(2)}
    adamw = optax.adamw(optax.linear_schedule(1.0, 0.0, 9), mu_dtype=jnp.bfloat16)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.masked(adamw, {"w": True, "frozen": False}))
    _, state = tx.update(weights, tx.init(weights), weights)
    return {"tx": state, "key": jax.random.key_data(jax.random.key(seed)), "finite": jnp.asarray(True)}


MODEL = jax.eval_shape(lambda: (make_params(0), make_optimizer(0)))
STATE = {"data": {"epoch": 2, "offset": 12345}, "best": 0.1 + 0.2, "words": "é\n"}


def save_model(folder: Path, step: int, **options: Any) -> Path:
    return save(folder, step, make_params(step), make_optimizer(step), STATE, **options)


# Bit for bit


@pytest.mark.law("round trip")
def test_everything_comes_back_bit_for_bit_and_anyone_can_read_it(tmp_path):
    path = save_model(tmp_path, 7)
    loaded = load(tmp_path, *MODEL)
    assert same_bits(loaded.params, make_params(7))
    assert same_bits(loaded.optimizer, make_optimizer(7))
    assert (loaded.path, loaded.step, loaded.state, loaded.damaged) == (path, 7, STATE, [])
    assert verify(path) == []
    assert {file.name for file in path.iterdir()} == {
        "params.safetensors",
        "optimizer.safetensors",
        "state.json",
        "manifest.json",
    }
    with safe_open(path / "params.safetensors", "numpy") as file:
        assert {"layers/10/qkv", "quantized/values", "seed", "none"} < {*file.keys()}
        np.testing.assert_array_equal(file.get_tensor("layers/1/qkv"), make_params(7)["layers"]["1"]["qkv"])
    record = json.loads((path / "state.json").read_text(encoding="utf-8"))
    prng = {"jax_default_prng_impl": "threefry2x32", "jax_threefry_partitionable": True}
    assert record == {"step": 7, "prng": prng, "state": STATE}


def test_loaded_arrays_behave_like_fresh_ones(tmp_path):
    save_model(tmp_path, 1)
    weights = load(tmp_path, *MODEL).params["layers"]
    assert not any(leaf.committed for leaf in jax.tree.leaves(weights))
    before = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(weights)]
    after = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)(weights)
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(after)] == before


def test_host_arrays_scalars_and_strides_come_back(tmp_path):
    host = {
        "turned": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "one": np.float32(-0.0),
        "flag": np.bool_(True),
    }
    save(tmp_path, 0, host, {}, {})
    assert digest(load_params(tmp_path).params) == digest(host)


def test_params_load_alone(tmp_path):
    path = save_model(tmp_path, 3)
    (path / "optimizer.safetensors").unlink()
    for where in (tmp_path, path, Path(os.path.relpath(path))):
        loaded = load_params(where)
        assert digest(loaded.params) == digest(make_params(3))
        assert (loaded.path.resolve(), loaded.optimizer, loaded.state) == (path, None, STATE)
    assert verify(path, skip="optimizer") == []
    assert verify(path) != []


def cut_files(folder: Path, *shards: dict[str, np.ndarray]) -> Path:
    """Makes a checkpoint's params of these files, as several processes write them."""
    path = save(folder, 1, {}, {}, {})
    for process, shard in enumerate(shards):
        save_file(shard, path / f"params{f'.{process}' if process else ''}.safetensors")
    manifest.write_manifest(path)
    return path


def test_parts_of_several_processes_make_one_array_that_any_box_is_read_of(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_reader.safetensors, "BLOCK", 32)  # bytes: a few rows at a time
    whole = np.arange(60, dtype=np.float32).reshape(10, 6)
    cut = lambda a, b, c, d: {f"w[{a}:{b},{c}:{d}]": np.ascontiguousarray(whole[a:b, c:d])}
    norm = {"norm": np.ones(3, np.float32)}
    path = cut_files(tmp_path, cut(0, 4, 0, 2) | cut(4, 10, 2, 6) | norm, cut(0, 4, 2, 6) | cut(4, 10, 0, 2))
    np.testing.assert_array_equal(load_params(tmp_path).params["w"], whole)
    stored = checkpoint_reader.stored_arrays(path, "params")["w"]
    for a, b, c, d in ((0, 10, 0, 6), (2, 7, 1, 5), (3, 4, 5, 6), (5, 9, 0, 6)):
        out = np.empty((b - a, d - c), np.float32)
        stored.read(((a, b), (c, d)), out)
        np.testing.assert_array_equal(out, whole[a:b, c:d])
    sharding = jax.sharding.NamedSharding(jax.make_mesh((1,), ("data",)), jax.sharding.PartitionSpec())
    like = {
        name: jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding)
        for name, shape in (("w", (10, 6)), ("norm", (3,)))
    }
    params = load(tmp_path, like, {}).params
    assert {leaf.sharding for leaf in params.values()} == {sharding}
    np.testing.assert_array_equal(params["w"], whole)


@pytest.mark.parametrize(
    "shapes",
    [
        {"w[0:2]": (1,)},
        {"w[0:1]": (1,), "w[2:3]": (1,)},
        {"w": (1,), "w/a": (1,)},
        {"w[0:1,0:1]": (1,)},
        {"w[0:1]": (1,), "w[1:3,0:1]": (2, 1)},
        {"w[0:3,0:2]": (3, 2), "w[1:2,0:3]": (1, 3)},
    ],
)
def test_parts_that_make_no_array_are_refused(tmp_path, shapes):
    cut_files(tmp_path, {name: np.ones(shape, np.float32) for name, shape in shapes.items()})
    assert "make no array" in refusal(load_params, tmp_path)


@pytest.mark.parametrize(
    ("params", "state", "named"),
    [
        ({"a": {"b": 1.0}}, {}, "a/b is a float"),
        ({"a": {"b": jax.random.key(0)}}, {}, "a/b is .* of key"),
        ({"a": {"b": np.arange(3)}}, {}, "a/b is int64"),
        ({"a": {"b": jnp.ones(1)}, "a/b": jnp.zeros(1)}, {}, "one path"),
        ({"a[0:1]": jnp.ones(1)}, {}, "part of an array"),
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
        (
            {"seed": jnp.int32(0), "more": jnp.ones(2)},
            r"more float32 \(2,\) was wanted and no such array came",
        ),
        ({"seed": None}, r"seed no such array was wanted and int32 \(\) came"),
        ({"seed": jnp.float32(0)}, r"seed float32 \(\) was wanted and int32 \(\) came"),
        (
            {"embedding": jnp.zeros((256, 256))},
            r"embedding float32 .* was wanted and bfloat16 \(256, 256\) came",
        ),
        (
            {"layers": {"0": {"norm": jnp.ones(5)}}, "nans": jnp.ones(4)},
            r"layers/0/qkv .*\(5 more arrays differ\)",
        ),
    ],
)
def test_another_model_is_named(tmp_path, changed, words):
    save_model(tmp_path, 1)
    like = MODEL[0] | jax.eval_shape(lambda: changed)
    assert re.search(
        f"checkpoints/1/params is of another model: at {words}", refusal(load, tmp_path, like, MODEL[1])
    )
    other = jax.eval_shape(lambda: optax.sgd(0.1, momentum=0.9).init({"w": jnp.ones((4, 3))}))
    assert "checkpoints/1/optimizer is of another model" in refusal(load, tmp_path, MODEL[0], other)


def test_64_bits_are_not_halved_in_silence(tmp_path):
    with jax.enable_x64(True):
        save(tmp_path, 1, {"w": jnp.arange(3, dtype=jnp.int64)}, {}, {})
        assert load_params(tmp_path).params["w"].dtype == jnp.int64
    assert "w int64 (3,) was wanted and int32 (3,) came" in refusal(load_params, tmp_path)


@pytest.mark.parametrize(
    ("name", "value"), [("jax_default_prng_impl", "rbg"), ("jax_threefry_partitionable", False)]
)
def test_other_prng_settings_are_refused_for_training_alone(tmp_path, name, value):
    write_tiny(tmp_path, 1)
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        assert re.search(
            f"{name}={before}.*now.*{name}={value}.*{name.upper()}", refusal(load_tiny, tmp_path)
        )
        assert load_params(tmp_path).step == 1
    finally:
        jax.config.update(name, before)


# T2: damage is named, and the previous good one is used

DAMAGE = {
    "delete": None,
    "truncate": lambda data: data[:-1],
    "zero": lambda data: bytes(len(data)),
    "flip": lambda data: (
        data[: len(data) // 3] + bytes([data[len(data) // 3] ^ 0x20]) + data[len(data) // 3 + 1 :]
    ),
}


@pytest.mark.parametrize("way", DAMAGE)
def test_every_damage_to_every_file_is_named_and_passed_over(tmp_path, way):
    write_tiny(tmp_path, 1)
    newest = write_tiny(tmp_path, 2)
    for file in [*newest.iterdir()]:
        data = file.read_bytes()
        file.unlink() if way == "delete" else file.write_bytes(DAMAGE[way](data))
        loaded = load_tiny(tmp_path)
        assert is_step(loaded, 1), file
        assert len(loaded.damaged) == 1
        assert loaded.damaged[0].startswith(f"{file} "), file
        assert ("bytes instead of" in loaded.damaged[0]) == (
            way == "truncate" and file.name != "manifest.json"
        )
        assert verify(newest) == loaded.damaged
        if file.name == "optimizer.safetensors":
            assert load_params(tmp_path).step == 2
        else:
            fallen_back = load_params(tmp_path)
            assert (fallen_back.step, fallen_back.damaged) == (1, loaded.damaged)
            assert str(file) in refusal(load_params, newest)
        file.write_bytes(data)
    assert is_step(load_tiny(tmp_path), 2)


def test_every_bit_of_the_manifest_guards_itself(tmp_path):
    listing = write_tiny(tmp_path, 1) / "manifest.json"
    data = listing.read_bytes()
    for place in range(0, len(data), 7):
        listing.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        assert verify(listing.parent) == [f"{listing} is damaged"]
    for text in (b"", b"{}", b"[]", b"null", b'{"files": 3}', data + b" ", data.replace(b"\n", b"\r\n")):
        listing.write_bytes(text)
        assert verify(listing.parent) == [f"{listing} is damaged"]


def test_no_intact_checkpoint_is_said_and_all_damage_named(tmp_path):
    for read, folder in ((load_tiny, tmp_path), (load_params, tmp_path), (load_params, tmp_path / "none")):
        assert "no checkpoint" in refusal(read, folder)
    paths = [
        write_tiny(tmp_path, step) / name for step, name in ((1, "state.json"), (2, "params.9.safetensors"))
    ]
    for path in paths:
        path.write_text("{}")
    sentence = refusal(load_tiny, tmp_path)
    assert f"{paths[1]} does not belong there" in sentence
    assert str(paths[0]) in sentence


def test_files_of_another_step_in_its_folder_are_damage(tmp_path):
    """As a checkpoint that was copied over another: 20 with the files of 15 would be taken for the
    newest.
    """
    write_tiny(tmp_path, 10)
    older = write_tiny(tmp_path, 15)
    newer = older.rename(older.parent / "20")
    line = f"{newer} holds the files of step 15"
    for loaded in (load_tiny(tmp_path), load_params(tmp_path)):
        assert (loaded.step, loaded.path.name, loaded.damaged) == (10, "10", [line])
    assert f"Checkpoint {newer} is damaged: {line}. Use another checkpoint of the run." in refusal(
        load_params, newer
    )
    assert is_step(load_tiny(tmp_path), 10)
    elsewhere = shutil.copytree(newer, tmp_path / "copy")  # whose name tells no step
    assert load_params(elsewhere).step == 15
    (newer / "state.json").write_text("{}")
    (newer / manifest.NAME).unlink()
    manifest.write_manifest(newer)
    assert load_tiny(tmp_path).damaged == [
        f"{newer / 'state.json'} is damaged: it does not say the step and the state of a run"
    ]


# Which are kept


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step, best, kept in (
        (1, 1, [1]),
        (2, 2, [2]),
        (3, 2, [2, 3]),
        (4, 2, [2, 4]),
        (5, 5, [5]),
        (6, 5, [5, 6]),
    ):
        save(tmp_path, step, {}, {}, {}, keep=1, best=best)
        assert steps(tmp_path) == kept
    write_tiny(tmp_path, 6)  # replaced whole
    assert is_step(load_tiny(tmp_path), 6)
    write_tiny(tmp_path, 4, keep=1)  # going back removes no future, and is not removed by it
    assert steps(tmp_path) == [4, 5, 6]
    assert hidden(tmp_path) == []


def test_only_folders_named_by_a_number_are_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert steps(Path("run")) == []
    for step in (12, 3):
        write_tiny(Path("run"), step)
    for name in ("best", "12.bak", ".7.tmp", "-1", "007"):
        Path("run/checkpoints", name).mkdir()
    Path("run/checkpoints/99").write_text("a file")
    assert steps(Path("run")) == [3, 12]
    assert load_tiny(Path("run")).path == tmp_path / "run/checkpoints/12"


# Beside training


@pytest.fixture
def held(monkeypatch):
    """An event that each write of files waits for."""
    event, write = threading.Event(), checkpoint.write_files
    monkeypatch.setattr(checkpoint, "write_files", lambda *args: (event.wait(300), write(*args)))
    yield event
    event.set()


def begin(saver: BackgroundSaver, step: int) -> None:
    saver.save(step, *tiny(step), {"at": step})


def until_written(saver: BackgroundSaver) -> None:
    until = time.monotonic() + 300
    while saver.poll():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_save_returns_before_anything_is_written(tmp_path, held):
    with BackgroundSaver(tmp_path, 1) as saver:
        saver.reserve(*tiny(0))
        begin(saver, 1)
        assert (steps(tmp_path), saver.poll()) == ([], True)
        held.set()
        until_written(saver)
        assert is_step(load_tiny(tmp_path), 1)
        begin(saver, 2)
        begin(saver, 3)  # waits for the one before
        assert steps(tmp_path)[-1] == 2
    assert is_step(load_tiny(tmp_path), 3)
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("room", [True, False])
def test_without_room_for_a_copy_a_save_returns_when_it_is_written(tmp_path, monkeypatch, room):
    monkeypatch.setattr(checkpoint, "free_host_bytes", lambda: 2**30 if room else 47)
    with BackgroundSaver(tmp_path, 1) as saver:
        saver.reserve(*tiny(1))
        begin(saver, 1)
        assert (steps(tmp_path) == [1]) or room
    assert is_step(load_tiny(tmp_path), 1)


def test_arrays_may_be_donated_and_changed_after_a_save(tmp_path, held):
    trees = [
        {"jax": jnp.arange(6.0).reshape(2, 3), "numpy": np.arange(5, dtype=np.int32), "one": jnp.int32(7)},
        {},
    ]
    before = jax.tree.map(np.copy, trees[0])
    frozen = {"frozen": jnp.ones(3)}
    with BackgroundSaver(tmp_path, 1, frozen) as saver:
        saver.reserve(*trees)
        saver.save(1, *trees, {})
        jax.jit(lambda leaf: leaf * 3 + 1, donate_argnums=0)(trees[0]["jax"])
        assert trees[0]["jax"].is_deleted()
        trees[0]["numpy"] += 1
        held.set()
    assert digest(load_params(tmp_path).params) == digest(before | frozen)


def test_a_failure_is_raised_at_the_next_step_or_at_the_end(tmp_path, monkeypatch):
    write_tiny(tmp_path, 1)
    held = threading.Event()

    def refuse(*_):
        held.wait(300)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "write_files", refuse)
    sentence = rf"{tmp_path}/checkpoints/2 could not be written \(0\.0 MB wanted\): No space left on device. .*untouched"
    with BackgroundSaver(tmp_path, 1) as saver:
        saver.reserve(*tiny(0))
        begin(saver, 2)
        assert saver.poll()
        held.set()
        with pytest.raises(UserError, match=sentence):
            until_written(saver)
        assert not saver.poll()  # once
    with pytest.raises(UserError, match=sentence), BackgroundSaver(tmp_path, 1) as saver:
        begin(saver, 2)
    with pytest.raises(KeyError, match="another error"), BackgroundSaver(tmp_path, 1) as saver:  # noqa: PT012
        saver.reserve(*tiny(0))
        begin(saver, 2)
        raise KeyError("another error")
    assert is_step(load_tiny(tmp_path), 1)
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("damage", ["flip", "truncate", "lengthen"])
def test_a_write_that_went_wrong_is_noticed_and_the_old_one_stays(tmp_path, monkeypatch, damage):
    save_model(tmp_path, 1)
    sync = manifest.sync_and_drop

    def write_wrong(path: Path) -> None:
        sync(path)
        data = path.read_bytes()
        change = {"lengthen": lambda data: data + b"\0"} | DAMAGE
        path.write_bytes(change[damage](data) if path.name == "params.safetensors" else data)

    monkeypatch.setattr(manifest, "sync_and_drop", write_wrong)
    with pytest.raises(
        UserError, match=r"checkpoints/2 could not be written .*: params.safetensors was read back with other"
    ):
        save_model(tmp_path, 2, keep=1)
    assert (steps(tmp_path), hidden(tmp_path)) == ([1], [])
    assert verify(tmp_path / "checkpoints" / "1") == []


def test_a_full_disk_is_said_before_it_is_filled(tmp_path, monkeypatch):
    write_tiny(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=20))
    with pytest.raises(
        UserError, match=r"2 could not be written \(0\.0 MB wanted\): 0\.0 MB are free\..* untouched"
    ):
        write_tiny(tmp_path, 2)
    assert is_step(load_tiny(tmp_path), 1)
