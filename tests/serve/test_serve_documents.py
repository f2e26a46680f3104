"""A server with documents: every dialect's conversations get passages, and the replies of OpenAI's chats show them."""

import json
import re
import threading
import time

import pytest

from engine.text.documents import Documents
from tests.serve.tiny_server import TinyServer, events, good, say
from tests.text.chat_models import talk

TIDE = "The tide turns at noon in Port Isla."
QUESTION = "When does the tide turn?"


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A server whose folder of documents has one passage."""
    folder = tmp_path_factory.mktemp("documents")
    (folder / "tide.md").write_text(TIDE)
    with TinyServer(context=1536, documents=Documents(folder)) as server:
        yield server


@pytest.fixture
def told_client(told):
    with told.client() as client:
        yield client


def test_a_reply_shows_the_passages_in_its_prompt_and_their_cost(told_client, roomy_client):
    reply = good(told_client.chat(QUESTION))
    (passage,) = reply["documents"]["passages"]
    assert (passage["file"], passage["number"], passage["text"]) == ("tide.md", 1, TIDE)
    assert reply["documents"]["tokens"] == passage["tokens"] > 0
    assert reply["documents"]["seconds"] >= 0
    plain = good(roomy_client.chat(QUESTION))
    assert "documents" not in plain
    assert reply["usage"]["prompt_tokens"] - plain["usage"]["prompt_tokens"] > passage["tokens"]
    assert reply["system_fingerprint"] != plain["system_fingerprint"]
    written = f"Answer by these passages:\n\n{TIDE}\n\n{QUESTION}"
    assert told_client.tokens(messages=say(QUESTION)["messages"]) == roomy_client.tokens(
        messages=say(written)["messages"]
    )
    again = good(told_client.chat(QUESTION))
    assert again["choices"] == reply["choices"]
    assert "documents" not in good(told_client.chat("And why?"))
    assert "documents" not in good(told_client.complete(QUESTION))  # a text is only continued

    first, *_, last = events(
        told_client.chat(QUESTION, stream=True, stream_options={"include_usage": True}).text
    )
    for chunk in (first, last):
        assert chunk["documents"]["passages"] == [passage]
    assert last["usage"]["prompt_tokens"] == reply["usage"]["prompt_tokens"]


def test_every_dialect_reads_them_and_only_a_chat_shows_them(told_client):
    messages = say(QUESTION)["messages"]
    tokens = good(told_client.chat(QUESTION))["usage"]["prompt_tokens"]
    for path, body in {
        "/v1/responses": {"input": QUESTION, "max_output_tokens": 3},
        "/v1/messages": {"messages": messages, "max_tokens": 3},
        "/api/chat": {"messages": messages, "stream": False, "options": {"num_predict": 3}},
    }.items():
        reply = good(told_client.post(path, json=body))
        usage = reply.get("usage", {})
        counts = (
            usage.get("input_tokens"),
            usage.get("cache_read_input_tokens"),
            reply.get("prompt_eval_count"),
        )
        assert sum(filter(None, counts)) == tokens, path
        stream = told_client.post(path, json=body | {"stream": True}).text
        for text in (json.dumps(reply), stream):
            assert "documents" not in text, path
            assert "turns at noon in Port Isla" not in text, path


def test_a_tools_result_is_no_question(told_client):
    """The passages stand before what the user asked, wherever the conversation has come to."""
    tool = {
        "type": "function",
        "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}},
    }
    call = {"id": "1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    turns = [
        *say(QUESTION)["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "12:00"},
    ]
    body = say() | {"messages": turns, "tools": [tool], "tool_choice": "none"}
    assert (
        good(told_client.post("/v1/chat/completions", json=body))["documents"]["passages"][0]["text"] == TIDE
    )


def test_the_turns_before_the_last_question_are_in_the_prefix_cache(told_client):
    texts = QUESTION, "At noon, as it does. " * 8, "Where does the tide turn?", "In Port Isla. " * 8, QUESTION
    turns = talk(*texts, system="Be brief. " * 8)
    chat = lambda messages: good(
        told_client.post("/v1/chat/completions", json=say() | {"messages": messages})
    )
    chat(turns[:4])
    usage = chat(turns)["usage"]
    shared = len(
        told_client.tokens(messages=turns[:3], add_generation_prompt=False, continue_final_message=True)
    )
    own = good(told_client.chat(QUESTION))["documents"]["tokens"]
    assert usage["prompt_tokens_details"]["cached_tokens"] > (shared - own) // 2


def test_what_waits_for_documents_says_so(told, told_client, monkeypatch):
    """The engine is held, once the request has its slot, until the stream has said it."""
    step, said = told.engine.step, threading.Event()
    is_held = lambda: told.engine.running and not told.engine.waiting and not said.is_set()
    monkeypatch.setattr(told.engine, "step", lambda: time.sleep(0.01) or [] if is_held() else step())
    # longer than what the prefix cache and one chunk give
    question = f"{QUESTION} {'Please. ' * 20}"
    with told_client.stream("POST", "/v1/chat/completions", json=say(question, stream=True)) as reply:
        lines = reply.iter_lines()
        assert any(re.fullmatch(r": reading \d+ of \d+ tokens, \d+ of documents", line) for line in lines)
        said.set()
        assert "data: [DONE]" in list(lines)
