"""Describes the machine of a measurement: what it is, reaches before and after, and what others took of it.

Two machines may share one name: of one cloud's "AMD EPYC" the products of two days differed by a
factor of two. So a document that is kept holds the processor's model numbers, which tell its
generation and its microcode, and the rates that it reached.
"""

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

from engine.processor import CoreTime, core_time, cores, processor

Json = dict[str, Any]  # a JSON object

FAMILIES = ("AVX2", "AVX-512", "AMX")  # of processors, which have bars of their own
# that XLA or a kernel of ours uses
INSTRUCTIONS = "avx2 avx512f avx512_vnni avx512_bf16 amx_int8 amx_bf16 asimddp i8mm bf16"
# as /proc/cpuinfo calls them
MODEL_NUMBERS = ("vendor_id", "cpu family", "model", "stepping", "microcode")
LOOK_SECONDS = 0.5  # for which others are watched before a measurement
PROCESSES = 3  # whose best rates are what the machine reaches at a moment: one alone may be disturbed


def family() -> str:
    """Returns which of FAMILIES this processor is of."""
    instructions = processor()[1].split()
    if "amx_int8" in instructions:
        return "AMX"
    return "AVX-512" if "avx512_vnni" in instructions else "AVX2"


def bar(*by_family: float | None) -> float | None:
    """Returns the bar of this processor's family, of those of all FAMILIES."""
    return by_family[FAMILIES.index(family())]


def describe_machine() -> Json:
    """Returns the processor's name, model numbers ({} where the system has none) and instructions;
    cores and memory.
    """
    name, instructions = processor()
    return {
        "processor": name,
        "model_numbers": read_model_numbers(),
        "instructions": " ".join(each for each in INSTRUCTIONS.split() if each in instructions.split()),
        "cores": cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def read_model_numbers(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """Returns those of MODEL_NUMBERS that the system names for its first processor."""
    numbers: dict[str, str] = {}
    if not cpuinfo.exists():
        return numbers
    for line in cpuinfo.read_text(errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in MODEL_NUMBERS:
            numbers.setdefault(name.strip(), value.strip())
    return numbers


def is_same_processor(one: Json, other: Json) -> bool:
    """Whether two machines, as `describe_machine` has them, have the same processor and as many cores.

    The microcode may differ. A document of before December 2026 has no model numbers.
    """
    if any(one[key] != other[key] for key in ("processor", "instructions", "cores")):
        return False
    numbers = one.get("model_numbers") or {}
    others = other.get("model_numbers") or {}
    common = (numbers.keys() & others.keys()) - {"microcode"}
    return all(numbers[key] == others[key] for key in common)


class Watch:
    """Watches the machine over a measurement: the rates it reaches before and after, and the core time that others take."""

    def __init__(self) -> None:
        """Takes fifteen seconds."""
        self.before = _measure_rates()
        self.start = core_time()

    def finish(self) -> Json:
        """Returns `reached_before` and `reached_after`, each None where they cannot be measured
        apart, and `taken_by_others`, a share of the cores' time, None where the system does not
        count it. Takes fifteen seconds.
        """
        share = share_of_others(self.start, core_time())
        return {"reached_before": self.before, "reached_after": _measure_rates(), "taken_by_others": share}


def share_of_others(start: CoreTime | None, end: CoreTime | None) -> float | None:
    """Returns the share of the cores' time between two readings that others took."""
    if start is None or end is None or end.total <= start.total:
        return None
    share = (end.others - start.others) / (end.total - start.total)
    return min(1.0, max(0.0, share))  # a tick more or less on either side


def busy_cores() -> float:
    """Returns how many of this process's cores others use now, on this machine or, where it is a
    virtual one, beside it.

    Looks for LOOK_SECONDS where the system counts cores' time; else it is the machine's mean of the
    last minute.
    """
    start = core_time()
    if start is not None:
        time.sleep(LOOK_SECONDS)
    share = share_of_others(start, core_time())
    if share is None:
        return os.getloadavg()[0]
    return share * cores()


def _measure_rates() -> Json | None:
    # In processes of their own, for their arrays would be this one's memory.
    from engine.counting.hardware import RATES, best_ceilings, measure_apart

    best = measure_apart()
    for _ in range(PROCESSES - 1):
        ceilings = measure_apart()
        if best is None or ceilings is None:
            return None
        best = best_ceilings(best, ceilings)
    if best is None:
        return None
    rates = dataclasses.asdict(best)
    return {name: rates[name] for name in RATES}
