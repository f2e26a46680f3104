"""One tiny server for all tests of the routes."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "text"))

from tiny_server import TinyServer


@pytest.fixture(scope="session")
def tiny_server():
    with TinyServer() as server:
        yield server


@pytest.fixture
def client(tiny_server):
    with tiny_server.client() as client:
        yield client
