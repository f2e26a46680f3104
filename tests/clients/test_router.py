"""`vllm-router` before two commands: what comes through it is what each of them answers. At night, where it is installed."""

import concurrent.futures
import contextlib
import re
import sys
from typing import Any

import httpx
import openai
import pytest

from tests.serve.router import free_port, vllm_router
from tests.serve.started import Started
from tests.serve.tiny_server import PATIENCE, until
from tests.text.chat_models import save_chat_model

pytestmark = [
    pytest.mark.night,
    pytest.mark.skipif(sys.platform != "linux", reason="vllm-router has wheels for Linux alone"),
]
MODEL = "gpt-4o-mini"
ROOM = 1536  # tokens: a letter of a prompt is about one
HELLO: Any = [{"role": "user", "content": "Hello there"}]
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "book",
        "parameters": {
            "type": "object",
            "properties": {"days": {"enum": [1, 2, 30]}},
            "required": ["days"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts the command on a port; several take one model, saved in a folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_chat_model(folder, context=ROOM)
    with contextlib.ExitStack() as until_end:

        def begin(port: int) -> Started:
            flags = ("--name", MODEL, "--port", port)
            return until_end.enter_context(Started(folder, *flags, program=("-m", "stages.serve")))

        yield begin


@pytest.fixture(scope="module")
def servers(start):
    """Two commands; a test may put another in the place of one that has ended."""
    return [start(free_port()), start(free_port())]


@pytest.fixture(scope="module")
def router(servers):
    """The address of a router before both."""
    with vllm_router([server.url for server in servers]) as url:
        yield url


def ask_all(url: str) -> dict[str, Any]:
    """Returns the answers of a server, or of the router before it, by the kind of request."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        chat: Any = {"model": MODEL, "messages": HELLO, "temperature": 0}
        text: Any = {"model": MODEL, "prompt": "Hello there", "temperature": 0, "max_tokens": 8}
        stream = client.chat.completions.create(
            **chat, max_tokens=8, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        called = client.chat.completions.create(**chat, max_tokens=100, tools=[TOOL], tool_choice="required")
        outputs = {"structured_outputs": {"choice": ["yes", "no"]}}
        response: Any = {"model": MODEL, "input": "Hello there", "max_output_tokens": 8, "temperature": 0}
        return {
            "chat": client.chat.completions.create(**chat, max_tokens=8).choices[0].message.content,
            "stream": "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices),
            "usage": chunks[-1].usage.completion_tokens,
            "calls": [call.function.arguments for call in called.choices[0].message.tool_calls],
            "choice": client.chat.completions.create(**chat, extra_body=outputs).choices[0].message.content,
            "logprobs": client.completions.create(**text, logprobs=2).choices[0].logprobs.tokens,
            "completion": client.completions.create(**text).choices[0].text,
            "parts": "".join(part.choices[0].text for part in client.completions.create(**text, stream=True)),
            "embedding": client.embeddings.create(model=MODEL, input=["Hello", "there"]).data[1].embedding,
            "response": client.responses.create(**response).output_text,
            "models": {model.id for model in client.models.list()},
        }


def metric(server: Started, name: str) -> float:
    """Returns the sum of a metric of a server over its labels."""
    lines = re.findall(rf"^{name}(?:{{.*}})? (\S+)$", server.client.get("/metrics").text, re.M)
    assert lines, name
    return sum(map(float, lines))


def generated(server: Started) -> float:
    return metric(server, "vllm:generation_tokens_total")


def test_every_kind_of_request_comes_through(router, servers):
    direct = ask_all(servers[0].url)
    before = [generated(server) for server in servers]
    assert ask_all(router) == direct
    assert ask_all(router) == direct
    for server, count in zip(servers, before):
        assert generated(server) > count
        assert metric(server, "thrice_compiles_after_ready_total") == 0
    assert httpx.get(f"{router}/health", timeout=PATIENCE).status_code == 200


def sampled(url: str, seed: int) -> tuple[int, str]:
    """Returns the status of a sampled completion, and its text."""
    body = {"model": MODEL, "prompt": "Hello there", "max_tokens": 100, "temperature": 1, "seed": seed}
    reply = httpx.post(f"{url}/v1/completions", json=body | {"ignore_eos": True}, timeout=300)
    text = reply.json()["choices"][0]["text"] if reply.status_code == 200 else reply.text
    return reply.status_code, text


def test_requests_are_answered_while_a_server_is_killed_and_comes_again(router, servers, start):
    """By the other one, with the same texts; and by both again when it is back."""
    seeds = range(24)
    expected = [sampled(servers[0].url, seed) for seed in seeds]
    assert {status for status, _ in expected} == {200}
    lost = servers[1]
    before = generated(lost)
    with concurrent.futures.ThreadPoolExecutor(6) as clients:
        answers = [clients.submit(sampled, router, seed) for seed in seeds]
        assert until(lambda: generated(lost) > before)
        lost.process.kill()
        assert [answer.result() for answer in answers] == expected
    assert lost.process.wait(60) != 0
    servers[1] = start(int(lost.url.rpartition(":")[2]))

    def is_asked_again() -> bool:
        assert sampled(router, 0) == expected[0]
        return generated(servers[1]) > 0

    assert until(is_asked_again)
    assert [sampled(router, seed) for seed in seeds] == expected
    for server in servers:
        assert metric(server, "thrice_compiles_after_ready_total") == 0
