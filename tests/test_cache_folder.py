"""A cache folder that cannot be written stops nothing: a sentence names the variable, and a temporary one takes its place."""

import errno
import importlib.util
import os
import py_compile
import resource
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from engine import device, files
from engine.files import cache_folder
from engine.manifest import build_once, verify, write_manifest

NOWHERE = "/proc/nowhere"
NO_FILES = ("folder", "pipe", "link to nothing")
ROOT = Path(__file__).parents[1]


@pytest.fixture
def variables(monkeypatch):
    """Sets the variables that say where the cache is, and puts them back."""

    def put(**values: str) -> None:
        for name in ("THRICE_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.setenv(name, values.get(name, ""))
        if "HOME" in values:
            monkeypatch.setenv("HOME", values["HOME"])

    return put


@pytest.fixture
def no_waiting():
    """Ends a test that waits for a pipe which nobody writes."""

    def end(*_: object) -> None:
        pytest.fail(
            "it waits for a pipe"
        )  # no Exception, which JAX would take for a cache that cannot be read

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def put(path: Path, kind: str) -> None:
    """Puts in the place of a file or folder what is none."""
    files.remove(path)
    if kind == "folder":
        (path / "inner").mkdir(parents=True)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to nothing":
        path.symlink_to(path.with_name("nothing"))
    else:
        path.write_text("a file")


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"THRICE_CACHE": NOWHERE}, f"{NOWHERE} cannot.*: set THRICE_CACHE to"),
        ({"XDG_CACHE_HOME": NOWHERE}, f"{NOWHERE}/thrice cannot.*XDG_CACHE_HOME"),
        ({"HOME": NOWHERE}, f"{NOWHERE}/.cache/thrice cannot"),
        ({"THRICE_CACHE": __file__}, "Not a directory"),
    ],
)
def test_a_folder_that_cannot_be_made(variables, values, named):
    variables(**values)
    with pytest.warns(UserWarning, match=named) as sentences:
        folders = [cache_folder(part) for part in ("compiled", "tokens", "compiled")]
    assert len(sentences) == 1
    folder = folders[0]
    (folder / "a").write_text("b")
    assert folders == [folder, folder.parent / "tokens", folder]
    assert os.environ["THRICE_CACHE"] == str(folder.parent), "as processes that it starts will have it"
    assert folder.parent.stat().st_mode & 0o077 == 0


def test_modes_below_it_are_private_under_any_umask(variables, tmp_path):
    before = os.umask(0)
    try:
        variables(THRICE_CACHE=str(tmp_path / "a" / "cache"))
        folder = cache_folder("native")
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (folder, folder.parent)] == [0o700, 0o700]
    assert cache_folder("native") == folder


def test_a_full_disk_and_what_lies_on_it(variables, tmp_path, monkeypatch):
    """What was cached is still found, and replaced without touching the first."""
    variables(THRICE_CACHE=str(tmp_path))
    (cache_folder("assets") / "a").mkdir()
    (tmp_path / "assets" / "a" / "b").write_text("c")
    free = files.shutil.disk_usage
    full = lambda path: free(path)._replace(free=0) if Path(path).is_relative_to(tmp_path) else free(path)
    monkeypatch.setattr(files.shutil, "disk_usage", full)
    with pytest.warns(UserWarning, match=r"0\.0 MB are free of 1\.0 needed"):
        folder = cache_folder("assets")
    assert not folder.is_relative_to(tmp_path)
    assert (folder / "a" / "b").read_text() == "c"
    with files.atomic_folder(folder / "a") as building:
        (building / "b").write_text("d")
    assert [(place / "a" / "b").read_text() for place in (folder, tmp_path / "assets")] == ["d", "c"]
    with pytest.warns(UserWarning, match="cannot be written"):
        assert cache_folder("assets", room=2**62) == folder, (
            "where no disk has room, what is there can be read"
        )


def test_a_folder_of_compiled_programs_that_others_can_write_is_not_used(variables, monkeypatch, tmp_path):
    variables(THRICE_CACHE=str(tmp_path / "cache"))
    folder = jax.config.jax_compilation_cache_dir
    (tmp_path / "compiled").mkdir()
    (tmp_path / "compiled").chmod(0o777)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "compiled"))
        with pytest.warns(
            UserWarning, match=r"compiled is not used \(others can write.*set JAX_COMPILATION_CACHE_DIR to"
        ):
            device.start_jax()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "cache" / "compiled")
    finally:
        jax.config.update("jax_compilation_cache_dir", folder)


def test_a_cache_that_others_can_write_where_no_other_can_be_made_stops_nothing(
    variables, monkeypatch, tmp_path
):
    variables(THRICE_CACHE=str(tmp_path / "cache"))
    (cache_folder("native") / "planted").touch()
    (tmp_path / "cache").chmod(0o777)

    def read_only(**_: object) -> str:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(files.tempfile, "mkdtemp", read_only)
    with pytest.warns(UserWarning, match="others can write"):
        assert not [*cache_folder("native").glob("*")]
    with pytest.warns(UserWarning, match="cannot be written"):
        assert not cache_folder("native").exists()


