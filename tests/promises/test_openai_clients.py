"""S10: OpenAI clients just work: the official one, sync, async and streaming, and schema fuzzing of our own OpenAPI."""

import asyncio
import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest
from figures import exactly

from bench.serving.server import Server

pytestmark = [pytest.mark.anyio, pytest.mark.promises("S10", "OpenAI clients just work")]

MESSAGES = [{"role": "user", "content": "Name three colours."}]
CHAT: dict[str, Any] = {"model": "default", "messages": MESSAGES, "max_completion_tokens": 8, "temperature": 0}
SMALL_CAPACITY = 80  # tokens where schemas are fuzzed: sound requests without a limit run until it is full
FUZZING_SECONDS = 1200  # in which schemathesis is to end


def _options(server: Server) -> dict[str, Any]:
    return {"base_url": f"http://127.0.0.1:{server.port}/v1", "api_key": "any", "max_retries": 0, "timeout": 60}


@pytest.fixture
def ai(server):
    with openai.OpenAI(**_options(server)) as client:
        yield client


def _text(reply: Any) -> str:
    return reply.choices[0].message.content


def test_chat(ai):
    reply = ai.chat.completions.create(**CHAT)
    assert _text(reply)
    assert reply.usage.completion_tokens <= 8
    assert (reply.object, reply.choices[0].message.role) == ("chat.completion", "assistant")


def test_chat_stream(ai):
    chunks = list(ai.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == _text(ai.chat.completions.create(**CHAT))
    assert chunks[-1].usage is not None
    assert not chunks[-1].choices
    assert len({chunk.id for chunk in chunks}) == 1


def test_stream_helper(ai):
    with ai.chat.completions.stream(**CHAT, stop=["e", "a"]) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        assert _text(stream.get_final_completion()) == text


async def test_async_requests_at_once_and_a_stream(ai, server):
    async with openai.AsyncOpenAI(**_options(server)) as client:
        replies = await asyncio.gather(*(client.chat.completions.create(**CHAT) for _ in range(4)))
        stream = await client.chat.completions.create(**CHAT, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])
    assert {text, *map(_text, replies)} == {_text(ai.chat.completions.create(**CHAT))}


def test_completion(ai):
    create = functools.partial(ai.completions.create, model="default", max_tokens=5, temperature=0)
    reply = create(prompt="Once upon a time", logprobs=2)
    logprobs = reply.choices[0].logprobs
    assert len(logprobs.token_logprobs) == len(logprobs.tokens) == reply.usage.completion_tokens
    assert all(len(top) >= 2 for top in logprobs.top_logprobs)
    assert "".join(chunk.choices[0].text for chunk in create(prompt="One, two,", stream=True) if chunk.choices)
    assert [choice.index for choice in create(prompt=["One, two,", "A, B,"]).choices] == [0, 1]
    stopped = create(prompt="1, 2, 3, 4, 5,", max_tokens=20, stop=[","]).choices[0]
    assert stopped.finish_reason == "stop"
    assert "," not in stopped.text


def test_log_probabilities(ai):
    content = ai.chat.completions.create(**CHAT, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert all(len(token.top_logprobs) == 3 and token.logprob <= 0 for token in content)


def test_several_choices_and_a_seed(ai):
    create = functools.partial(ai.chat.completions.create, **CHAT | {"temperature": 1})
    choices = create(n=3, seed=5).choices
    assert [choice.index for choice in choices] == [0, 1, 2]
    assert len({choice.message.content for choice in choices}) > 1
    assert len({_text(create(seed=9)) for _ in range(3)}) == 1


def test_penalties_logit_bias_system_message_and_content_parts(ai):
    fields = {"frequency_penalty": 1, "presence_penalty": 0.5, "logit_bias": {"100": -100}, "user": "me"}
    reply = ai.chat.completions.with_raw_response.create(**CHAT, **fields)
    assert reply.headers.get("x-request-id")
    assert _text(reply.parse())
    parts = [{"type": "text", "text": "Say "}, {"type": "text", "text": "hello."}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    assert _text(ai.chat.completions.create(**CHAT | {"messages": messages}))


def test_models(ai):
    names = [model.id for model in ai.models.list()]
    assert ai.models.retrieve(names[0]).id == names[0]
    with pytest.raises(openai.NotFoundError) as caught:
        ai.chat.completions.create(**CHAT | {"model": "gpt-none"})
    assert any(name in str(caught.value) for name in names)


def test_refusals(ai):
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    with pytest.raises(openai.BadRequestError):
        ai.chat.completions.create(**CHAT, tools=[tool])
    with pytest.raises(openai.BadRequestError) as caught:
        ai.chat.completions.create(**CHAT | {"temperature": 9})
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as caught:
        ai.completions.create(model="default", prompt=[5] * 200_000, max_tokens=5)
    assert "200000" in str(caught.value).replace(",", "")


async def test_schema_fuzzing(make_server, quick, tmp_path, expect):
    """Sound and unsound requests that schemathesis makes of our OpenAPI.

    That a sound request is answered is not among its checks: a prompt that does not fit is refused, which no schema can
    say. `--quick` leaves out its walk over every boundary of every field.
    """
    async with make_server("--capacity", str(SMALL_CAPACITY)) as server:
        code, summary = await asyncio.to_thread(_run_schemathesis, server.port, quick, tmp_path)
    expect(exactly("exit code of schema fuzzing", code, 0), over=f"openai {openai.__version__}; schemathesis: {summary}")


def _run_schemathesis(port: int, quick: bool, folder: Path) -> tuple[int, str]:
    """Its exit code and its own summary; 1 when it does not end in FUZZING_SECONDS."""
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"http://127.0.0.1:{port}/openapi.json", "--mode", "all",
        "--max-examples", "4" if quick else "30", "--request-timeout", "30", "--seed", "1", "--no-color", "--workers", "4",
        "--phases", "fuzzing" if quick else "coverage,fuzzing", "--exclude-checks", "positive_data_acceptance",
    ]  # fmt: skip
    try:
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=FUZZING_SECONDS)
    except subprocess.TimeoutExpired:
        return 1, f"did not end in {FUZZING_SECONDS} s"
    output = run.stdout + run.stderr
    lines = [line.strip("= ") for line in output.splitlines() if "generated" in line or "No issues" in line]
    return run.returncode, ", ".join(lines) or output[-300:]
