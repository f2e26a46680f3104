"""What the allocator is asked for, seen from the kernel's side. In a process of its own: it changes the whole process."""

import subprocess
import sys

import pytest

ASKED = """
from engine.allocator import keep_freed_memory, prefer_huge_pages
import numpy as np
if not (keep_freed_memory() and prefer_huge_pages(2**28)):
    raise SystemExit(3)
held = np.ones(2**26, np.uint8)
advised = [line for line in open("/proc/self/smaps") if line.startswith("VmFlags") and " hg" in line]
raise SystemExit(0 if advised else 1)
"""

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


def test_memory_that_is_asked_for_in_huge_pages_is_marked_so():
    done = subprocess.run([sys.executable, "-c", ASKED], capture_output=True, text=True, check=False)
    if done.returncode == 3:
        pytest.skip("this system has no glibc, or no huge pages")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arenas", ["one", "many"])
def test_threads_share_a_heap_only_where_that_is_asked_for(arenas):
    done = subprocess.run([sys.executable, "-c", HEAPS, arenas], capture_output=True, text=True, check=False)
    if done.returncode == 3:
        pytest.skip("this system has no glibc")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("<heap nr=") == (1 if arenas == "one" else 4)
