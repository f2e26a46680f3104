"""One tiny server for all tests of the routes."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "text"))

from tiny_server import Client, TinyServer


@pytest.fixture(scope="session")
def tiny_server() -> Iterator[TinyServer]:
    with TinyServer() as server:
        yield server


@pytest.fixture
def client(tiny_server: TinyServer) -> Iterator[Client]:
    with tiny_server.client() as client:
        yield client
