"""The promises of serving and training (README.md): options, the servers, and a line for each promise at the end.

A test of promise S4 is marked `promises(name="S4")`, and tried on a server of its own process, over
loopback; some are tried by default too, in a few repetitions and without their bars of time, on the
tiny server of tests/serve: see `servers`. A promise that could not be tried is not kept. Without
`-n 0` the workers disturb each other's timing.
"""

import dataclasses
import json
import random
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.cli import circumstances
from bench.serving.client import Client
from bench.serving.server import Server
from engine.files import atomic_file
from tests.promises.figures import Figure
from tests.serve.tiny_server import SLOTS, TinyServer

Options = dataclasses.make_dataclass("Options", [])  # a document's flags; the command says all
FOUND: list[dict[str, Any]] = []  # what each trial of a promise found


def pytest_addoption(parser):
    group = parser.getgroup("promises", "the promises of training and serving")
    group.addoption("--quick", action="store_true", help="few repetitions of each promise")
    group.addoption(
        "--promises-model", default="smollm2-135m-instruct", help="what `--model` of stages.serve takes"
    )
    group.addoption(
        "--promises-slots", type=int, default=8, help="requests the server answers at the same time"
    )
    group.addoption(
        "--promises-out",
        type=Path,
        metavar="FOLDER",
        help="keep the figures in FOLDER/promises.json, beside older ones",
    )


def pytest_collection_modifyitems(items):
    for item in items:
        if mark := item.get_closest_marker("promises"):
            item.add_marker(pytest.mark.timeout(3600))
            item.user_properties.append(("promise", mark.kwargs["name"]))


@pytest.fixture(scope="session")
def anyio_backend():
    return "asyncio"


@pytest.fixture
def is_real(request):
    """Whether a promise is tried at length, on a real server."""
    return request.node.get_closest_marker("promises") is not None


@pytest.fixture
def quick(pytestconfig, is_real):
    return pytestconfig.getoption("--quick") or not is_real


@pytest.fixture
def rng():
    return random.Random(0)


@pytest.fixture(scope="session")
def make_server(pytestconfig):
    """Makes a server of the model in a process of its own: `make_server(*flags, preamble=...)`, for
    `async with`.
    """
    flags = ["--slots", str(pytestconfig.getoption("--promises-slots"))]

    def make(*more, preamble=""):
        server = Server(pytestconfig.getoption("--promises-model"), [*flags, *more])
        if preamble:
            server.command[1:3] = [
                "-c",
                f"{preamble}\nimport sys, stages.serve.__main__ as serve\nsys.exit(serve.main())",
            ]
        return server

    return make


@pytest.fixture(scope="session")
async def real_server(anyio_backend, make_server):
    """The server that most promises are tried on, so that S3 finds it after everything else."""
    # however this ends, its servers end too
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    async with make_server() as server:
        yield server


@pytest.fixture(scope="module")
async def tiny_promised(anyio_backend):
    """A tiny one in this process, for one file: between two the process may drop what it has
    compiled (`workers.py`).
    """
    with TinyServer() as tiny:
        yield SimpleNamespace(port=tiny.port, client=Client(tiny.port), process=None)


@pytest.fixture(params=["real"])
def server(request):
    """The real server, or the tiny one: see `servers`."""
    return request.getfixturevalue(
        real_server.__name__ if request.param == "real" else tiny_promised.__name__
    )


@pytest.fixture
def client(server):
    return server.client


@pytest.fixture
def slots(pytestconfig, is_real):
    return pytestconfig.getoption("--promises-slots") if is_real else SLOTS


@pytest.fixture
def expect(record_property, is_real):
    """Records figures and fails when one misses its bar: `expect(*figures, over="how many of
    what")`.
    """

    def expect(*figures: Figure, over: str = "") -> None:
        record_property("figures", [figure._asdict() for figure in figures])
        record_property("over", over)
        missed = [str(figure) for figure in figures if not figure.is_met and (is_real or not figure.is_time)]
        assert not missed, f"{'; '.join(missed)} ({over})"

    return expect


def pytest_runtest_logreport(report):
    """Gathers what a test found of its promise; with xdist the reports come from the workers."""
    properties: dict[str, Any] = dict(report.user_properties)
    if "promise" in properties and (report.when == "call" or not report.passed):
        crash = getattr(report.longrepr, "reprcrash", None)
        FOUND.append(
            {
                "promise": properties["promise"],
                "trial": report.nodeid.rpartition("/")[2],
                "kept": report.passed,
                "figures": properties.get("figures", []),
                "over": properties.get("over", ""),
                "error": crash.message.splitlines()[0] if crash and "figures" not in properties else None,
            }
        )


def pytest_terminal_summary(terminalreporter, config):
    rows: dict[str, list[str]] = {}
    for row in FOUND:
        figures = "; ".join(str(Figure(**figure)) for figure in row["figures"])
        found = row["error"] or (f"{figures} ({row['over']})" if figures else row["trial"])
        rows.setdefault(row["promise"], []).append(f"{'kept' if row['kept'] else 'NOT KEPT'}: {found}")
    for name, results in sorted(rows.items(), key=lambda row: by_number(row[0])):
        terminalreporter.write_line("\n    ".join([f"{name:3} {results[0]}", *results[1:]]))
    if rows:
        count = sum(all(result.startswith("kept") for result in results) for results in rows.values())
        terminalreporter.write_line(f"{count} of {len(rows)} promises kept.")
    if FOUND and (folder := config.getoption("--promises-out")):
        keep(folder / "promises.json", config.getoption("--quick"))


def keep(path: Path, quick: bool) -> None:
    """Writes what was found in place of older figures of the same trials. The others stay, each
    with its date and commit.
    """
    about = circumstances(["pytest", *sys.argv[1:]], Options())
    own = {"date": about["date"][:10], "commit": about["commit"], "load": about["load"], "quick": quick}
    older = json.loads(path.read_text())["rows"] if path.exists() else []
    by_trial = {row["trial"]: row for row in older} | {row["trial"]: row | own for row in FOUND}
    rows = sorted(by_trial.values(), key=lambda row: (by_number(row["promise"]), row["trial"]))
    with atomic_file(path) as file:
        file.write(json.dumps(about | {"rows": rows}, indent=1, ensure_ascii=False).encode() + b"\n")


def by_number(promise: str) -> tuple[int, int]:
    return "FSXTJ".index(promise[0]), int(promise[1:])
