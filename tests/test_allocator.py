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


def test_memory_that_is_asked_for_in_huge_pages_is_marked_so():
    done = subprocess.run([sys.executable, "-c", ASKED], capture_output=True, text=True, check=False)
    if done.returncode == 3:
        pytest.skip("this system has no glibc, or no huge pages")
    assert done.returncode == 0, done.stderr
