"""Shared by every test: a compilation cache, a throw-away user cache, and the model of `tiny.py`."""

import gc
import os
import shutil
import sys
import tempfile
from typing import Any

import hypothesis
import pytest

from engine.errors import UserError
from tests.law_table import LAWS
from tests.tiny import lively_params, tiny_config

hypothesis.settings.register_profile("thrice", deadline=None, max_examples=20, print_blob=True)
hypothesis.settings.load_profile("thrice")

pytest_plugins = ["tests.interrupts", "tests.workers"]

LONGEST = (
    "test_many_processes.py",
    "test_adds_up.py",
    "test_sharding.py",
    "test_readme.py",
    "test_platforms.py",
    "test_finetune.py",
)

_folders: list[str] = []


def pytest_configure(config: pytest.Config) -> None:
    """Sets the cache folders, before JAX is imported; whatever a test starts inherits them.

    Compiled programs lie beside pytest's own notes on the last run: a second run compiles nothing.
    They are loaded as code, so they lie in the checkout and not in a folder that other users may
    write. So does bytecode, where Python is told to leave none beside its sources: else each
    process that a test starts compiles JAX's.
    """
    # tracing makes many objects and little garbage: see stages/cli/command.py
    gc.set_threshold(300_000)
    os.environ.pop(
        "UV", None
    )  # commands say `uv run` when started by it; the tests are to read the same either way
    notes = getattr(config, "cache", None)  # there are none under `-p no:cacheprovider`

    def folder(name: str) -> str:
        place = str(notes.mkdir(name)) if notes else _fresh(f"thrice-{name}-")
        os.chmod(place, 0o700)  # whatever the umask: a cache that others can write is refused
        return place

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder("compiled")
    if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
        sys.dont_write_bytecode, sys.pycache_prefix = False, folder("bytecode")
        os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    if "THRICE_CACHE" not in os.environ:  # xdist's workers inherit the first process's
        os.environ["THRICE_CACHE"] = cache = _fresh("thrice-tests-")
        # this machine's speed and its library in C are found again too
        for name in ("hardware", "native"):
            os.symlink(folder(name), f"{cache}/{name}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begins with the files that take longest: a worker gets whole files, and none is to be left
    alone with one at the end.
    """
    items.sort(key=lambda item: (*LONGEST, item.path.name).index(item.path.name))
    for item in items:
        for mark in item.iter_markers("law"):
            unknown = set(mark.args) - LAWS.keys()
            if unknown:
                raise pytest.UsageError(f"{item.nodeid}: tests/law_table.py has no law {min(unknown)!r}.")


def pytest_collection_finish() -> None:
    gc.freeze()  # what was imported stays: commands that collect garbage need not look through it


def _fresh(prefix: str) -> str:
    _folders.append(tempfile.mkdtemp(prefix=prefix))
    return _folders[-1]


def pytest_unconfigure() -> None:
    for folder in _folders:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def cfg():
    """The tiny model, float32."""
    return tiny_config()


@pytest.fixture(scope="session")
def params(cfg):
    """The tiny model's weights."""
    return lively_params(cfg)


@pytest.fixture(scope="session")
def chrome(tmp_path_factory):
    """One browser for all tests of pages: see `browser`. Skips a test where there is none."""
    from bench.docs.chromium import chromium

    opened = chromium(tmp_path_factory.mktemp("chromium"))
    try:
        chrome = next(opened)
    except UserError as error:
        pytest.skip(str(error))
    yield chrome
    next(opened, None)


@pytest.fixture(scope="module")
def browser(chrome):
    """The browser as it started: with an empty page, at its first size, and nothing of other files
    in its log.
    """
    chrome.get("about:blank")
    chrome.set_window_size(1200, 800)
    chrome.get_log("browser")
    return chrome


@pytest.fixture
def count_compiles():
    """A list that grows by one for each program JAX compiles or fetches while the test runs."""
    import jax

    compiled: list[str] = []

    def note(event: str, seconds: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    yield compiled
    jax.monitoring.unregister_event_duration_listener(note)
