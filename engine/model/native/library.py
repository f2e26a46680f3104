"""Builds the kernels in C for this machine, once, into the user's cache folder, and registers them with XLA: all or none.

Each file is compiled by the system's C compiler (`$CC`, cc, gcc or clang) or by that of the extra
`native`. Its name in the cache is a digest of all that it depends on, the processor's instructions
among them, so that machines may share a folder. The file ends in the SHA-256 of its name and the
library: one damaged, misplaced, or that others can write is built anew. A library is kept only if
it loads and holds the kernel's functions. Where a compiler hung, a note of it (`.hung`) lies beside
the library's place, and for a day the compiler is not asked again.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jaxlib

from engine.errors import UserError
from engine.files import DAY, cache_folder, read_checked, read_limited, write_checked
from engine.processor import processor
from engine.subprocesses import run_program

FOLDER = Path(__file__).parent
# The files in C, and whether products are fused with sums: not where a row's bits must not depend
# on how it is compiled.
KERNELS = {
    "block_matmul": "-ffp-contract=off",
    "decode_attention": "-ffp-contract=fast",
    "adapter_matmul": "-ffp-contract=off",
    "causal_attention": "-ffp-contract=fast",
}
# The functions of files that hold others than that of their name.
FUNCTIONS = {
    "causal_attention": ("causal_attention", "causal_attention_backward", "prefill_attention"),
    "decode_attention": ("decode_attention", "empty_cache"),
}
# Without traps numbers are rounded many at once.
FLAGS = ("-std=c11", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
# One of these is needed, as /proc/cpuinfo has them.
INSTRUCTIONS = {"x86_64": {"avx512_vnni", "avx2"}, "aarch64": {"asimddp"}}
TUNING = {"x86_64": "-march=native", "aarch64": "-mcpu=native"}
MAX_BYTES = 2**22  # that are read of a library; it has some 80 thousand
# The time that all compilers together may take. One that hangs takes its share of what is left, and
# the next has its own. The four kernels are 13 s of work and are compiled at once. On two cores
# that took 36 s at a load of 5, 55 s at 15, and 139 s at 12 and `nice -n 10`. A compiler that is
# only slow must not be taken for one that hangs, for then it is not asked again for a day.
SECONDS = 240
HUNG = ".hung"  # the end of the name of a note that a compiler hung
# Loads the library at `path` and looks for its `functions`: in a process of its own, which a
# damaged library may crash.
CHECK = """
import ctypes
try:
    library = ctypes.CDLL({path!r})
    for name in {functions!r}:
        getattr(library, name)
except (OSError, AttributeError) as error:
    raise SystemExit(str(error).removeprefix({path!r} + ": "))
"""
_lock = threading.Lock()


class _Unavailable(Exception):
    """Why there is no kernel here: the end of a sentence."""


class Library(NamedTuple):
    """A kernel's shared library: its bytes, and as dlopen gives it."""

    data: bytes
    shared_object: ctypes.CDLL


class LoadResult(NamedTuple):
    """What came of loading the kernels: why they cannot be used, empty when they can; and the SHA-256
    of their libraries, empty when they cannot.
    """

    problem: str
    digest: str


class Candidate(NamedTuple):
    """A compiler's command, and the path in the cache of the library that it builds."""

    compiler: list[str]
    path: Path


def target(kernel: str) -> str:
    """Returns a kernel's name as XLA knows it, which is that of its C function."""
    return f"thrice_{kernel}"


def native_problem() -> str:
    """Loads the kernels, building them if need be, and returns why they cannot be used; empty when
    they can. Remembers it.
    """
    with _lock:
        return _load().problem


def native_digest() -> str:
    """Returns the SHA-256 of the kernels as built: compilers round in different places."""
    with _lock:
        return _load().digest


@functools.cache
def _load() -> LoadResult:
    try:
        with ThreadPoolExecutor() as pool:  # a compiler takes up to four seconds a kernel
            libraries = [*pool.map(read_library, KERNELS)]
        for kernel, library in zip(KERNELS, libraries):
            for name in _functions(kernel):
                jax.ffi.register_ffi_target(
                    name, jax.ffi.pycapsule(getattr(library.shared_object, name)), platform="cpu"
                )
    except (_Unavailable, UserError, OSError, AttributeError) as error:
        return LoadResult(problem=str(error), digest="")
    digest = hashlib.sha256(b"".join(library.data for library in libraries)).hexdigest()
    return LoadResult(problem="", digest=digest)


