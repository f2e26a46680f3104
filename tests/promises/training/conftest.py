"""Where the promises of training are tried: two fork servers, a small text, and the runs that nothing interrupts."""

import concurrent.futures
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from tests import faults
from tests.promises.training.fork_server import ForkServer
from tests.promises.training.tiny_training import SAVE_EVERY, TinyRun, bits
from tests.stages.distributed.many_processes import start  # noqa: F401
from tests.stages.tiny_runs import WORDS, write_text

LENGTH = ("--steps", 2 * SAVE_EVERY, "--save-every", SAVE_EVERY, "--log-every", 1, "--eval-every", 4)


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """faults.c, compiled."""
    return faults.build(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "sea.txt")


@pytest.fixture(scope="session")
def servers(library):
    pair = [ForkServer(library) for _ in range(2)]
    yield pair
    for server in pair:
        server.close()


@pytest.fixture(scope="session")
def make_run(servers, text, tmp_path_factory):
    """Makes a run that trains on the text: `make_run(*words, server=0, length=LENGTH)`."""
    first: list[Path] = []

    def make(*words: object, server: int = 0, length: Iterable[object] = LENGTH) -> TinyRun:
        work = tmp_path_factory.mktemp("work") / "w"
        size = ("--data", text, "--tokenizer", "bpe:300", "--batch", 4, "--context", 32)
        hardware = first[0] if first else None
        run = TinyRun(servers[server], work, "train", "tiny", *size, *length, *words, hardware=hardware)
        first.append(run.cache / "hardware")
        return run

    return make


@pytest.fixture(scope="session")
def base(make_run):
    """The run folder of a trained model, for tests that only read it."""
    run = make_run()
    assert run.live() == 0, run.output.read_text()
    return run.folder


@pytest.fixture(scope="session")
def make_tuning(servers, base, tmp_path_factory):
    """Makes a run of fine-tuning on examples with one answer, as `make_run`: `make_tuning(server,
    words)`.
    """
    words = WORDS.split()
    turns = (
        [{"role": "user", "content": f"the {word}"}, {"role": "assistant", "content": "red sails."}]
        for word in words
    )
    data = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    data.write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    size = ("--model", base, "--data", data, "--context", 32, "--batch", 2, "--general", "none")

    def make(server: int, more: Iterable[object]) -> TinyRun:
        return TinyRun(servers[server], tmp_path_factory.mktemp("work") / "w", "finetune", *size, *more)

    return make


@pytest.fixture(scope="session")
def reference(make_run):
    """The bits of an uninterrupted run, by its words."""
    known = {}

    def find(*words: object, **options):
        key = str((words, options))
        if key not in known:
            run = make_run(*words, **options)
            assert run.live() == 0, run.output.read_text()
            known[key] = bits(run.folder)
        return known[key]

    return find


@pytest.fixture
def side_by_side():
    """Calls a function for each of several arguments, two at a time."""

    def call[T, R](function: Callable[[T], R], arguments: Iterable[T]) -> list[R]:
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            return list(pool.map(function, arguments))

    return call
