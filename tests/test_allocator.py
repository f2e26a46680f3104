"""The allocator's heaps, as the kernel shows them. In a process of its own: it changes the whole process."""

import subprocess
import sys

import pytest

HEAPS = """
import ctypes, sys, threading
from engine.allocator import keep_freed_memory
if not keep_freed_memory(one_arena=sys.argv[1] == "one"):
    raise SystemExit(3)
libc, together = ctypes.CDLL(None), threading.Barrier(3)
libc.malloc.restype = ctypes.c_void_p
threads = [threading.Thread(target=lambda: (together.wait(), libc.malloc(2**16), together.wait())) for _ in range(3)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout")), libc.fflush(None)
"""


@pytest.mark.parametrize("arenas", ["one", "many"])
def test_threads_share_a_heap_only_where_that_is_asked_for(arenas):
    result = subprocess.run(
        [sys.executable, "-c", HEAPS, arenas], capture_output=True, text=True, check=False
    )
    if result.returncode == 3:
        pytest.skip("this system has no glibc")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("<heap nr=") == (1 if arenas == "one" else 4)
