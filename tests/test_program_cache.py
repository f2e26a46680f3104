"""Stored programs: found again without a trace, donating as ever, and traced anew when damaged or planted."""

import subprocess

import jax
import numpy as np
import pytest

from engine import program_cache, sources
from engine.counting.jaxpr import jaxpr_cost
from engine.errors import UserError
from engine.files import cache_folder
from engine.model.ops import computes_in_c
from engine.program_cache import stored


@pytest.fixture
def traced(monkeypatch, tmp_path):
    """A function of (x, others) jitted anew, as in another process, by `start(key)`; the list grows
    with each trace.
    """
    monkeypatch.setattr(sources, "at_start", sources.read_stamps())
    program_cache._versions.cache_clear()  # noqa: SLF001  as in another process
    computes_in_c()  # builds the kernels in C, if need be, in the cache of all tests
    monkeypatch.setenv("THRICE_CACHE", str(tmp_path))
    traces: list[str] = []

    def start(key: str = "") -> tuple[list[np.ndarray], bool]:
        @stored(lambda *_: {"sum": 0, "dot": 0})
        def function(cfg, x, others):
            traces.append(key)
            return {"sum": x + others["y"], "dot": x.astype("bfloat16") @ others["y"].astype("bfloat16")}

        program = jax.jit(function, static_argnums=0, donate_argnums=1)
        x = jax.device_put(np.arange(12, dtype=np.float32).reshape(3, 4)[:, :3])
        results = program(key, x, {"unused": np.ones(2, bool), "y": np.full((3, 3), 0.1, np.float32)})
        return [np.asarray(results[name]) for name in ("sum", "dot")], x.is_deleted()

    return start, traces


def test_a_stored_program_is_not_traced_and_gives_the_same_bits(traced, monkeypatch):
    start, traces = traced
    (first, donated), (again, donated_again) = start(), start()
    assert len(traces) == 1
    assert donated
    assert donated_again
    monkeypatch.setattr(sources, "at_start", {})
    plain, _ = start()
    assert len(traces) == 2
    for results in (first, again):
        assert [(x.dtype, x.tobytes()) for x in results] == [(x.dtype, x.tobytes()) for x in plain]


def test_operations_of_a_stored_program_are_not_counted_as_none(traced):
    program = jax.jit(stored(lambda *_: 0)(lambda cfg, x: x @ x), static_argnums=0)
    with pytest.raises(UserError, match="cannot count 'stored_program': its work is hidden"):
        jaxpr_cost(lambda x: program("key", x), np.ones((3, 3), np.float32))


def test_another_key_or_setting_has_a_program_of_its_own(traced):
    start, traces = traced
    start("one")
    start("two")
    jax.config.update("jax_default_matmul_precision", "highest")
    try:
        start("one")
    finally:
        jax.config.update("jax_default_matmul_precision", None)
    start("one")
    assert traces == ["one", "two", "one"]


def test_a_program_in_the_place_of_another_is_traced_anew(traced):
    start, traces = traced
    start("one")
    [one] = cache_folder("programs").iterdir()
    start("two")
    [two] = {*cache_folder("programs").iterdir()} - {one}
    two.write_bytes(one.read_bytes())
    start("two")
    assert traces == ["one", "two", "two"]


@pytest.mark.parametrize("spoil", ["flip", "cut", "foreign", "pipe", "folder"])
def test_a_program_that_is_damaged_or_planted_is_traced_anew(traced, spoil):
    start, traces = traced
    expected, _ = start()
    [path] = cache_folder("programs").iterdir()
    data = bytearray(path.read_bytes())
    if spoil == "flip":
        data[len(data) // 2] ^= 1
    path.write_bytes(data[: len(data) // 2] if spoil == "cut" else data)
    if spoil == "foreign":
        path.chmod(0o666)
    if spoil == "pipe":
        path.unlink()
        subprocess.run(["mkfifo", path], check=True)
    if spoil == "folder":
        path.unlink()
        (path / "inner").mkdir(parents=True)
    for _ in range(2):
        results, _ = start()
        assert [x.tobytes() for x in results] == [x.tobytes() for x in expected]
    assert len(traces) == 2
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_program_of_sources_that_were_edited_is_neither_stored_nor_found(traced, monkeypatch):
    start, traces = traced
    start("stored")
    at_start = sources.at_start
    path = program_cache.__file__
    monkeypatch.setattr(sources, "at_start", at_start | {path: (0, 0, 0, 0)})
    program_cache._versions.cache_clear()  # noqa: SLF001
    start("stored")
    start("new")
    assert traces == ["stored", "stored", "new"]
    monkeypatch.setattr(sources, "at_start", at_start)
    program_cache._versions.cache_clear()  # noqa: SLF001
    start("stored")
    start("new")
    assert traces == ["stored", "stored", "new", "new"]


def test_a_program_is_not_stored_when_a_source_is_edited_while_it_is_traced(traced, monkeypatch):
    start, traces = traced
    answers = [False, True]
    with monkeypatch.context() as patch:
        patch.setattr(sources, "are_edited", lambda: answers.pop(0))
        start()
    assert answers == []
    start()
    start()
    assert len(traces) == 2


def test_code_that_moves_to_the_next_file_makes_another_program(monkeypatch, tmp_path):
    paths = [tmp_path / "a.py", tmp_path / "b.py"]
    monkeypatch.setattr(sources, "at_start", dict.fromkeys(map(str, paths), (0, 0, 0, 0)))
    monkeypatch.setattr(sources, "are_edited", lambda: False)
    digests = set()
    for texts in (("one\ntwo\n", "three\n"), ("one\n", "two\nthree\n"), ("one\ntwo\nthree\n", "")):
        for path, text in zip(paths, texts):
            path.write_text(text)
        digests.add(program_cache._versions.__wrapped__())  # noqa: SLF001
    assert len(digests) == 3
    paths[0].unlink()
    assert program_cache._versions.__wrapped__() == "", "a source that is gone by now"  # noqa: SLF001
