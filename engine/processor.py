"""The processor: its name and instructions, the cores of this process, and the time that others take of them."""

import contextlib
import os
from pathlib import Path
from typing import NamedTuple


class Processor(NamedTuple):
    model: str
    instructions: str  # sets of them, separated by spaces; empty where the system does not list them


def processor() -> Processor:
    """Returns the processor's model name and instruction sets, by which measured ceilings are cached."""
    import platform  # a millisecond of --help

    facts: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            facts.setdefault(name.strip(), value.strip())
    model = facts.get("model name") or platform.processor() or platform.machine() or "unknown processor"
    return Processor(model, facts.get("flags") or facts.get("Features") or "")


def cores() -> int:
    """Returns how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class CoreTime(NamedTuple):
    """Seconds of the cores that this process may use, summed since the machine started. `others`:
    those that others took.
    """

    total: float
    others: float


def core_time() -> CoreTime | None:
    """Returns the time of this process's cores so far, from /proc/stat; None where there is none,
    as on all but Linux.

    Others are other processes, and other virtual machines on the same processor (steal). A child of
    this process counts among the others until it has been waited for.
    """
    if not hasattr(os, "sched_getaffinity"):
        return None
    core_names = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    total_ticks = 0
    busy_ticks = 0
    own_seconds = sum(os.times()[:4])
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/stat").read_text().splitlines():
            name, *fields = line.split()
            if name in core_names:
                user, nice, system, idle, iowait, irq, softirq, steal = map(int, fields[:8])
                core_busy = user + nice + system + irq + softirq + steal
                busy_ticks += core_busy
                total_ticks += core_busy + idle + iowait
    if not total_ticks:
        return None
    ticks_per_second = os.sysconf("SC_CLK_TCK")
    total = total_ticks / ticks_per_second
    busy = busy_ticks / ticks_per_second
    return CoreTime(total, others=busy - own_seconds)
