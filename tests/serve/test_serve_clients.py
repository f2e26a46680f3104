"""OpenAI's own client, sync, async and streaming, and every request that our OpenAPI allows or forbids (S10)."""

import asyncio
import json
import re
import subprocess
import sys

import openai
import pytest
from tiny_server import SLOTS, TinyServer, good

from stages.serve.api.requests import CompletionFields

TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello there"}]


@pytest.fixture
def ai(tiny_server):
    with openai.OpenAI(base_url=f"{tiny_server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_a_chat(ai):
    reply = ai.chat.completions.create(
        model="tiny", messages=TURNS, max_completion_tokens=8, temperature=0, seed=1, n=2, logprobs=True, top_logprobs=2,
        presence_penalty=0.5, frequency_penalty=-0.5, logit_bias={"72": 1}, stop=["\x00"], top_p=0.9, user="me",
        extra_body={"top_k": 40, "min_p": 0.01, "repetition_penalty": 1.1},
    )  # fmt: skip
    assert len(reply.choices) == 2
    assert reply.usage.prompt_tokens_details is not None
    assert len(reply.choices[0].logprobs.content) == reply.usage.completion_tokens // 2
    answer = reply.choices[0].message
    again = ai.chat.completions.create(
        model="default", messages=[*TURNS, answer.model_dump(), {"role": "user", "content": "1234"}], max_tokens=2
    )
    assert again.choices[0].finish_reason in ("length", "stop")


def test_a_chat_streamed(ai):
    fields = {"model": "tiny", "messages": TURNS, "max_tokens": 20, "temperature": 1, "seed": 3}
    reply = ai.chat.completions.create(**fields)
    chunks = list(ai.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == reply.choices[0].message.content
    assert chunks[-1].usage == reply.usage
    # The helper that puts an answer together; it takes none that was cut off for one.
    with ai.chat.completions.stream(**fields | {"stop": text[5:7]}) as stream:
        assert stream.get_final_completion().choices[0].message.content == text[: text.index(text[5:7])]


def test_completions(ai):
    fields = {"model": "tiny", "prompt": ["Hello", "there"], "max_tokens": 6, "temperature": 0, "logprobs": 2}
    reply = ai.completions.create(**fields)
    assert len(reply.choices) == 2
    assert len(reply.choices[0].logprobs.tokens) == 6
    texts = ["", ""]
    for chunk in ai.completions.create(**fields, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in reply.choices]


def test_many_at_once(tiny_server):
    fields = {"model": "tiny", "messages": TURNS, "max_tokens": 8, "temperature": 0}

    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f"{tiny_server.url}/v1", api_key="none", max_retries=8) as client:

            async def ask():
                return (await client.chat.completions.create(**fields)).choices[0].message.content or ""

            async def stream():
                chunks = [chunk async for chunk in await client.chat.completions.create(**fields, stream=True)]
                return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

            return await asyncio.gather(*(work() for work in (ask, stream) * SLOTS))

    assert len(set(asyncio.run(ask_all()))) == 1


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"model": "gpt-5"}, openai.NotFoundError), ({"temperature": 3}, openai.BadRequestError),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError),
        ({"response_format": {"type": "json_object"}}, openai.BadRequestError), ({"messages": []}, openai.BadRequestError),
    ],
)  # fmt: skip
def test_errors_are_the_clients_own(ai, fields, error):
    with pytest.raises(error) as caught:
        ai.chat.completions.create(**{"model": "tiny", "messages": TURNS, **fields})
    assert caught.value.param
    assert caught.value.body["message"]


def test_every_request_that_our_openapi_allows_or_forbids(tiny_server, client, tmp_path):
    """Schemathesis sends both to every operation, and holds statuses, types and bodies of replies to what is written.

    That a sound request is answered is not among its checks: a prompt that does not fit is refused, which no schema can say.
    Fields that both kinds of completion share are sent to /v1/completions alone; promise S10 sends them to both.
    """
    document = good(client.get("/openapi.json"))
    for name in {*CompletionFields.__struct_fields__} - {"model"}:
        del document["components"]["schemas"]["ChatRequest"]["properties"][name]
    (tmp_path / "openapi.json").write_text(json.dumps(document))
    result = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "run", "openapi.json", "--url", tiny_server.url, "--mode", "all",
         "--phases", "coverage,fuzzing", "--max-examples", "8", "--exclude-checks", "positive_data_acceptance", "--seed", "1",
         "--no-color", "--request-timeout", "30"],
        cwd=tmp_path, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr
    generated, passed = map(int, re.findall(r"(\d+) generated, (\d+) passed", result.stdout)[0])
    assert passed > 500
    assert generated - passed < generated / 4  # skipped ones


def test_a_wrong_key():
    with TinyServer(keys=("right",), warm=False) as server:
        with pytest.raises(openai.AuthenticationError), openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong") as client:
            client.models.list()
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="right") as client:
            assert [model.id for model in client.models.list()] == ["tiny"]
            assert client.models.retrieve("tiny").owned_by == "thrice"
