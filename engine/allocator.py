"""Sets glibc's allocator to keep freed memory: without that, page faults were a quarter of a training step.

XLA on the CPU allocates hundreds of megabytes for each step, which glibc by default returns to the
kernel at the step's end (`python -m bench.step --allocator default` measures it). This module must
load without JAX, for the allocator is set before JAX starts its threads.
"""

import gc
import sys
from typing import Any

# parameters of mallopt, from <malloc.h>
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8
_ALIGNMENT = 64  # bytes, of XLA's buffers


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
    results = [mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, -1)]
    if one_arena:
        results.append(mallopt(_M_ARENA_MAX, 1))
    return all(results)  # 0 is an error


def make_room(size: int) -> None:
    """Returns freed memory to the kernel if an allocation of `size` bytes would grow the heap instead
    of reusing a hole. 0 bytes always fit.

    The hole that such a buffer left can be a few bytes too small for the next one. An allocation
    shows it: the heap, `arena` of glibc's figures, grows.
    """
    import ctypes

    read_figures = _glibc("mallinfo2")
    if not size or read_figures is None:
        return
    fields = [("arena", ctypes.c_size_t), ("others", ctypes.c_size_t * 9)]
    read_figures.restype = type("mallinfo2", (ctypes.Structure,), {"_fields_": fields})
    allocate = _glibc("posix_memalign")
    free = _glibc("free")
    block = ctypes.c_void_p()
    before = read_figures().arena
    error_code = allocate(ctypes.byref(block), ctypes.c_size_t(_ALIGNMENT), ctypes.c_size_t(size))
    after = read_figures().arena
    free(block)
    if error_code or after > before:
        return_freed_memory()


def return_freed_memory() -> None:
    """Collects garbage, and returns to the kernel what glibc's heaps do not use."""
    gc.collect()
    trim = _glibc("malloc_trim")
    if trim:
        trim(0)


def _glibc(function: str) -> Any:
    """Returns a function of the C library; None where it has none of that name, or is not Linux's."""
    import ctypes  # a millisecond of --help

    if sys.platform.startswith("linux"):
        return getattr(ctypes.CDLL(None), function, None)
    return None
