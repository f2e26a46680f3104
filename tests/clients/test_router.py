"""`vllm-router` before two servers: what comes through it is what each of them answers. At night, where it is installed."""

import socket
import subprocess
import sys
import tempfile
from typing import Any

import httpx
import openai
import pytest
from tiny_server import TinyServer, until

pytestmark = [
    pytest.mark.night,
    pytest.mark.skipif(sys.platform != "linux", reason="vllm-router has wheels for Linux alone"),
]
MODEL = "gpt-4o-mini"
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


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


@pytest.fixture(scope="module")
def servers(server):
    with TinyServer(context=server.engine.capacity) as other:
        other.state.names = server.state.names
        yield [server, other]
        assert other.state.engine.compiles_after_ready == 0


@pytest.fixture(scope="module")
def router(servers):
    """Its address. Each of its requests goes to the server that the one before did not go to."""
    pytest.importorskip("vllm_router", reason="tests/clients/requirements.txt is not installed")
    url = f"http://127.0.0.1:{free_port()}"
    words = ["--host", "127.0.0.1", "--port", url.rpartition(":")[2], "--policy", "round_robin"]
    words += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())]
    words += ["--worker-urls", *(server.url for server in servers)]

    def is_up() -> bool:
        try:
            return httpx.get(f"{url}/health").status_code == 200
        except httpx.HTTPError:
            return False

    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "-m", "vllm_router.launch_router", *words]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            is_ready = until(is_up)
            log.seek(0)
            assert is_ready, log.read()
            yield url
        finally:
            process.terminate()
            process.wait(60)


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


def test_every_kind_of_request_comes_through(router, servers):
    direct = ask_all(servers[0].url)
    before = [server.engine.steps_decoded for server in servers]
    assert ask_all(router) == direct
    assert ask_all(router) == direct
    assert all(server.engine.steps_decoded > count for server, count in zip(servers, before))
    assert httpx.get(f"{router}/health").status_code == 200
