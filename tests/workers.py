"""Keeps each process that runs tests within its memory and its memory maps, and prints both at the end of the run.

Compiled programs stay mapped, each in about five places. Linux allows a process 65,530
(`vm.max_map_count`), and past that LLVM aborts it: between two files they are dropped where they
are many.
"""

import resource
import sys
from pathlib import Path

import pytest

MANY = 15_000  # maps; about 2 GB of memory

_most = {"maps": 0}
# what each worker used, at the end; nothing of one that died
_workers: dict[str, dict[str, int]] = {}


@pytest.hookimpl(trylast=True)  # after the file's fixtures are gone
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if nextitem is not None and nextitem.path == item.path:
        return
    _most["maps"] = max(_most["maps"], maps := _count_maps())
    if maps > MANY and (jax := sys.modules.get("jax")):
        from engine.allocator import return_freed_memory

        jax.clear_caches()
        return_freed_memory()


def _count_maps() -> int:
    maps = Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else 0


def _usage() -> dict[str, int]:
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (
        1024 if sys.platform == "darwin" else 1
    )
    return _most | {"kilobytes": kilobytes}


def pytest_sessionfinish(session: pytest.Session) -> None:
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["usage"] = _usage()
    if {} in _workers.values() and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED  # also where no test was running any more


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    _workers[node.gateway.id] = {} if error else node.workeroutput["usage"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name, usage in sorted((_workers or {"this process": _usage()}).items()):
        figures = (
            f"at most {usage['kilobytes'] / 1e6:.1f} GB of memory and {usage['maps']:,} memory maps"
            if usage
            else "died"
        )
        terminalreporter.write_line(f"{name}: {figures}")