def test_a_folder_of_compiled_programs_that_cannot_be_written(monkeypatch):
    monkeypatch.setattr(device, "write_problem", lambda folder: "Read-only file system")
    with pytest.warns(UserWarning, match=r"\(Read-only.*: set JAX_COMPILATION_CACHE_DIR to"):
        device.start_jax()


def test_a_compiled_program_cut_short_is_written_again(tmp_path):
    """A full disk ends no process, and what it cut short is not compiled at every start."""
    device.start_jax()
    before, limit = jax.config.jax_compilation_cache_dir, resource.getrlimit(resource.RLIMIT_FSIZE)

    def start() -> dict[str, int]:
        """Compiles a program as a new process would, and returns the size of each entry of the
        cache.
        """
        compilation_cache.reset_cache()
        assert int(jax.jit(lambda x: x + 1).lower(1).compile()(1)) == 2
        return {entry.name: entry.stat().st_size for entry in tmp_path.iterdir()}

    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
        [(name, size)] = start().items()
        assert size <= 100
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        [(again, size)] = start().items()
        assert again == name
        assert size > 1000
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()


def test_a_damaged_program_and_one_in_the_place_of_another_are_compiled_again(tmp_path):
    device.start_jax()
    before, draw = jax.config.jax_compilation_cache_dir, np.random.default_rng(0)
    programs = jax.jit(lambda x: x + 1), jax.jit(lambda x: x + 2)

    def start() -> list[Path]:
        """Runs the programs as a new process would, and returns their entries."""
        compilation_cache.reset_cache()
        jax.clear_caches()
        assert [int(program(1)) for program in programs] == [2, 3]
        return sorted(tmp_path.iterdir())

    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        first, second = start()
        sound = first.read_bytes()
        flips = [bytearray(sound) for _ in range(8)]
        for data, place in zip(flips, draw.integers(0, 8 * len(sound), 8)):
            data[place // 8] ^= 1 << place % 8
        for damaged in (*flips, second.read_bytes(), sound[:100], b""):
            first.write_bytes(damaged)
            start()
            assert first.read_bytes() != damaged
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()


def test_what_is_no_file_in_the_place_of_a_compiled_program_is_replaced(tmp_path, no_waiting):
    device.start_jax()
    before = jax.config.jax_compilation_cache_dir
    program = jax.jit(lambda x: x + 3)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        for kind in ("", *NO_FILES):
            for path in tmp_path.iterdir() if kind else ():
                put(path, kind)
            compilation_cache.reset_cache()
            jax.clear_caches()
            assert int(program(1)) == 4
            assert [path.is_file() and path.stat().st_size > 1000 for path in tmp_path.iterdir()] == [True], (
                kind
            )
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()


@pytest.mark.parametrize("kind", ["file", *NO_FILES])
@pytest.mark.parametrize("part", ["", "manifest.json", "data"])
def test_what_is_no_folder_or_no_file_in_the_place_of_cached_ones_is_replaced(
    tmp_path, no_waiting, kind, part
):
    """So it is with tokens, tokenizers and assets."""
    folder = tmp_path / "cached"

    def build(building: Path) -> None:
        (building / "data").write_text("built")
        write_manifest(building)

    build_once(folder, build)
    put(folder / part, kind)
    build_once(folder, build)
    assert verify(folder) == []
    assert (folder / "data").read_text() == "built"
    build_once(folder, lambda building: pytest.fail("it was built again"))
    assert [*tmp_path.iterdir()] == [folder], "nothing is left of what was there"


@pytest.mark.parametrize("way", ["writable", "owned", "damaged"])
def test_no_bytecode_is_read_from_the_cache_nor_written_there(monkeypatch, tmp_path, way):
    """Python checks neither who wrote bytecode nor what is in it: planted code runs, and a bit that
    is flipped may crash it.
    """
    planted, ran = tmp_path / "planted.py", tmp_path / "ran"
    planted.write_text(f"open({str(ran)!r}, 'w').close()\n")
    cache = tmp_path / "cache"
    bytecode = cache / "bytecode"
    monkeypatch.setattr(sys, "pycache_prefix", str(bytecode))
    for package in ("engine", "stages"):
        for source in (ROOT / package).rglob("*.py"):
            compiled = importlib.util.cache_from_source(source)
            py_compile.compile(
                str(planted), compiled, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
            )
            if way == "damaged":
                Path(compiled).write_bytes(Path(compiled).read_bytes()[:16] + bytes(16))
    cache.chmod(0o700)
    if way == "writable":
        bytecode.chmod(0o777)
    if way == "owned":
        if os.geteuid():
            pytest.skip("only root can give a folder to another user")
        os.chown(bytecode, 65534, -1)
    before = {file: file.read_bytes() for file in bytecode.rglob("*.pyc")}
    environment = os.environ | {"THRICE_CACHE": str(cache), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("PYTHONPYCACHEPREFIX", None)
    command = [sys.executable, "-m", "stages.generate", "--help"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert "--prompt" in result.stdout
    assert not ran.exists()
    assert {file: file.read_bytes() for file in bytecode.rglob("*.pyc")} == before
