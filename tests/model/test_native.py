"""The library in C: where it is built and from where it is loaded; elsewhere a reason, and XLA's products."""

import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from engine.files import DAY
from engine.inference.config import EngineConfig
from engine.model.native import library
from engine.model.native.library import native_problem, read_library
from engine.model.paths import leaf_paths
from engine.model.weights.blocks import Blocks
from engine.processor import Processor
from engine.subprocesses import run_program
from tests.tiny import lively_params, tiny_config


@pytest.fixture(scope="module")
def kernel():
    if problem := native_problem():
        pytest.skip(f"there is no kernel here: {problem}")
    return read_library("block_matmul").data


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A cache folder in which nothing is built."""
    monkeypatch.setenv("THRICE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    load = functools.cache(library._load.__wrapped__)  # noqa: SLF001  XLA takes one library in a process
    monkeypatch.setattr(library, "_load", load)
    return monkeypatch


def uses_kernel() -> bool:
    """Whether weights that are served in 8 bits are stored as the kernel multiplies them."""
    cfg = tiny_config(dtype="bfloat16", width=64)
    params = EngineConfig(weights="int8").prepare_params(cfg, lively_params(cfg))
    return any(isinstance(leaf, Blocks) for leaf in leaf_paths(params).values())


def without_kernel(reason: str) -> None:
    """Checks the reason, and that a model is then multiplied by XLA."""
    assert reason in native_problem()
    assert not uses_kernel()


def test_eight_bits_are_stored_as_the_kernel_multiplies_them(kernel):
    assert uses_kernel()


def test_without_a_compiler(fresh, tmp_path):
    fresh.setenv("PATH", str(tmp_path))
    fresh.setattr(library.importlib.util, "find_spec", lambda name: None)
    without_kernel("there is no C compiler; install one, or the extra `native`")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ('gcc "', """CC='gcc "' is no command (No closing quotation); set it to a C compiler, or unset it"""),
        ("nosuchcc -O2", "CC='nosuchcc -O2' names no program here; set it to a C compiler, or unset it"),
        (" ", "CC=' ' names no program here"),
    ],
)
def test_a_compiler_that_cannot_be_called(fresh, value, reason):
    fresh.setenv("CC", value)
    fresh.setattr(library.importlib.util, "find_spec", lambda name: None)
    without_kernel(reason)


def make_program(path: Path, script: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


COPY = 'for out; do :; done; exec /bin/cp {} "$out"'  # a compiler that writes a file's bytes


def test_a_compiler_that_fails(fresh, tmp_path):
    broken = make_program(tmp_path / "cc", "echo no room >&2; exit 1")
    fresh.setenv("CC", f"{broken} -x")
    fresh.setattr(library.importlib.util, "find_spec", lambda name: None)
    without_kernel(f"{broken} failed: no room")
    assert not [*(tmp_path / "cache" / "native").iterdir()]


HANG = "exec /bin/sleep 60"
STOPPED = r"was stopped at \S+ \S+ because it took longer than \S+ s; it is tried again a day later, or once you delete"


def test_compilers_that_hang_are_waited_for_together_and_named_together(fresh, tmp_path):
    first, second = (make_program(tmp_path / "bin" / name, HANG) for name in ("cc", "clang"))
    (tmp_path / "bin" / "gcc").symlink_to(first)  # the same program, which is tried once
    fresh.setenv("PATH", str(tmp_path / "bin"))
    fresh.setattr(library, "SECONDS", 0.4)
    fresh.setattr(library.importlib.util, "find_spec", lambda name: None)
    begun = time.monotonic()
    problem = native_problem()
    assert time.monotonic() - begun < 30
    sentence = rf"{STOPPED} {tmp_path}/cache/native/\*\.hung"
    assert re.fullmatch(rf"{first} {sentence}; {second} {sentence}", problem)


@pytest.fixture
def compiler_calls(fresh):
    """A list that grows by one for each time a compiler is called."""
    calls = []

    def run(command, seconds, files=()):
        if "-o" in command:
            calls.append(command)
        return run_program(command, seconds, files)

    fresh.setattr(library, "run_program", run)
    return calls


def test_a_compiler_that_hangs_is_not_called_again_for_a_day(kernel, fresh, tmp_path, compiler_calls):
    """Unless the note of it is deleted, or the compiler has changed."""
    (tmp_path / "kernel.so").write_bytes(kernel)
    compiler = make_program(tmp_path / "cc", HANG)
    fresh.setenv("CC", f"{compiler}")
    fresh.setattr(library, "SECONDS", 0.4)
    fresh.setattr(library.importlib.util, "find_spec", lambda name: None)

    def start() -> str:
        """Asks for the kernel, as each start does, and returns why there is none."""
        with pytest.raises(Exception, match="took longer") as problem:
            read_library("block_matmul")
        return str(problem.value)

    problem = start()
    assert re.match(f"{compiler} {STOPPED}", problem)
    assert start() == problem
    assert len(compiler_calls) == 1
    (note,) = (tmp_path / "cache" / "native").iterdir()
    day_ago = time.time() - DAY - 1
    os.utime(note, (day_ago, day_ago))
    start()
    assert len(compiler_calls) == 2
    start()
    assert len(compiler_calls) == 2
    note.unlink()
    start()
    assert len(compiler_calls) == 3
    fresh.setattr(library, "SECONDS", 240)
    make_program(compiler, COPY.format(tmp_path / "kernel.so"))
    assert read_library("block_matmul").data == kernel


@pytest.mark.whole
def test_a_compiler_that_hangs_is_not_waited_for_again_once_another_has_built(kernel, fresh, tmp_path):
    (tmp_path / "kernel.so").write_bytes(kernel)
    make_program(tmp_path / "bin" / "cc", f"echo asked >> {tmp_path}/asked; exec /bin/sleep 60")
    make_program(tmp_path / "bin" / "gcc", COPY.format(tmp_path / "kernel.so"))
    fresh.setenv("PATH", str(tmp_path / "bin"))
    fresh.setattr(library, "SECONDS", 6)
    for _ in range(2):
        assert read_library("block_matmul").data == kernel
    assert (tmp_path / "asked").read_text() == "asked\n"


@pytest.mark.parametrize("rubbish", ["nothing", "empty", "text", "cut", "another kernel", "large"])
def test_a_compiler_that_writes_rubbish(kernel, fresh, tmp_path, rubbish):
    """With code 0: it is not kept, crashes nothing, and the next compiler is asked."""
    contents = {
        "empty": b"",
        "text": b"no room on the disk",
        "cut": kernel[: len(kernel) // 2],
        "another kernel": kernel.replace(b"thrice_block_matmul", b"thrice_other_matmul"),
        "large": kernel + bytes(library.MAX_BYTES),
    }
    written = tmp_path / "written"
    written.write_bytes(contents.get(rubbish, b""))
    (tmp_path / "kernel.so").write_bytes(kernel)
    bad = make_program(tmp_path / "bin" / "cc", "exit 0" if rubbish == "nothing" else COPY.format(written))
    fresh.setenv("PATH", str(tmp_path / "bin"))
    fresh.setattr(library.importlib.util, "find_spec", lambda name: None)
    without_kernel(f"{bad} wrote ")
    assert not [*(tmp_path / "cache" / "native").iterdir()]
    make_program(tmp_path / "bin" / "gcc", COPY.format(tmp_path / "kernel.so"))
    assert read_library("block_matmul").data == kernel
    assert len([*(tmp_path / "cache" / "native").iterdir()]) == 1


def test_another_processor(fresh):
    fresh.setattr(library, "processor", lambda: Processor("486", "fpu"))
    without_kernel("this processor is not known to multiply int8 fast")


@pytest.mark.whole
def test_it_is_built_once_for_each_processor_and_compiler(kernel, fresh, tmp_path):
    assert read_library("block_matmul").data == kernel
    fresh.setattr(library, "run_program", lambda *_: pytest.fail("it was built again"))
    assert read_library("block_matmul").data == kernel
    instructions = library.processor().instructions
    fresh.setattr(library, "processor", lambda: Processor("another", instructions + " more"))

    def compile_another(command, seconds, files=()):
        if "-o" in command:
            Path(command[-1]).write_bytes(kernel + b"more")
        return subprocess.CompletedProcess(command, 0)

    fresh.setattr(library, "run_program", compile_another)
    assert read_library("block_matmul").data == kernel + b"more"
    assert len([*(tmp_path / "cache" / "native").iterdir()]) == 2


@pytest.fixture
def cached(kernel, fresh, tmp_path):
    """The library in the cache, built by a compiler that copies the real one's, so that it is quick
    to build again.
    """
    copy = tmp_path / "copy.so"
    copy.write_bytes(kernel)
    fresh.setenv("CC", str(make_program(tmp_path / "cc", COPY.format(copy))))
    assert read_library("block_matmul").data == copy.read_bytes()
    (path,) = (tmp_path / "cache" / "native").iterdir()
    return path


def test_a_damaged_library_is_built_again(cached):
    """A bit flipped, a file cut short, one grown, an empty one, and bytes of anything."""
    intact, draw = cached.read_bytes(), np.random.default_rng(0)
    damaged = [
        b"",
        intact[:1],
        intact[: len(intact) // 2],
        intact[:-1],
        intact + b"x",
        bytes(len(intact)),
        intact[:-32],
    ]
    for place in draw.integers(0, 8 * len(intact), 32):
        flipped = bytearray(intact)
        flipped[place // 8] ^= 1 << place % 8
        damaged.append(bytes(flipped))
    for data in damaged:
        cached.write_bytes(data)
        assert read_library("block_matmul").data == intact[:-32]
        assert cached.read_bytes() == intact


def test_a_library_of_another_processor_in_its_place_is_built_again(cached, fresh, tmp_path):
    ours = cached.read_bytes()
    fresh.setattr(library, "processor", lambda: Processor("another", "avx2"))
    built = read_library("block_matmul").data
    (theirs,) = {*(tmp_path / "cache" / "native").iterdir()} - {cached}
    theirs.write_bytes(ours)
    (tmp_path / "copy.so").write_bytes(ours[:-32] + b"of that processor")
    assert (built, read_library("block_matmul").data) == (ours[:-32], ours[:-32] + b"of that processor")


def planted(path: Path, data: bytes) -> bytes:
    """A library that another user has made, its digest right."""
    return data + hashlib.sha256(path.name.encode() + data).digest()


def test_a_library_that_another_user_can_have_written_is_built_again(cached, fresh):
    intact = cached.read_bytes()
    for mode in (0o620, 0o602, 0o666):
        cached.write_bytes(planted(cached, b"evil"))
        cached.chmod(mode)
        assert read_library("block_matmul").data == intact[:-32]
        assert (cached.read_bytes(), cached.stat().st_mode & 0o777) == (intact, 0o600)
    cached.unlink()
    os.mkfifo(cached)
    assert read_library("block_matmul").data == intact[:-32]
    cached.unlink()
    (cached / "folder").mkdir(parents=True)
    assert read_library("block_matmul").data == intact[:-32]
    assert cached.read_bytes() == intact
    if os.geteuid():  # else another owner can be given
        return
    cached.write_bytes(planted(cached, b"evil"))
    os.chown(cached, 65534, -1)
    assert read_library("block_matmul").data == intact[:-32]
    assert cached.stat().st_uid == 0


@pytest.mark.parametrize("name", ["cache", "cache/native"])
@pytest.mark.parametrize("way", ["writable", "owned"])
def test_nothing_is_used_of_a_cache_that_others_can_write(cached, fresh, tmp_path, name, way):
    intact = cached.read_bytes()
    cached.write_bytes(planted(cached, b"evil"))
    if way == "writable":
        (tmp_path / name).chmod(0o770)
    elif os.geteuid() == 0:
        os.chown(tmp_path / name, 65534, -1)
    else:
        pytest.skip("only root can give a folder to another user")
    reason = (
        f"others can write to {tmp_path / name}"
        if way == "writable"
        else f"{tmp_path / name} belongs to another user"
    )
    with pytest.warns(UserWarning, match=rf"cache is not used \({reason}\).*set THRICE_CACHE") as sentences:
        assert [read_library("block_matmul").data, read_library("block_matmul").data] == [intact[:-32]] * 2
    assert len(sentences) == 1
    assert cached.read_bytes() == planted(cached, b"evil")
    assert not Path(os.environ["THRICE_CACHE"]).is_relative_to(tmp_path)


@pytest.mark.whole
def test_a_cache_from_which_nothing_can_be_executed(kernel, tmp_path):
    """As /home is on some machines, and /dev/shm in a container, where a read-only one has its
    cache (S13).
    """
    (tmp_path / "cache").mkdir()
    mount = [
        "unshare",
        "-Urm",
        "sh",
        "-c",
        f'mount -t tmpfs -o noexec,mode=700 tmpfs {tmp_path}/cache && exec "$@"',
        "sh",
    ]
    if not shutil.which("unshare") or subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("a user may mount nothing here")
    ask = "from engine.model.native.library import native_problem; print([native_problem()])"
    environment = os.environ | {"THRICE_CACHE": f"{tmp_path}/cache"}
    environment.pop("CC", None)
    command = [*mount, sys.executable, "-c", ask]
    assert subprocess.run(command, env=environment, capture_output=True, text=True).stdout == "['']\n"
