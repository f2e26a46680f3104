"""OpenAI's own client, sync, async and streaming, on a server of this process (S10)."""

import openai
import pytest
from openai_suite import *  # noqa: F403
from tiny_server import TinyServer


@pytest.fixture
def address(tiny_server):
    return tiny_server.url


def test_a_wrong_key():
    with TinyServer(keys=("right",), warm=False) as server:
        with pytest.raises(openai.AuthenticationError), openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong") as client:
            client.models.list()
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="right") as client:
            assert [model.id for model in client.models.list()] == ["tiny"]
