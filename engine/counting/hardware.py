"""Measures this machine through JAX: its best FLOP/s and bytes/s, and its memory. Holds their clock.

Products are square with row-major operands, the only ones that XLA on a CPU passes to its fast
kernels.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engine.device import device_name
from engine.errors import UserError
from engine.files import cache_folder, read_limited, write_cached_json
from engine.format import format_bytes
from engine.processor import cores, processor

_CPU_SIDE = 2048  # of the matrices
_CPU_NUMBERS = 2**26  # float32: 256 MiB, beyond the caches
_ACCELERATOR_NUMBERS = 2**28
_MIN_ROUNDS = 3
_MAX_ROUNDS = 12
_SECONDS = 2.0  # after which no round begins beyond the fewest
BUSY = 0.25  # threads that want a core, from which on a measured ceiling may be too low
MAX_BYTES = 2**16  # that are read of the saved ceilings, which have a few hundred
PLAUSIBLE = 0.9  # of a ceiling, at most, for a training step
_RATE_OF_DTYPE = {"bfloat16": "bf16_gflops", "float32": "f32_gflops", "int8": "int8_gflops"}
RATES = (*_RATE_OF_DTYPE.values(), "read_gbs", "update_gbs")

MEASURE_PROGRAM = (
    "from engine.allocator import keep_freed_memory; keep_freed_memory(); "
    "import dataclasses, json; "
    "from engine.counting.hardware import measure_ceilings; "
    "print(json.dumps(dataclasses.asdict(measure_ceilings())))"
)

clock = time.perf_counter


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """The best rates seen on this machine, in units of 10^9; 0 where the backend refuses the
    operation.

    Products are n x n x n, n = 2048 on a CPU, 8192 on an accelerator; `f32` at JAX's default
    precision (TF32 on recent GPUs), `int8` with int32 results. `read_gbs` sums a large array, as
    decoding reads weights; `update_gbs` scales it in place, as an optimizer does, counting read and
    write.
    """

    device: str
    backend: str
    cores: int
    jax: str
    bf16_gflops: float
    f32_gflops: float
    int8_gflops: float
    read_gbs: float
    update_gbs: float

    def peak_flops(self, dtype: str) -> float:
        return 1e9 * getattr(self, _RATE_OF_DTYPE[dtype])


def machine_identity() -> dict[str, Any]:
    """Returns all that ceilings, and the last bits of results, depend on: another machine may use
    the same cache folder.
    """
    model, flags = processor()
    device = jax.local_devices()[0]
    return {
        "processor": model,
        "flags": hashlib.sha256(flags.encode()).hexdigest(),
        "cores": cores(),
        "backend": device.platform,
        "kind": device.device_kind,
        "jax": jax.__version__,
    }


def measure_ceilings(report: Callable[[int, int], None] | None = None) -> Ceilings:
    """Measures all five rates in two to five seconds: the best of interleaved rounds. `report(done,
    total)` counts rounds.
    """
    device = jax.local_devices()[0]
    numbers = _ACCELERATOR_NUMBERS
    if device.platform == "cpu":
        numbers = _CPU_NUMBERS
    programs: dict[str, Callable[[], Any]] = {}
    work = {"read_gbs": 4.0 * numbers, "update_gbs": 8.0 * numbers}  # FLOPs or bytes of one call
    for dtype, rate in _RATE_OF_DTYPE.items():
        programs[rate], work[rate] = square_product(dtype)
    programs |= _streams(numbers)
    rates = dict.fromkeys(RATES, 0.0)
    for rate, seconds in _time_programs(programs, report).items():
        rates[rate] = work[rate] / seconds / 1e9
    return Ceilings(device_name(), device.platform, cores(), jax.__version__, **rates)


def _time_programs(
    programs: dict[str, Callable[[], Any]], report: Callable[[int, int], None] | None
) -> dict[str, float]:
    """Returns the least seconds of a call of each program, of interleaved rounds; none of a program
    that the backend refuses.
    """
    best = {}
    for name, program in programs.items():
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            jax.block_until_ready(program())
            best[name] = math.inf
    start = clock()
    for rounds in range(1, _MAX_ROUNDS + 1):
        for name in best:
            begin = clock()
            jax.block_until_ready(programs[name]())
            best[name] = min(best[name], clock() - begin)
        if report:
            report(rounds, _MAX_ROUNDS)
        if rounds >= _MIN_ROUNDS and clock() - start > _SECONDS:
            break
    return best


def measure_apart() -> Ceilings | None:
    """Measures the rates in a process of its own, whose arrays are not this one's memory. Returns
    None where that fails.
    """
    command = [sys.executable, "-c", MEASURE_PROGRAM]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    with contextlib.suppress(ValueError, TypeError):
        return Ceilings(**json.loads(result.stdout))
    return None


def square_product(dtype: str) -> tuple[Callable[[], Any], float]:
    """Returns (call, FLOPs) of square products in `dtype`, as many as hide an accelerator's launch."""
    side = 8192
    calls = 16
    if jax.local_devices()[0].platform == "cpu":
        side = _CPU_SIDE
        calls = 1
    # Random numbers, repeated to size: on zeros or ones a chip may save power and look faster.
    tile = np.random.default_rng(0).standard_normal((512, 512))
    if dtype == "int8":
        tile = (32 * tile).clip(-127, 126)
    left = jnp.asarray(np.tile(tile, (side // 512, side // 512)), dtype)
    right = left + jnp.ones((), dtype)
    result_dtype = dtype
    if dtype == "int8":
        result_dtype = "int32"
    multiply = jax.jit(functools.partial(jnp.dot, preferred_element_type=result_dtype))

    def call() -> Any:
        return [multiply(left, right) for _ in range(calls)]

    return call, calls * 2.0 * side**3


def _streams(numbers: int) -> dict[str, Callable[[], Any]]:
    """Returns the calls that read, and that update, an array of so many float32 numbers."""
    array = jnp.ones((numbers // 1024, 1024), jnp.float32)
    # In blocks: one core would sum a grand total.
    total = jax.jit(lambda x: x.reshape(64, -1).sum(1))
    scale = jax.jit(lambda x: x * 0.5 + 0.5, donate_argnums=0)

    def update() -> Any:
        nonlocal array
        array = scale(array)
        return array

    return {"read_gbs": lambda: total(array), "update_gbs": update}


def best_ceilings(first: Ceilings, second: Ceilings) -> Ceilings:
    """Returns the higher of each rate."""
    best = {rate: max(getattr(first, rate), getattr(second, rate)) for rate in RATES}
    return dataclasses.replace(first, **best)


def saved_ceilings() -> Ceilings | None:
    """Returns this machine's ceilings from the cache; None where they are to be measured: there are
    none, or the machine was busy then, and at least twice as busy as now.
    """
    ceilings, load = _read_ceilings()
    if load > BUSY and 2 * _load() <= load:
        return None
    return ceilings


def save_ceilings(ceilings: Ceilings) -> Ceilings:
    """Saves the higher of these rates and those saved before, with the load of the machine; returns them."""
    saved, load = _read_ceilings()
    if saved:
        ceilings = best_ceilings(saved, ceilings)
    _write_ceilings(ceilings, min(load, _load()))
    return ceilings


def doubt_ceilings(share: float) -> None:
    """Has this machine's ceilings measured again when a training step reached more than PLAUSIBLE
    of one of them.
    """
    ceilings, _ = _read_ceilings()
    if ceilings and share > PLAUSIBLE:
        _write_ceilings(ceilings, sys.float_info.max)


def _load() -> float:
    """Returns how many threads want each core: the machine's mean of the last minute."""
    return os.getloadavg()[0] / cores()


def _read_ceilings() -> tuple[Ceilings | None, float]:
    """Returns the saved ceilings and the load of the machine when they were measured; None and the
    largest number where there are none.
    """
    with contextlib.suppress(
        OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError
    ):
        saved = json.loads(read_limited(_ceilings_file(), MAX_BYTES))
        load = float(saved.pop("load"))
        ceilings = Ceilings(**saved)
        numbers = [load, *(getattr(ceilings, rate) for rate in RATES)]
        if all(math.isfinite(number) and number >= 0 for number in numbers):
            return ceilings, load
    return None, sys.float_info.max


def _write_ceilings(ceilings: Ceilings, load: float) -> None:
    with contextlib.suppress(OSError):
        write_cached_json(_ceilings_file(), dataclasses.asdict(ceilings) | {"load": load})


def _ceilings_file() -> Path:
    identity = json.dumps(machine_identity(), sort_keys=True).encode()
    return cache_folder("hardware") / f"{hashlib.sha256(identity).hexdigest()[:16]}.json"


def _proc_bytes(file: str, name: str) -> int | None:
    """Returns the bytes of a line `name: ... kB` of a file in /proc; None elsewhere than on Linux."""
    with contextlib.suppress(OSError):
        match = re.search(rf"^{name}:\s+(\d+)", Path("/proc", file).read_text(), re.MULTILINE)
        if match:
            return int(match[1]) * 1024
    return None


def peak_rss_bytes() -> int:
    """Returns the most memory that this process has had."""
    # on Linux getrusage also counts the parent's peak; this file does not
    peak = _proc_bytes("self/status", "VmHWM")
    if peak:
        return peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":
        return peak
    return peak * 1024


def memory_limit_bytes(root: Path = Path("/")) -> int:
    """Returns the host memory this process may use: the machine's, or less in a control group.
    `root` holds /proc and /sys.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, place = line.split(":", 2)
            if not controllers:
                top = root / "sys/fs/cgroup"
                file = "memory.max"
            elif "memory" in controllers.split(","):
                top = root / "sys/fs/cgroup/memory"
                file = "memory.limit_in_bytes"
            else:
                continue
            # Every group around a group binds it. In a container the path may be the host's, with
            # the limit at the top.
            folder = top / place.strip("/")
            for group in [folder, *folder.parents]:
                with contextlib.suppress(OSError, ValueError):  # absent, or "max"
                    limits.append(int((group / file).read_text()))
                if group == top:
                    break
    return min(limits)


def free_memory_bytes() -> int:
    """Returns the bytes that new arrays can take: of the accelerator, or of the host."""
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return free_host_bytes()


def free_host_bytes() -> int:
    limit = memory_limit_bytes()
    return min(limit, _proc_bytes("meminfo", "MemAvailable") or limit)


def device_memory_bytes() -> int:
    stats = jax.local_devices()[0].memory_stats()  # None on a CPU
    return (stats or {}).get("bytes_limit") or memory_limit_bytes()


def require_memory(
    needed: int, what: str, remedy: str, *, detail: str = "", limit: int | None = None
) -> None:
    """Raises UserError when more bytes are needed than `limit`, by default the memory this process
    may use.
    """
    if limit is None:
        limit = memory_limit_bytes()
    if needed > limit:
        raise UserError(
            f"{what} {format_bytes(needed)}{detail}, and {format_bytes(limit)} are available; {remedy}"
        )
