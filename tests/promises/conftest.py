"""The promises of training (T1 to T14) and of serving (S1 to S11, S17, X2 to X5): pytest's options, the server, and the table.

    pytest tests/promises -m promises -n 0                    each promise tried: hours on two cores, those of serving one
    pytest tests/promises -m promises -n 0 --quick            fewer repetitions
    pytest tests/promises -m promises -n 0 --promise S4,X3    some of them
    pytest tests/promises/training -m promises -n 0           those of training: training/conftest.py

Each promise of serving is tried on the project's own server, a process of its own, over its own loopback; a promise that
could not be tried is not kept. Without `-n 0` the workers disturb each other's timing. `--junitxml FILE` writes the figures to
a file.
The tests in this folder without the mark run by default: they show that a promise that is broken is noticed.
"""

import dataclasses
import io
import random
import signal
from typing import Any

import pytest
from figures import Figure

from bench.serving.server import Server
from engine.errors import did_you_mean

ROWS: dict[str, dict[str, Any]] = {}  # of the table, by the promise's name


def pytest_addoption(parser):
    group = parser.getgroup("promises", "the promises of training and serving")
    group.addoption("--promise", default="", help="names of promises, such as S4,X3; by default all")
    group.addoption("--quick", action="store_true", help="few repetitions of each promise")
    group.addoption(
        "--promises-model", default="smollm2-135m-instruct", help="a run folder, a Hugging Face folder, a .gguf file or a name"
    )
    group.addoption("--promises-slots", type=int, default=8, help="requests the server answers at the same time")
    group.addoption("--promises-capacity", help="tokens of prompt and completion together; by default what the server chooses")
    group.addoption("--promises-weights", default="int8", help="int8, bfloat16 or float32")


def pytest_collection_modifyitems(config, items):
    """Notes which promise a test is of, for its report; keeps the promises that `--promise` names."""
    names = {item: mark.args[0] for item in items if (mark := item.get_closest_marker("promises"))}
    for item in names:
        item.add_marker(pytest.mark.timeout(3600))
        item.user_properties.append(("promise", item.get_closest_marker("promises").args))
    chosen = {name.strip().upper() for name in config.getoption("--promise").split(",") if name.strip()}
    if not chosen:
        return
    known = sorted(set(names.values()), key=_place)
    for name in chosen - {*known}:
        raise pytest.UsageError(f"There is no promise {name}; there are {', '.join(known)}.{did_you_mean(name, known)}")
    config.hook.pytest_deselected(items=[item for item in items if names.get(item) not in chosen])
    items[:] = [item for item in items if names.get(item) in chosen]


# Options and the server


@pytest.fixture(scope="session")
def anyio_backend():
    return "asyncio"


@pytest.fixture(scope="session")
def quick(pytestconfig):
    return pytestconfig.getoption("--quick")


@pytest.fixture(scope="session")
def slots(pytestconfig):
    return pytestconfig.getoption("--promises-slots")


@pytest.fixture
def rng():
    return random.Random(0)


@pytest.fixture(scope="session")
def make_server(pytestconfig, slots):
    """Makes another server of the same model: `make_server(*flags, key=..., preamble=...)`, for `async with`."""
    capacity = pytestconfig.getoption("--promises-capacity")
    flags = ["--slots", str(slots), "--weights", pytestconfig.getoption("--promises-weights")]
    flags += ["--capacity", capacity] if capacity else []
    model = pytestconfig.getoption("--promises-model")

    def make(*more, preamble="", **options):
        server = Server(model, [*flags, *more], **options)
        if preamble:
            server.command[1:3] = ["-c", f"{preamble}\nimport sys, stages.serve.__main__ as serve\nsys.exit(serve.main())"]
        return server

    return make


@pytest.fixture(scope="session")
async def server(anyio_backend, make_server):
    """The server that most promises are tried on, so that S3 finds it after everything else."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # however this ends, its servers end too
    async with make_server() as server:
        yield server


@pytest.fixture
def client(server):
    return server.client


# The table


@pytest.fixture
def expect(record_property):
    """Records figures for the table and fails when one misses its bar: `expect(*figures, over="how many of what")`."""

    def expect(*figures: Figure, over: str = "") -> None:
        for figure in figures:
            record_property("figure", dataclasses.asdict(figure))
        record_property("over", over)
        missed = [f"{figure}, wanted {figure.wanted}" for figure in figures if not figure.met]
        assert not missed, "; ".join(missed) + f" ({over})"

    return expect


def pytest_runtest_logreport(report):
    """Gathers what a test found of its promise; with xdist the reports come from the workers."""
    names = [value for key, value in report.user_properties if key == "promise"]
    if not names or (report.when != "call" and report.passed):
        return
    name, statement = names[0]
    row = ROWS.setdefault(name, {"statement": statement, "figures": [], "over": [], "tests": 0, "failures": []})
    figures = [Figure(**value) for key, value in report.user_properties if key == "figure"]
    row["figures"] += figures
    row["over"] += [value for key, value in report.user_properties if key == "over" and value]
    row["tests"] += 1
    if not report.passed:
        crash = getattr(report.longrepr, "reprcrash", None)
        message = (crash.message if crash else str(report.longrepr)).strip().splitlines()[0][:200]
        row["failures"].append("" if figures else f"{report.nodeid.rpartition('::')[2]}: {message}")


def pytest_terminal_summary(terminalreporter, config):
    if ROWS:
        count = sum(not row["failures"] for row in ROWS.values())
        few = " With --quick, so over few repetitions." if config.getoption("--quick") else ""
        terminalreporter.write_line(f"{format_table(ROWS)}\n{count} of {len(ROWS)} promises kept.{few}")


def format_table(rows: dict[str, dict[str, Any]]) -> str:
    """The table: promise, figure wanted, figure measured, kept or not; in the order of the promises' names."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("", "promise", "figure wanted", "figure measured", "kept?"):
        table.add_column(head, no_wrap=head in ("", "kept?"))
    for name in sorted(rows, key=_place):
        row = rows[name]
        wanted = [figure.wanted for figure in row["figures"]]
        measured = [*map(str, row["figures"]), *filter(None, row["failures"])]
        if row["tests"] > 1:
            wanted.append("every test passes")
            measured.append(f"{row['tests'] - len(row['failures'])} of {row['tests']} pass")
        over = f" ({'; '.join(row['over'])})" if row["over"] else ""
        mark = "NO" if row["failures"] else "yes"
        table.add_row(name, row["statement"], "; ".join(wanted) or "-", "; ".join(measured) + over, mark)
    text = io.StringIO()
    Console(file=text, width=160, highlight=False, markup=False).print(table)
    return text.getvalue()


def _place(name: str) -> tuple[str, int]:
    return name[0], int(name[1:])
