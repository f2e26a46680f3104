"""The kernels, built with sanitisers and called without XLA by native_driver.c: memory, undefined behaviour and threads."""

import itertools
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import pytest

from engine.model.native.library import FLAGS, FOLDER, FUNCTIONS, KERNELS, TUNING, target
from engine.processor import processor

SOURCE = Path(__file__).with_name("native_driver.c")
# What a compiler may use of this processor: all of it, or as on one without AVX-512.
FAMILIES = ["", *["-mno-avx512f"] * ("avx512f" in processor()[1].split())]


def check(folder: Path, sanitisers: str, family: str, calls: int) -> None:
    """Makes so many calls of each kernel, and again from several threads. Skips where the compiler
    has no such sanitiser.
    """
    compiler, machine = shutil.which("cc"), os.uname().machine
    if not compiler or machine not in TUNING:
        pytest.skip("no kernel can be built here")
    options = [
        compiler,
        f"-fsanitize={sanitisers}",
        "-fno-sanitize-recover=all",
        "-g",
        f"-I{jax.ffi.include_dir()}",
    ]

    def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}
        return subprocess.run(
            [*map(str, command)], capture_output=True, text=True, check=False, env=environment
        )

    def build(kernel: str) -> Path:
        library = folder / f"{kernel}.so"
        # quickly compiled
        flags = [*FLAGS, KERNELS[kernel], TUNING[machine], *family.split(), "-O1"]
        built = run(*options, *flags, FOLDER / f"{kernel}.c", "-o", library)
        assert not built.returncode, built.stderr
        return library

    driver, empty = folder / "driver", folder / "empty.c"
    empty.write_text("int main(void) { return 0; }\n")
    if run(*options, empty, "-o", driver).returncode or run(driver).returncode:
        pytest.skip(f"the compiler cannot check {sanitisers}")
    with ThreadPoolExecutor() as pool:
        libraries = [*pool.map(build, KERNELS)]
    built = run(*options, "-std=gnu11", "-pthread", SOURCE, "-o", driver, "-ldl")
    assert not built.returncode, built.stderr
    done = run(driver, 5, calls, *libraries)
    assert not done.returncode, done.stdout + done.stderr
    functions = {name for kernel in KERNELS for name in FUNCTIONS.get(kernel, (kernel,))} - {
        "empty_cache"
    }  # touches no memory
    assert {line.split()[0] for line in done.stdout.splitlines()} == {*map(target, functions)}


@pytest.mark.whole
def test_calls_from_several_threads_share_no_memory_and_have_the_same_bits(tmp_path):
    check(tmp_path, "thread", "", 5)


@pytest.mark.night
@pytest.mark.parametrize(
    ("sanitisers", "family"), list(itertools.product(["address,undefined", "thread"], FAMILIES))
)
def test_many_calls_touch_their_own_memory_and_have_the_same_bits(tmp_path, sanitisers, family):
    check(tmp_path, sanitisers, family, 300)
