"""One tiny server for each file of tests.

Not one for all files: between two of them a process may drop what it has compiled (`workers.py`),
and a server that was ready would compile again.
"""

import pytest

from tests.serve.line import Line
from tests.serve.started import Started
from tests.serve.tiny_server import TinyServer
from tests.text.chat_models import save_chat_model


@pytest.fixture(scope="module")
def tiny_server():
    with TinyServer() as server:
        yield server


@pytest.fixture
def client(tiny_server):
    with tiny_server.client() as client:
        yield client


@pytest.fixture(scope="module")
def roomy():
    """A second one, with room for the descriptions of tools and for long conversations."""
    with TinyServer(context=1536) as server:
        yield server


@pytest.fixture(
    params=["in process", pytest.param("the command", marks=[pytest.mark.journeys, pytest.mark.night])]
)
def roomy_client(request, tmp_path):
    """Of a server with that room, at night of the real command too."""
    if request.param == "in process":
        with request.getfixturevalue("roomy").client() as client:
            yield client
        return
    save_chat_model(tmp_path / "sea", context=1536)
    with Started(tmp_path / "sea", program=("-m", "stages.serve")) as server:
        yield server.client


@pytest.fixture(scope="module")
def line(tiny_server):
    with Line(tiny_server.port) as line:
        yield line


@pytest.fixture
def visit(browser, line):
    from tests.serve.browser import Visit

    browser.get_log("browser")
    visit = Visit(browser, line)
    yield visit
    visit.leave()
