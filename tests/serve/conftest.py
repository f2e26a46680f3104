"""One tiny server for all tests of the routes, and one browser for all of the page."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "text"))

from chromium import chromium
from line import Line
from tiny_server import TinyServer


@pytest.fixture(scope="session")
def tiny_server():
    with TinyServer() as server:
        yield server


@pytest.fixture
def client(tiny_server):
    with tiny_server.client() as client:
        yield client


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    yield from chromium(tmp_path_factory.mktemp("browser"))


@pytest.fixture(scope="session")
def line(tiny_server):
    with Line(tiny_server.port) as line:
        yield line


@pytest.fixture
def visit(browser, line):
    from browser import Visit

    browser.get_log("browser")
    visit = Visit(browser, line)
    yield visit
    visit.leave()
