"""Saving runs beside training (T11): the state at the time of `save` is written and read back, and no failure is lost."""

import errno
import functools
import gc
import mmap
import os
import threading
import time
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoints import hidden, is_step, load_tiny, same_bits, save, save_model, save_tiny, tiny

from engine.errors import UserError
from engine.storage import background_save, orbax_arrays
from engine.storage.background_save import BackgroundSaver
from engine.storage.checkpoint import load_params, steps
from engine.storage.manifest import verify


@pytest.fixture
def held(monkeypatch):
    """An event that each write of arrays waits for."""
    event, write = threading.Event(), orbax_arrays.write
    monkeypatch.setattr(orbax_arrays, "write", lambda *args: (event.wait(60), write(*args)))
    yield event
    event.set()


def begin(saver: BackgroundSaver, step: int, **options) -> None:
    saver.save(step, *tiny(step), {"at": step}, **options)


def until_written(saver: BackgroundSaver) -> None:
    until = time.monotonic() + 60
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
def test_arrays_that_calls_make_are_saved_and_held_one_at_a_time_where_there_is_room(tmp_path, room):
    params, optimizer = tiny(1)
    alive: list[weakref.ref] = []

    def made(leaf):
        if room:
            gc.collect()
            assert not any(array() is not None for array in alive)
        array = jnp.array(leaf)
        alive.append(weakref.ref(array))
        return array

    later = jax.tree.map(lambda leaf: functools.partial(made, np.asarray(leaf)), params)
    with BackgroundSaver(tmp_path, 1) as saver:
        if room:
            saver.reserve(params, optimizer)
        saver.save(1, later, optimizer, {"at": 1})
    assert is_step(load_tiny(tmp_path), 1)


@pytest.mark.parametrize("refused", ["mmap", "madvise"])
def test_a_kernel_that_refuses_the_mapping_or_huge_pages_ends_no_run(tmp_path, monkeypatch, refused):
    class Mapping(mmap.mmap):
        def __new__(cls, *args):
            if refused == "mmap":
                raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
            return super().__new__(cls, *args)

        def madvise(self, *_):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(background_save.mmap, "mmap", Mapping)
    with BackgroundSaver(tmp_path, 1) as saver:
        saver.reserve(*tiny(0))
        begin(saver, 1)
    assert is_step(load_tiny(tmp_path), 1)


def test_arrays_may_be_donated_and_changed_after_a_save(tmp_path, held):
    trees = [{"jax": jnp.arange(6.0).reshape(2, 3), "numpy": np.arange(5, dtype=np.int32), "one": jnp.int32(7)}, {}]
    before = jax.tree.map(np.copy, trees[0])
    with BackgroundSaver(tmp_path, 1, lambda trainable: {"model": trainable}) as saver:
        saver.reserve(*trees)
        saver.save(1, *trees, {})
        after = jax.jit(lambda leaf: leaf * 3 + 1, donate_argnums=0)(trees[0]["jax"])
        assert trees[0]["jax"].is_deleted()
        trees[0]["numpy"] += 1
        held.set()
    assert not np.array_equal(after, before["jax"])
    assert same_bits(load_params(tmp_path).params, jax.tree.map(jnp.asarray, {"model": before}))


def test_without_room_for_a_copy_it_waits(tmp_path, monkeypatch):
    monkeypatch.setattr(background_save, "free_host_bytes", lambda: 47)
    with BackgroundSaver(tmp_path, 1) as saver:
        saver.reserve(*tiny(0))
        begin(saver, 1)
        assert is_step(load_tiny(tmp_path), 1)


def test_a_failure_is_raised_at_the_next_step_or_at_the_end(tmp_path, monkeypatch):
    save_tiny(tmp_path, 1)
    held = threading.Event()

    def refuse(*_):
        held.wait(60)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(orbax_arrays, "write", refuse)
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


# The read-back, and which are kept


def test_the_only_checkpoint_stays_until_the_next_was_read_back(tmp_path, monkeypatch):
    save_tiny(tmp_path, 1)
    seen, compare = [], orbax_arrays.compare

    def watch(building: Path, trees):
        compare(building, trees)
        seen.append((steps(tmp_path), (building / "manifest.json").exists()))

    monkeypatch.setattr(orbax_arrays, "compare", watch)
    save_tiny(tmp_path, 2, keep=1)
    assert seen == [([1], True)]
    assert steps(tmp_path) == [2]


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_write_that_went_wrong_is_noticed_and_the_old_one_stays(tmp_path, monkeypatch, damage):
    save_model(tmp_path, 1)
    write = orbax_arrays.write

    def write_wrong(building, *args):
        write(building, *args)
        file = max((building / "params").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 0x20
        file.write_bytes(data[: len(data) // 2] if damage == "truncate" else data)
        if damage == "delete":
            file.unlink()

    monkeypatch.setattr(orbax_arrays, "write", write_wrong)
    reason = {"flip": "params/embedding was read back with other bits than"}.get(damage, "params cannot be read back")
    with pytest.raises(UserError, match=f"checkpoints/2 could not be written .*: {reason}"):
        save_model(tmp_path, 2, keep=1)
    assert (steps(tmp_path), hidden(tmp_path)) == ([1], [])
    assert verify(tmp_path / "checkpoints" / "1") == []


def test_large_trees_are_compared_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(orbax_arrays, "GROUP_BYTES", 8)
    compared = []
    monkeypatch.setattr(orbax_arrays, "_bytes", lambda leaf: (compared.append(leaf.nbytes), [leaf])[1])
    save(tmp_path, 1, {"a": np.arange(4, dtype=np.int8), "b": [np.arange(3.0, dtype=np.float32), np.float32(2)]}, {}, {})
    assert sorted(compared) == [4, 4, 4, 4, 12, 12]


def test_the_best_is_kept_beside_the_newest(tmp_path):
    for step, best in ((1, 1), (2, 2), (3, 2), (4, 2), (5, 5), (6, 5)):
        save_tiny(tmp_path, step, keep=1, best=best)
    assert steps(tmp_path) == [5, 6]
    save_tiny(tmp_path, 7, keep=2, best=5)
    assert steps(tmp_path) == [5, 6, 7]


def test_what_holds_a_new_checkpoint_is_synced_in_order(tmp_path, monkeypatch):
    events, replace, fsync = [], os.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append(os.readlink(f"/proc/self/fd/{handle}")), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda old, new: (events.append("rename"), replace(old, new)))
    path = save_tiny(tmp_path / "new" / "run", 1)
    renamed = events.index("rename")
    assert [*map(str, (tmp_path, tmp_path / "new", path.parents[1]))] == events[:3]  # each holds a folder that is new
    synced = {event.partition("/checkpoints/.1.")[2].partition("/new/")[2] for event in events[:renamed]}
    assert synced >= {file.relative_to(path).as_posix() for file in path.rglob("*")}
    assert events[renamed:] == ["rename", str(path.parent)]
