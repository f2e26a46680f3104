"""Makes MKL, by which torch's wheel multiplies float32, take its fastest kernels on AMD's processors too.

MKL asks itself whether the processor is Intel's. A preloaded library that answers for it is what
PyTorch's maintainers advise: on an AMD EPYC torch's training step in float32 was 1.22 times
as fast. It changes no other type's speed, for bfloat16 goes by oneDNN.
"""

import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench.machine import read_model_numbers

ANSWER = "int mkl_serv_intel_cpu_true(void) { return 1; }\n"
ADVICE = "so MKL, and with it torch's float32, is slower than it could be: install a C compiler"


@contextlib.contextmanager
def answer_for_mkl() -> Iterator[Path | None]:
    """Yields the library to preload; None where the processor is not AMD's, and where it cannot be
    compiled, which is said.
    """
    if read_model_numbers().get("vendor_id") != "AuthenticAMD":
        yield None
        return
    compiler = shutil.which("cc")
    if compiler is None:
        print(f"There is no compiler named cc, {ADVICE}.", flush=True)
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "mkl_as_on_intel.so"
        result = subprocess.run(
            [compiler, "-shared", "-fPIC", "-o", library, "-x", "c", "-"],
            input=ANSWER,
            text=True,
            capture_output=True,
            check=False,
        )
        if result.returncode:
            print(f"{compiler} ended with {result.returncode}, {ADVICE} that works.", flush=True)
            yield None
            return
        yield library
