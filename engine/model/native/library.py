"""Builds the kernels in C for this machine, once, into the user's cache folder, and registers them with XLA: all or none.

Each file is compiled by the system's C compiler (`$CC`, cc, gcc or clang) or by that of the extra `native`. Its name in the
cache is a digest of all that it depends on, the processor's instructions among them, so that machines may share a folder.
The file ends in the SHA-256 of its name and the library: one damaged, misplaced, or that others can write is built anew.
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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jaxlib

from engine.device import processor
from engine.errors import UserError
from engine.files import cache_folder, read_checked, write_checked

FOLDER = Path(__file__).parent
# The files in C, and whether products are fused with sums: not where a row's bits must not depend on how it is compiled.
KERNELS = {
    "block_matmul": "-ffp-contract=off",
    "decode_attention": "-ffp-contract=fast",
    "adapter_matmul": "-ffp-contract=off",
    "causal_attention": "-ffp-contract=fast",
}
FUNCTIONS = {  # of files that hold others than that of their name
    "causal_attention": ("causal_attention", "causal_attention_backward", "prefill_attention"),
    "decode_attention": ("decode_attention", "empty_cache"),
}
# Without traps numbers are rounded many at once.
FLAGS = ("-std=c11", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
INSTRUCTIONS = {"x86_64": {"avx512_vnni", "avx2"}, "aarch64": {"asimddp"}}  # one of which is needed, as /proc/cpuinfo has them
TUNING = {"x86_64": "-march=native", "aarch64": "-mcpu=native"}
MAX_BYTES = 2**22  # that are read of a library in the cache; it has a few thousand
SECONDS = 300  # that a compiler may take; it takes five on an idle machine
_lock = threading.Lock()


class _Unavailable(Exception):
    """Why there is no kernel here: the end of a sentence."""


def target(kernel: str) -> str:
    """Returns a kernel's name as XLA knows it, which is that of its C function."""
    return f"thrice_{kernel}"


def native_problem() -> str:
    """Loads the kernels, building them if need be, and returns why they cannot be used; empty when they can. Remembers it."""
    with _lock:
        return _load()[0]


def native_digest() -> str:
    """Returns the SHA-256 of the kernels as built: compilers round in different places."""
    with _lock:
        return _load()[1]


@functools.cache
def _load() -> tuple[str, str]:
    try:
        with ThreadPoolExecutor() as pool:  # a compiler takes up to four seconds a kernel
            libraries = [*pool.map(read_library, KERNELS)]
        for kernel, library in zip(KERNELS, libraries):
            # The bytes that were checked, in memory: a file in the cache could be changed or cut while it is mapped, and may
            # lie where nothing can be executed. Never closed: dlopen takes a later file of the same number for this one.
            handle = os.memfd_create(kernel)
            with open(handle, "wb", closefd=False) as file:
                file.write(library)
            built = ctypes.CDLL(f"/proc/self/fd/{handle}")
            for name in FUNCTIONS.get(kernel, (kernel,)):
                jax.ffi.register_ffi_target(target(name), jax.ffi.pycapsule(getattr(built, target(name))), platform="cpu")
    except (_Unavailable, UserError, OSError, AttributeError) as error:
        return str(error), ""
    return "", hashlib.sha256(b"".join(libraries)).hexdigest()


def read_library(kernel: str) -> bytes:
    """Returns a kernel's shared library for this machine, built if need be. Raises _Unavailable or OSError."""
    machine, instructions = platform.machine(), processor()[1]
    if not INSTRUCTIONS.get(machine, set()) & {*instructions.split()}:
        raise _Unavailable("this processor is not known to multiply int8 fast")
    problem = "there is no C compiler; install one, or the extra `native`"
    source, flags = FOLDER / f"{kernel}.c", (*FLAGS, KERNELS[kernel])
    texts = [file.read_text() for file in (source, *sorted(FOLDER.glob("*.h")))]
    for compiler in _compilers():
        key = [*texts, jaxlib.__version__, *flags, machine, instructions, *compiler, *_stamp(compiler[0])]
        path = cache_folder("native") / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.so"
        if library := read_checked(path, MAX_BYTES):
            return library
        with tempfile.TemporaryDirectory() as folder:
            built = Path(folder) / "built.so"
            arguments = (*flags, TUNING[machine], f"-I{jax.ffi.include_dir()}", str(source), "-o", str(built))
            try:
                subprocess.run([*compiler, *arguments], check=True, capture_output=True, timeout=SECONDS)
            except (OSError, subprocess.SubprocessError) as error:
                said = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip()
                output = said or str(error).rpartition("]' ")[2]  # without the command, in brackets
                problem = f"{compiler[0]} failed: {output.splitlines()[0].rstrip('.')}"
                continue
            library = built.read_bytes()
            write_checked(path, library)
            return library
    raise _Unavailable(problem)


def _compilers() -> Iterator[list[str]]:
    """Yields the command of each C compiler: the user's alone if `$CC` names one."""
    names = [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]
    for name in names:
        words = shlex.split(name)
        if words and (found := shutil.which(words[0])):
            yield [found, *words[1:]]
    if importlib.util.find_spec("ziglang"):
        yield [sys.executable, "-m", "ziglang", "cc"]


def _stamp(file: str) -> tuple[str, int, int]:
    """Returns what changes when a compiler is updated."""
    with contextlib.suppress(OSError):
        status = os.stat(file)
        return os.path.realpath(file), status.st_size, status.st_mtime_ns
    return file, 0, 0