def _functions(kernel: str) -> list[str]:
    """Lists the C functions of a kernel's file."""
    return [target(name) for name in FUNCTIONS.get(kernel, (kernel,))]


def read_library(kernel: str) -> Library:
    """Returns a kernel's library for this machine, built if need be. Raises _Unavailable or OSError."""
    instructions = processor().instructions
    if not INSTRUCTIONS.get(platform.machine(), set()) & {*instructions.split()}:
        raise _Unavailable("this processor is not known to multiply int8 fast")
    files = (FOLDER / f"{kernel}.c", *sorted(FOLDER.glob("*.h")))
    sources = {file.name: file.read_bytes() for file in files}
    candidates = _list_candidates(kernel, sources, instructions)
    library = _load_cached(kernel, candidates)
    if library is None:
        library = _build(kernel, candidates, sources)
    return library


def _list_candidates(kernel: str, sources: dict[str, bytes], instructions: str) -> list[Candidate]:
    """Lists the libraries that compilers here would build, in the order in which they are tried. Each
    is named by a digest of all that it depends on.
    """
    candidates = []
    for compiler in _compilers():
        key = [
            *sources.values(),
            jaxlib.__version__,
            *_flags(kernel),
            platform.machine(),
            instructions,
            *compiler,
            *_stamp(compiler[0]),
        ]
        name = hashlib.sha256(repr(key).encode()).hexdigest()[:32]
        candidates.append(Candidate(compiler, cache_folder("native") / f"{name}.so"))
    return candidates


def _flags(kernel: str) -> tuple[str, ...]:
    return (*FLAGS, KERNELS[kernel])


def _load_cached(kernel: str, candidates: list[Candidate]) -> Library | None:
    """Returns the first of the candidates that is in the cache, intact, and loads here; else None."""
    for candidate in candidates:
        data = read_checked(candidate.path, MAX_BYTES)
        if data:
            # A machine that shares the folder may have built it for a newer C library.
            with contextlib.suppress(OSError, AttributeError):
                return _load_library(kernel, data)
    return None


def _build(kernel: str, candidates: list[Candidate], sources: dict[str, bytes]) -> Library:
    """Builds the first of the candidates that can be built, stores it in the cache and returns it.

    Raises _Unavailable, with a reason for each compiler, when none can be built within SECONDS.
    """
    end = time.monotonic() + SECONDS
    problems = []
    for index, candidate in enumerate(candidates):
        hang = _read_hang(candidate.path)
        if hang:
            problems.append(hang)
            continue
        now = time.monotonic()
        share = (end - now) / (len(candidates) - index)
        tuning = TUNING[platform.machine()]
        command = [*candidate.compiler, *_flags(kernel), tuning, f"-I{jax.ffi.include_dir()}"]
        try:
            data = _compile(kernel, command, sources, deadline=now + share)
        except subprocess.TimeoutExpired:
            problems.append(_note_hang(candidate, share))
            continue
        except _Unavailable as problem:
            problems.append(str(problem))
            continue
        with contextlib.suppress(OSError):  # then the next start builds it again
            write_checked(candidate.path, data)
        return _load_library(kernel, data)
    raise _Unavailable("; ".join(problems))


def _note_hang(candidate: Candidate, seconds: float) -> str:
    """Writes beside the library's path that its compiler hung, and returns the sentence."""
    hour = time.strftime("%Y-%m-%d %H:%M")
    path = candidate.path
    compiler = shlex.join(candidate.compiler)
    sentence = (
        f"{compiler} was stopped at {hour} because it took longer than {seconds:.3g} s; "
        f"it is tried again a day later, or once you delete {path.parent}/*{HUNG}"
    )
    with contextlib.suppress(OSError):  # then the next start waits for it again
        write_checked(path.with_suffix(HUNG), sentence.encode())
    return sentence


def _read_hang(path: Path) -> str:
    """Returns what `_note_hang` wrote beside the library's `path` less than a day ago; else nothing."""
    note = path.with_suffix(HUNG)
    sentence = read_checked(note, MAX_BYTES).decode()
    if not sentence:
        return ""
    age = time.time() - note.stat().st_mtime
    if 0 <= age < DAY:
        return sentence
    return ""


