"""What a user meets with `python -m stages.serve` as it is: long chats, overload, and requests that are too large."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from chat_models import save_chat_model, talk
from started import Started
from tiny_server import ask, good, refused, until

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


def test_who_waits_as_retry_after_says_is_served_before_who_asks_at_once(server):
    """S12, S16: requests of 2, 4 and 8 completions beside eight clients of one completion that never wait."""
    body, stop = ask(most=100, ignore_eos=True, model="default"), threading.Event()

    def complete(client: httpx.Client, n: int) -> httpx.Response:
        return client.post("/v1/completions", json=body | {"n": n})

    def ask_at_once() -> int:
        served = 0
        with httpx.Client(base_url=server.url, timeout=60) as client:
            while not stop.is_set():
                served += complete(client, 1).status_code == 200 or time.sleep(0.005) or 0
        return served

    def wait_as_told(n: int) -> list[int]:
        refusals = [0] * 3
        with httpx.Client(base_url=server.url, timeout=60) as client:
            for number in range(len(refusals)):
                while (reply := complete(client, n)).status_code == 429 and refusals[number] < 5:
                    refusals[number] += 1
                    time.sleep(int(reply.headers["Retry-After"]))
                good(reply)
        return refusals

    with ThreadPoolExecutor(11) as pool:
        impatient = [pool.submit(ask_at_once) for _ in range(8)]
        try:
            time.sleep(0.5)
            refusals = [each.result() for each in [pool.submit(wait_as_told, n) for n in (2, 4, 8)]]
        finally:
            stop.set()
    assert sum(each.result() for each in impatient) > 0
    assert max(map(max, refusals)) in (1, 2)  # refused at first, and passed over once at most
