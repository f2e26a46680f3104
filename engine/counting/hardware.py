"""What this machine can do at best, measured; how much memory it has and we hold. The engine's only clock lives here.

A share of a ceiling is honest only when the ceiling was reached on the same machine by the same compiler, so these are
measured through JAX. Products are square with row-major operands: on a CPU XLA passes exactly those to its fast
kernels, and a transposed or one-row operand would measure the slow fallback instead.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engine.device import cores, device_name, processor
from engine.errors import UserError
from engine.files import cache_folder, write_json
from engine.format import size

_CPU_SIDE = 2048  # of the matrices
_CPU_NUMBERS = 2**26  # float32: 256 MiB, beyond the caches
_FEWEST_ROUNDS, _ENOUGH_ROUNDS = 3, 12
_SECONDS = 2.0  # of measuring, when the fewest rounds fit in it; compiling comes on top
_DTYPES = {"bf16_gflops": jnp.bfloat16, "f32_gflops": jnp.float32, "int8_gflops": jnp.int8}
RATES = (*_DTYPES, "read_gbs", "update_gbs")

clock = time.perf_counter  # seconds from an arbitrary start, never going back


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """The best rates seen on this machine.

    Products are n x n x n: n = 2048 on a CPU, 8192 on an accelerator; `f32` is float32 at JAX's default precision (on
    recent GPUs that is TF32), `int8` is int8 x int8 -> int32. `read_gbs` sums a large array: the ceiling of decoding,
    which reads each weight once. `update_gbs` scales it in place, counting the read and the write: the ceiling of an
    optimizer. G is 10^9. A rate is 0 where the backend refuses the operation.
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


def _identity() -> dict[str, Any]:
    """Everything on which the ceilings depend: another machine may find the same cache folder."""
    model, flags = processor()
    device = jax.devices()[0]
    return {
        "processor": model,
        "flags": hashlib.sha256(flags.encode()).hexdigest(),
        "cores": cores(),
        "backend": device.platform,
        "kind": device.device_kind,
        "jax": jax.__version__,
    }


def measure_ceilings(report: Callable[[int, int], None] | None = None) -> Ceilings:
    """Measures all five rates, in two to five seconds. The best of interleaved rounds: noise only ever slows.

    `report(done, total)` counts rounds; a slow machine stops early.
    """
    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    side, numbers = (_CPU_SIDE, _CPU_NUMBERS) if on_cpu else (8192, 2**28)
    calls = 1 if on_cpu else 16  # queued back to back, so that a launch hides behind the one before it
    programs = {name: _product(side, dtype) for name, dtype in _DTYPES.items()} | _streams(numbers)
    work = dict.fromkeys(_DTYPES, 2.0 * side**3) | {"read_gbs": 4.0 * numbers, "update_gbs": 8.0 * numbers}
    best = {}
    for name, program in programs.items():
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            jax.block_until_ready(program())
            best[name] = math.inf
    start = clock()
    for done in range(_ENOUGH_ROUNDS):
        if done >= _FEWEST_ROUNDS and clock() - start > _SECONDS:
            break
        for name in best:
            begin = clock()
            for _ in range(calls):
                result = programs[name]()
            jax.block_until_ready(result)
            best[name] = min(best[name], (clock() - begin) / calls)
        if report:
            report(done + 1, _ENOUGH_ROUNDS)
    rates = {name: work[name] / best[name] / 1e9 if name in best else 0.0 for name in RATES}
    return Ceilings(device_name(), device.platform, cores(), jax.__version__, **rates)


def _product(side: int, dtype: Any) -> Callable[[], Any]:
    # Numbers of a model's kind, repeated to size: a chip that saves power on zeros or ones must not look faster.
    tile = np.random.default_rng(0).standard_normal((512, 512))
    if dtype == jnp.int8:
        tile = (32 * tile).clip(-127, 126)
    left = jnp.asarray(np.tile(tile, (side // 512, side // 512)), dtype)
    right = left + jnp.ones((), dtype)
    result = jnp.int32 if dtype == jnp.int8 else dtype
    return functools.partial(jax.jit(functools.partial(jnp.dot, preferred_element_type=result)), left, right)


def _streams(numbers: int) -> dict[str, Callable[[], Any]]:
    array = jnp.ones((numbers // 1024, 1024), jnp.float32)
    # Rows in a few blocks, so that every core gets some; one grand total would be summed by one core.
    total = jax.jit(lambda x: x.reshape(64, -1).sum(1))
    scale = jax.jit(lambda x: x * 0.5 + 0.5, donate_argnums=0)

    def update() -> Any:
        nonlocal array
        array = scale(array)
        return array

    return {"read_gbs": lambda: total(array), "update_gbs": update}


def best_ceilings(first: Ceilings, second: Ceilings) -> Ceilings:
    """Returns the higher of each rate: on a shared machine they move, and the best counts."""
    return dataclasses.replace(first, **{rate: max(getattr(first, rate), getattr(second, rate)) for rate in RATES})


def ceilings(refresh: bool = False, report: Callable[[int, int], None] | None = None) -> Ceilings:
    """The ceilings of this machine: from the user's cache when they were measured before, else measured and kept.

    With `refresh` they are measured in any case and the better of each is kept: a ceiling first measured in a noisy
    moment rises, one measured again in such a moment does not fall. A damaged cache counts as none.
    """
    identity = _identity()
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16] + ".json"
    kept = None
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        saved = json.loads((cache_folder("hardware") / name).read_text())
        rates = [saved["ceilings"][rate] for rate in RATES]
        if saved["identity"] == identity and all(math.isfinite(rate) and rate >= 0 for rate in rates):
            kept = Ceilings(**saved["ceilings"])
    if kept and not refresh:
        return kept
    measured = measure_ceilings(report)
    if kept:
        measured = best_ceilings(measured, kept)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs a few seconds next time, no more
        write_json(cache_folder("hardware") / name, {"identity": identity, "ceilings": dataclasses.asdict(measured)})
    return measured


def peak_rss_bytes() -> int:
    """The most physical memory this process has held so far."""
    # Linux lets a program inherit the peak of the one that started it in getrusage, but not here.
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_limit_bytes(root: Path = Path("/")) -> int:
    """The most host memory this process may use: the machine's, or less where a control group (v1 or v2) says so.

    `root` is where /proc and /sys are looked for.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, place = line.split(":", 2)
            if not controllers:
                top, file = root / "sys/fs/cgroup", "memory.max"
            elif "memory" in controllers.split(","):
                top, file = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
            else:
                continue
            # A group is bound by every group around it; in a container the path may also be the host's, and the
            # limit then lies at the top.
            folder = top / place.strip("/")
            for group in [folder, *folder.parents]:
                with contextlib.suppress(OSError, ValueError):  # absent, or "max"
                    limits.append(int((group / file).read_text()))
                if group == top:
                    break
    return min(limits)


def check_host_memory(what: str, wanted: int, detail: str = "", remedy: str = "") -> None:
    """Raises UserError when `what` (plural) takes more bytes than this process may use, instead of being killed over it.

    `detail` says what the size is of, `remedy` what to do.
    """
    limit = memory_limit_bytes()
    if wanted > limit:
        parts = (what, "take", size(wanted), detail)
        raise UserError(f"{' '.join(filter(None, parts))}, and {size(limit)} are here. {remedy}".rstrip())
