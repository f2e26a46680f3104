"""Starts JAX: sets the device, the compilation cache and quiet logs.

This module must load without JAX, for glibc's allocator is set before JAX starts its threads.
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from engine.allocator import keep_freed_memory
from engine.errors import UserError
from engine.files import (
    SHA256_BYTES,
    cache_folder,
    remove,
    trust_problem,
    warn_of_cache,
    write_problem,
)
from engine.format import quantity
from engine.processor import cores, processor


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
    _set_compilation_cache()
    if connect:
        connect()
    backend = _start_backend()
    if choice not in ("auto", backend):
        raise UserError(
            f"There is no {choice.upper()} that JAX can use here, only {backend.upper()}.{_advice(choice)}"
        )
    if choice != "auto":
        reason = "asked for"
    elif backend == "cpu":
        reason = _reason_for_cpu()
    else:
        reason = "chosen by JAX"
    if backend == "cpu":
        return Device(backend, device_name(), 1, f"{quantity(cores(), 'core')}; {reason}")
    return Device(backend, device_name(), len(jax.local_devices()), reason)


def _set_compilation_cache() -> None:
    """Makes JAX store every compiled program, in the user's cache folder unless
    JAX_COMPILATION_CACHE_DIR names another that can be trusted.
    """
    import jax

    chosen = jax.config.jax_compilation_cache_dir
    is_bucket = chosen and "://" in chosen
    if chosen and not is_bucket and not _is_trusted(Path(chosen)):
        chosen = ""
        os.environ["JAX_COMPILATION_CACHE_DIR"] = ""
    if not chosen:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # An entry that cannot be written or read costs only a compilation.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache")
    _seal_cache_entries()


def _is_trusted(folder: Path) -> bool:
    """Returns whether programs from JAX_COMPILATION_CACHE_DIR may be run. Warns when they may not, or
    when none can be written there.
    """
    problem = trust_problem(folder)
    if problem:
        warn_of_cache("JAX_COMPILATION_CACHE_DIR", folder, f"is not used ({problem})")
        return False
    problem = write_problem(folder)
    if problem:  # JAX still reads entries from a folder that it cannot write
        warn_of_cache("JAX_COMPILATION_CACHE_DIR", folder, f"cannot be written ({problem})")
    return True


def _start_backend() -> str:
    """Returns the name of the backend that JAX chooses. Raises UserError when it can start none."""
    import jax

    try:
        return jax.default_backend()
    except (RuntimeError, AssertionError) as error:
        # the latter where JAX_PLATFORMS names what this JAX cannot use
        platforms = os.environ.get("JAX_PLATFORMS")
        hint = ""
        if platforms:
            hint = f" on JAX_PLATFORMS={platforms}; unset it, or install JAX's support for it"
        cause = ""
        if str(error):
            cause = f": {str(error).splitlines()[0]}"
        raise UserError(f"JAX cannot start{hint}{cause}.") from error


@functools.cache
def _seal_cache_entries() -> None:
    """Makes JAX end each entry of the compilation cache with a SHA-256, read none that is damaged,
    and write it again.

    By itself it runs whatever it can decompress, and never writes where an entry is, even one that
    a kill cut short.
    """
    from jax._src.lru_cache import LRUCache

    get = LRUCache.get
    put = LRUCache.put

    def is_in_bucket(path: os.PathLike[str]) -> bool:
        return "://" in str(path)

    def digest(key: str, value: bytes) -> bytes:
        return hashlib.sha256(key.encode() + value).digest()

    def get_checked(cache: LRUCache, key: str) -> bytes | None:
        path = cache.path / f"{key}-cache"
        # a pipe would be waited for, and etils' is_file takes one for a file
        if not is_in_bucket(path) and not os.path.isfile(path):
            return None
        entry = get(cache, key) or b""
        value = entry[:-SHA256_BYTES]
        if entry[-SHA256_BYTES:] == digest(key, value):
            return value
        return None

    def put_anew(cache: LRUCache, key: str, value: bytes) -> None:
        path = cache.path / f"{key}-cache"
        if is_in_bucket(path):  # which has no folders or pipes
            path.unlink(missing_ok=True)
        else:
            remove(Path(path))  # who reads it now reads on
        put(cache, key, value + digest(key, value))

    LRUCache.get = get_checked  # type: ignore[method-assign, assignment]
    LRUCache.put = put_anew  # type: ignore[method-assign, assignment]


def device_name() -> str:
    import jax

    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return processor().model
    return device.device_kind


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
