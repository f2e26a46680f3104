"""Makes glibc keep memory that XLA frees mapped, for the next step.

XLA on the CPU allocates hundreds of megabytes for each step and frees them at its end. By default glibc returns so large a
block to the kernel: a quarter of a training step was page faults (`python -m bench.step --allocator default`).
"""

import ctypes
import gc
import sys
from typing import Any

# <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_ALIGNED = 64  # bytes, as XLA asks for its buffers


def keep_freed_memory(one_arena: bool = True) -> bool:
    """Tells glibc to keep freed memory. Call it before JAX starts its threads. Returns False where it is not glibc.

    `one_arena`: all threads share one heap, so that any thread reuses a step's large buffers. Serving has many small
    buffers: with glibc's own arenas threads do not wait for one another, it decodes a fifth faster and loads compiled
    programs in half the time.
    """
    mallopt = _glibc("mallopt")
    if mallopt is None:
        return False
    arenas = [mallopt(_M_ARENA_MAX, 1)] if one_arena else []
    return all([*arenas, mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, -1)])


class _Mallinfo2(ctypes.Structure):
    """glibc's figures on its heap; `arena` is the heap's size."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    )


def make_room(size: int) -> None:
    """Returns freed memory to the kernel if a buffer of `size` bytes would not lie in it, but beside it; 0 bytes always fit.

    The hole that such a buffer left below other memory is too small: glibc needs a few bytes more, and would place the
    next one beside it.
    """
    if size and not _fits_freed_memory(size):
        return_freed_memory()


def _fits_freed_memory(size: int) -> bool:
    """Tries an allocation of `size` bytes and returns whether the heap stays as large; True where it is not glibc."""
    heap = _glibc("mallinfo2")
    if heap is None:
        return True
    heap.restype = _Mallinfo2
    libc = ctypes.CDLL(None)
    libc.free.argtypes = [ctypes.c_void_p]
    place = ctypes.c_void_p()
    before = heap().arena
    if libc.posix_memalign(ctypes.byref(place), ctypes.c_size_t(_ALIGNED), ctypes.c_size_t(size)):
        return False
    grown = heap().arena > before
    libc.free(place)
    return not grown


def return_freed_memory() -> None:
    """Returns to the kernel what loading and compiling have freed, for no step uses it again."""
    gc.collect()
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _glibc(function: str) -> Any:
    return getattr(ctypes.CDLL(None), function, None) if sys.platform.startswith("linux") else None