def _compile(kernel: str, command: list[str], sources: dict[str, bytes], deadline: float) -> bytes:
    """Compiles the sources and returns the library. They are those whose digest names it: a file
    may have been edited since.

    Raises _Unavailable when the compiler fails or writes no library that loads, and
    subprocess.TimeoutExpired when it is not done at the `deadline` (of time.monotonic).
    """
    # What is left of a compiler may still write into the folder while it is removed.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for name, text in sources.items():
            Path(folder, name).write_bytes(text)
        built = Path(folder, "built.so")
        problem = _run([*command, f"{folder}/{kernel}.c", "-o", str(built)], deadline)
        if problem:
            raise _Unavailable(f"{command[0]} failed: {problem}")
        try:
            library = read_limited(built, MAX_BYTES)
        except (OSError, UserError):
            raise _Unavailable(f"{command[0]} wrote no library of at most {MAX_BYTES:,} bytes") from None
    handle = _open_in_memory(kernel, library)
    try:
        check = CHECK.format(path=f"/proc/self/fd/{handle}", functions=_functions(kernel))
        problem = _run([sys.executable, "-I", "-S", "-c", check], deadline, handle)
    finally:
        os.close(handle)
    if problem:
        raise _Unavailable(f"{command[0]} wrote a library that does not load: {problem}")
    return library


def _run(command: list[str], deadline: float, *files: int) -> str:
    """Runs a program that inherits the open `files`, and returns why it failed; empty when it did not."""
    seconds = max(deadline - time.monotonic(), 0)
    try:
        ended = run_program(command, seconds, files)
    except OSError as error:
        return error.strerror or str(error)
    if not ended.returncode:
        return ""
    lines = ended.stderr.decode(errors="replace").strip().splitlines()
    if lines:
        return lines[0].rstrip(".")
    return f"it ended with code {ended.returncode}"


def _load_library(kernel: str, data: bytes) -> Library:
    """Loads a library. Raises OSError when it does not load here, and AttributeError when it lacks
    a function.

    It is loaded from memory, as the bytes that were checked: a file in the cache could be changed
    or cut while it is mapped, and may lie where nothing can be executed. The file in memory stays
    open, because dlopen would take a later one with its number for the same library.
    """
    handle = _open_in_memory(kernel, data)
    shared_object = ctypes.CDLL(f"/proc/self/fd/{handle}")
    for name in _functions(kernel):
        getattr(shared_object, name)
    return Library(data, shared_object)


def _open_in_memory(kernel: str, data: bytes) -> int:
    """Returns the number of an open file in memory that holds the data."""
    handle = os.memfd_create(kernel)
    with open(handle, "wb", closefd=False) as file:
        file.write(data)
    return handle


def _compilers() -> list[list[str]]:
    """Lists the command of each C compiler, once: `$CC` if it is set, else cc, gcc and clang; then
    that of the extra `native`.

    Raises _Unavailable when there is none.
    """
    chosen = os.environ.get("CC")
    problem = "there is no C compiler; install one, or the extra `native`"
    choices = [["cc"], ["gcc"], ["clang"]]
    if chosen:
        problem = f"CC={shlex.quote(chosen)} names no program here; set it to a C compiler, or unset it"
        try:
            choices = [shlex.split(chosen)]
        except ValueError as error:
            problem = f"CC={shlex.quote(chosen)} is no command ({error}); set it to a C compiler, or unset it"
            choices = []
    commands: dict[str, list[str]] = {}
    for words in choices:
        program = None
        if words:
            program = shutil.which(words[0])
        if program:
            commands.setdefault(os.path.realpath(program), [program, *words[1:]])
    if importlib.util.find_spec("ziglang"):
        commands["ziglang"] = [sys.executable, "-m", "ziglang", "cc"]
    if not commands:
        raise _Unavailable(problem)
    return [*commands.values()]


def _stamp(file: str) -> tuple[str, int, int]:
    """Returns what changes when a compiler is updated: its real path, size in bytes, and time in ns."""
    with contextlib.suppress(OSError):
        status = os.stat(file)
        return os.path.realpath(file), status.st_size, status.st_mtime_ns
    return file, 0, 0
