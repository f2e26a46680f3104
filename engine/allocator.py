"""Keeps memory that XLA frees, so that the next step finds it mapped.

XLA on the CPU takes one temporary buffer for a whole step, hundreds of megabytes, and returns it at the end. glibc hands
so large a block straight back to the kernel, and the next step pays for every page again: a quarter of a training
step was page faults (`python -m bench.training --allocator default` shows it).
"""

import ctypes
import gc
import sys

# <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_ALIGNED = 64  # bytes, as XLA asks for its buffers


def keep_freed_memory(one_arena: bool = True) -> bool:
    """Tells glibc to keep what is freed. Call it before JAX starts its threads. False where it is not glibc.

    The process then holds on to its peak, which training reaches at every step anyway. `one_arena`: all threads share
    one heap, so that a step's large buffers are found again whichever thread asks. Serving has none so large but many
    small ones, over which threads would wait for one another: it decodes a fifth faster, and reads compiled programs
    back in half the time, with the arenas that glibc would make.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    arenas = [mallopt(_M_ARENA_MAX, 1)] if one_arena else []
    return all([*arenas, mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, -1)])


class _Mallinfo2(ctypes.Structure):
    """What glibc says of its heap; `arena` is how large it is."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    )


def has_room(size: int) -> bool:
    """Whether a buffer of so many bytes fits into what was freed, by trying; True where it is not glibc.

    A buffer that was freed below something else is no room for its like, for glibc wants a few bytes more than it had:
    the next one then lies beside it, and both are held.
    """
    libc = ctypes.CDLL(None)
    ask = getattr(libc, "mallinfo2", None) if sys.platform.startswith("linux") else None
    if ask is None:
        return True
    ask.restype = _Mallinfo2
    libc.free.argtypes = [ctypes.c_void_p]
    place = ctypes.c_void_p()
    before = ask().arena
    if libc.posix_memalign(ctypes.byref(place), ctypes.c_size_t(_ALIGNED), ctypes.c_size_t(size)):
        return False
    grown = ask().arena > before
    libc.free(place)
    return not grown


def return_freed_memory() -> None:
    """Gives what is free at this moment back to the kernel: what loading and compiling took, which no step takes again."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(0)
