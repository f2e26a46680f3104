"""Shared by tests of pages: a browser."""

import pytest
from chromium import chromium


@pytest.fixture(scope="session")
def chrome(tmp_path_factory):
    yield from chromium(tmp_path_factory.mktemp("user"))
