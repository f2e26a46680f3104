"""Starts JAX: sets the device, the compilation cache, quiet logs, and glibc, which must keep freed memory.

XLA on the CPU allocates hundreds of megabytes for each step, which glibc by default returns to the
kernel at its end: a quarter of a training step was page faults (`python -m bench.step --allocator
default`). This module must load without JAX, for glibc's allocator is set before JAX starts its
threads.
"""

import contextlib
import dataclasses
import functools
import gc
import hashlib
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from engine.errors import UserError
from engine.files import cache_folder, remove, trust_problem, warn_of_cache, write_problem
from engine.format import quantity


@dataclasses.dataclass(frozen=True)
class Device:
    """The device JAX computes on. `reason` says why it is this one."""

    backend: str
    name: str
    count: int
    reason: str
    mesh: str = ""  # the devices used together, in words

    def __str__(self) -> str:
        if self.count > 1:
            share = f"1 of {self.count}; a mesh of fsdp={self.count} trains on all"
        else:
            share = ""
        notes = ", ".join(note for note in (self.mesh or share, self.reason) if note)
        return f"{self.backend.upper()}: {self.name} ({notes})"


def start_jax(
    choice: str = "auto", *, one_arena: bool = True, connect: Callable[[], None] | None = None
) -> Device:
    """Imports and starts JAX on the wanted device. Raises UserError when `choice` names one that is
    not there.

    `one_arena`: see `keep_freed_memory`. `connect` joins the other processes of a run, before there
    are devices. Compiled programs are cached in the user's cache folder, or where
    JAX_COMPILATION_CACHE_DIR says.
    """
    if choice in ("auto", "cpu"):  # an accelerator's memory is not glibc's
        keep_freed_memory(one_arena=one_arena)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA's remarks; what fails also raises
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    if choice == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    if choice == "cpu":
        jax.config.update("jax_platforms", "cpu")
    compiled = jax.config.jax_compilation_cache_dir
    if compiled and "://" not in compiled:
        folder = Path(compiled)
        problem = trust_problem(folder)
        if problem:
            warn_of_cache("JAX_COMPILATION_CACHE_DIR", folder, f"is not used ({problem})")
            compiled = ""
            os.environ["JAX_COMPILATION_CACHE_DIR"] = ""
        else:
            problem = write_problem(folder)
            if problem:  # what is there JAX reads all the same
                warn_of_cache("JAX_COMPILATION_CACHE_DIR", folder, f"cannot be written ({problem})")
    if not compiled:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # An entry that cannot be written or read costs only a compilation.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache")
    _check_entries()
    if connect:
        connect()
    try:
        backend = jax.default_backend()
    except (RuntimeError, AssertionError) as error:
        # the latter where JAX_PLATFORMS names what this JAX cannot use
        platforms = os.environ.get("JAX_PLATFORMS")
        if platforms:
            wanted = f" on JAX_PLATFORMS={platforms}; unset it, or install JAX's support for it"
        else:
            wanted = ""
        cause = f": {str(error).splitlines()[0]}" if str(error) else ""
        raise UserError(f"JAX cannot start{wanted}{cause}.") from error
    if choice not in ("auto", backend):
        raise UserError(
            f"There is no {choice.upper()} that JAX can use here, only {backend.upper()}.{_advice(choice)}"
        )
    if backend != "cpu":
        reason = "asked for"
        if choice == "auto":
            reason = "chosen by JAX"
        return Device(backend, device_name(), len(jax.local_devices()), reason)
    reason = "asked for"
    if choice == "auto":
        reason = _reason_for_cpu()
    return Device(backend, device_name(), 1, f"{quantity(cores(), 'core')}; {reason}")


@functools.cache
def _check_entries() -> None:
    """Makes JAX end each entry of the compilation cache with a SHA-256, read none that is damaged,
    and write it again.

    By itself it runs whatever it can decompress, and never writes where an entry is, even one that
    a kill cut short.
    """
    from jax._src.lru_cache import LRUCache

    get = LRUCache.get
    put = LRUCache.put

    def digest(key: str, value: bytes) -> bytes:
        return hashlib.sha256(key.encode() + value).digest()

    def get_checked(cache: LRUCache, key: str) -> bytes | None:
        if not (cache.path / f"{key}-cache").is_file():  # a pipe would be waited for
            return None
        entry = get(cache, key) or b""
        value = entry[:-32]
        if entry[-32:] == digest(key, value):
            return value
        return None

    def put_anew(cache: LRUCache, key: str, value: bytes) -> None:
        path = cache.path / f"{key}-cache"
        if "://" in str(path):  # of a bucket, which has no folders or pipes
            path.unlink(missing_ok=True)
        else:
            remove(Path(path))  # who reads it now reads on
        put(cache, key, value + digest(key, value))

    LRUCache.get = get_checked  # type: ignore[method-assign, assignment]
    LRUCache.put = put_anew  # type: ignore[method-assign, assignment]


def cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class CoreTime(NamedTuple):
    """Seconds of the cores that this process may use, summed since the machine started. `others`:
    those that others took.
    """

    total: float
    others: float


def core_time() -> CoreTime | None:
    """Returns the time of this process's cores so far, from /proc/stat; None where there is none,
    as on all but Linux.

    Others are other processes, and other virtual machines on the same processor (steal). A child of
    this process counts among the others until it has been waited for.
    """
    if not hasattr(os, "sched_getaffinity"):
        return None
    ours = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    total = 0
    busy = 0
    own = sum(os.times()[:4])
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/stat").read_text().splitlines():
            name, *fields = line.split()
            if name in ours:
                user, nice, system, idle, iowait, irq, softirq, steal = map(int, fields[:8])
                used = user + nice + system + irq + softirq + steal
                busy += used
                total += used + idle + iowait
    if not total:
        return None
    ticks = os.sysconf("SC_CLK_TCK")  # a second
    return CoreTime(total / ticks, busy / ticks - own)


def device_name() -> str:
    import jax

    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return processor()[0]
    return device.device_kind


def processor() -> tuple[str, str]:
    """Returns (model name, instruction-set flags) of the processor, by which measured ceilings are
    cached.

    The flags are empty where the system does not list them.
    """
    import platform  # like ctypes, a millisecond of --help

    facts: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            facts.setdefault(name.strip(), value.strip())
    model = facts.get("model name") or platform.processor() or platform.machine() or "unknown processor"
    return model, facts.get("flags") or facts.get("Features") or ""


def _reason_for_cpu() -> str:
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return "JAX_PLATFORMS=cpu"
    if _has_nvidia_driver():
        return f"an NVIDIA GPU is here but JAX was installed without CUDA: {_with_extra('gpu')} uses it"
    return "no accelerator found"


def _advice(choice: str) -> str:
    if os.environ.get("JAX_PLATFORMS"):
        return f" JAX_PLATFORMS={os.environ['JAX_PLATFORMS']} is set: unset it, or ask for no device."
    if choice == "gpu" and not _has_nvidia_driver():
        return " No NVIDIA driver was found either: ask for no device to compute on what there is."
    return f" Install JAX's support for it: {_with_extra(choice)}."


def _with_extra(extra: str) -> str:
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    return f"`uv run --extra {extra} python -m {spec.name if spec else 'stages.train'}`"


def _has_nvidia_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


@contextlib.contextmanager
def host_memory(wanted: bool) -> Iterator[None]:
    """Makes arrays in the host's memory within the block, if `wanted`: to `layout.place` them on a
    mesh afterwards.

    Without this thread's mesh: on one, JAX computes on all its devices, and each would get the
    whole model.
    """
    import jax

    if not wanted:
        yield
        return
    with jax.set_mesh(None), jax.default_device(jax.local_devices(backend="cpu")[0]):
        yield


_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8  # <malloc.h>
_ALIGNED = 64  # bytes, as XLA asks for its buffers


def keep_freed_memory(one_arena: bool = True) -> bool:
    """Tells glibc to keep freed memory. Call it before JAX starts its threads. Returns False where
    it is not glibc.

    `one_arena`: all threads share one heap, so that any thread reuses a step's large buffers.
    Serving has many small ones: with glibc's own arenas it decodes a fifth faster and loads
    programs in half the time.
    """
    mallopt = _glibc("mallopt")
    if mallopt is None:
        return False
    done = [mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, -1)]
    if one_arena:
        done.append(mallopt(_M_ARENA_MAX, 1))
    return all(done)


def make_room(size: int) -> None:
    """Returns freed memory to the kernel if a buffer of `size` bytes would not lie in it, but
    beside it; 0 bytes always fit.

    The hole that such a buffer left is a few bytes too small for the next one. An allocation shows
    it: the heap, `arena` of glibc's figures, grows.
    """
    import ctypes

    heap = _glibc("mallinfo2")
    if not size or heap is None:
        return
    figures = [("arena", ctypes.c_size_t), ("others", ctypes.c_size_t * 9)]
    heap.restype = type("mallinfo2", (ctypes.Structure,), {"_fields_": figures})
    block = ctypes.c_void_p()
    before = heap().arena
    refused = _glibc("posix_memalign")(ctypes.byref(block), ctypes.c_size_t(_ALIGNED), ctypes.c_size_t(size))
    grown = heap().arena > before
    _glibc("free")(block)
    if refused or grown:
        return_freed_memory()


def return_freed_memory() -> None:
    gc.collect()
    trim = _glibc("malloc_trim")
    if trim:
        trim(0)


def _glibc(function: str) -> Any:
    import ctypes  # a millisecond of --help

    if sys.platform.startswith("linux"):
        return getattr(ctypes.CDLL(None), function, None)
    return None
