"""One tiny server for the clients of others, by names that their examples ask for."""

import pytest

from tests.serve.tiny_server import TinyServer

ROOM = 1536  # tokens: a letter of a prompt is about one


@pytest.fixture(scope="module")
def server():
    with TinyServer(context=ROOM) as server:
        server.state.names = ["tiny", "gpt-4o-mini", "claude-opus-5", "gemma3"]
        yield server
        assert server.state.engine.compiles_after_ready == 0
