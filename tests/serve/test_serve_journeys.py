"""What a user meets with `python -m stages.serve` as it is: long chats, overload, and requests that are too large."""

from typing import Any

import httpx
import pytest
from chat_models import save_chat_model, talk
from started import Started
from tiny_server import good, refused, until

pytestmark = pytest.mark.journeys
CONTEXT = 1024


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    save_chat_model(folder := tmp_path_factory.mktemp("models") / "sea", context=CONTEXT)
    with Started(folder, "--queue", 2, program=("-m", "stages.serve")) as server:
        assert until(lambda: server.client.get("/health").json()["long_texts_ready"], 300)
        yield server


def chat(server: Started, messages: Any, **fields: Any) -> httpx.Response:
    return server.client.post("/v1/chat/completions", json={"messages": messages, "temperature": 0, "max_tokens": 8, **fields})


def test_a_conversation_of_any_length_that_fits_is_answered(server):
    """S15: 40 turns, and as many as the context holds; one more is refused and nothing of it left out."""
    messages = talk(*["Hello there, how are you? I am well. 1234"] * 39)
    assert good(chat(server, messages))["choices"][0]["message"]["content"]
    one_turn = good(server.client.post("/tokenize", json={"messages": messages}))["count"] // len(messages)
    messages = talk(*["1 2"] * (CONTEXT // one_turn))
    while (count := good(server.client.post("/tokenize", json={"messages": messages}))["count"]) < CONTEXT:
        full = messages
        messages = talk(*["1 2"] * (len(messages) + 2 * max(1, (CONTEXT - count) // 50)))
    usage = good(chat(server, full, max_tokens=None, ignore_eos=True))["usage"]
    assert usage["total_tokens"] == CONTEXT
    assert refused(chat(server, messages))["code"] == "context_length_exceeded"
