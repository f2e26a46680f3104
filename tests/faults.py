"""Processes that end, or are refused, at a chosen change on disk: see faults.c."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

ENDED = 77  # the exit code of a process that faults.c ended


def build(folder: Path) -> Path:
    """Compiles faults.c; the library is to be in LD_PRELOAD and in FAULTS."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    assert compiler, "Faults are injected by a library in C: install a C compiler."
    source, library = Path(__file__).with_suffix(".c"), folder / "faults.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", source, "-o", library, "-ldl"], check=True)
    return library


def arm(below: Path | str, at: int, error: int = 0, once: bool = False, log: Path | str = "") -> None:
    """At change `at` below a folder, ends this process if `error` is 0, else refuses it, `once` or
    from there on.
    """
    library = ctypes.CDLL(os.environ["FAULTS"])
    library.fault_arm(f"{below}/".encode(), ctypes.c_long(at), error, int(once), str(log).encode())
