"""S10: OpenAI clients just work: the official one, whole and streaming, and schema fuzzing of our own OpenAPI.

Each kind of call that it makes: tests/clients/test_kinds.py.
"""

import asyncio
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.promises.figures import exactly

pytestmark = [pytest.mark.anyio, pytest.mark.promises(name="S10")]

# tokens where schemas are fuzzed: sound requests without a limit run until it is full
SMALL_CAPACITY = 80
FUZZING_SECONDS = 1200  # in which schemathesis is to end

MESSAGES: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello there"}]
TOO_LONG: Any = [{"role": "user", "content": "word " * 50_000}]
CHAT: dict[str, Any] = {
    "model": "default",
    "messages": MESSAGES,
    "max_completion_tokens": 8,
    "temperature": 0,
}


@pytest.fixture
def options(server) -> dict[str, Any]:
    return {
        "base_url": f"http://127.0.0.1:{server.port}/v1",
        "api_key": "any",
        "max_retries": 8,
        "timeout": 60,
    }


@pytest.fixture
def ai(options):
    with openai.OpenAI(**options) as client:
        yield client


def text_of(reply: Any) -> str:
    return reply.choices[0].message.content


def streamed(chunks: Any) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_a_chat(ai):
    raw = ai.chat.completions.with_raw_response.create(
        **CHAT | {"temperature": 1},
        seed=1,
        n=2,
        logprobs=True,
        top_logprobs=3,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={"100": -100},
        stop=["\x00"],
        top_p=0.9,
        user="me",
        extra_body={"top_k": 40, "min_p": 0.01, "repetition_penalty": 1.1},
    )
    assert raw.headers.get("x-request-id")
    reply = raw.parse()
    assert (reply.object, [choice.index for choice in reply.choices]) == ("chat.completion", [0, 1])
    scores = [each for choice in reply.choices for each in choice.logprobs.content]
    assert len(scores) == reply.usage.completion_tokens <= 16
    assert all(len(each.top_logprobs) == 3 and each.logprob <= 0 for each in scores)
    assert reply.usage.prompt_tokens_details is not None
    answer = reply.choices[0].message
    assert answer.role == "assistant"
    parts = [{"type": "text", "text": "Say "}, {"type": "text", "text": "hello."}]
    longer = [*MESSAGES, answer.model_dump(), {"role": "user", "content": parts}]
    assert ai.chat.completions.create(**CHAT | {"messages": longer}).choices[0].finish_reason in (
        "length",
        "stop",
    )


def test_a_chat_streamed(ai):
    fields = CHAT | {"max_completion_tokens": 20, "temperature": 1, "seed": 3}
    reply = ai.chat.completions.create(**fields)
    chunks = list(ai.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = streamed(chunks)
    assert text == text_of(reply)
    assert (chunks[-1].usage, chunks[-1].choices) == (reply.usage, [])
    assert len({chunk.id for chunk in chunks}) == 1
    # The helper that puts an answer together; it takes none that was cut off for one.
    with ai.chat.completions.stream(**fields | {"stop": text[5:7]}) as stream:
        assert text_of(stream.get_final_completion()) == text[: text.index(text[5:7])]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"messages": []}, "messages"),
        ({"tools": [{"type": "function", "function": {"name": "f g", "parameters": {}}}]}, "tools"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"messages": TOO_LONG}, "messages"),
    ],
)
def test_errors_are_the_clients_own(ai, fields, param):
    with pytest.raises(openai.BadRequestError) as caught:
        ai.chat.completions.create(**CHAT | fields)
    assert caught.value.param.startswith(param)
    assert caught.value.body["message"]


async def test_schema_fuzzing(make_server, quick, tmp_path, expect):
    """Sound and unsound requests that schemathesis makes of our OpenAPI.

    That a sound request is answered is not among its checks: a prompt that does not fit is refused,
    which no schema can say. `--quick` leaves out its walk over every boundary of every field.
    """
    async with make_server("--capacity", str(SMALL_CAPACITY)) as server:
        code, summary = await asyncio.to_thread(_run_schemathesis, server.port, quick, tmp_path)
    expect(
        exactly("exit code of schema fuzzing", code, 0),
        over=f"openai {openai.__version__}; schemathesis: {summary}",
    )


def _run_schemathesis(port: int, quick: bool, folder: Path) -> tuple[int, str]:
    """Its exit code and its own summary; 1 when it does not end in FUZZING_SECONDS."""
    command = [
        sys.executable,
        "-m",
        "schemathesis.cli",
        "run",
        f"http://127.0.0.1:{port}/openapi.json",
        "--mode",
        "all",
        "--max-examples",
        "4" if quick else "30",
        "--request-timeout",
        "30",
        "--seed",
        "1",
        "--no-color",
        "--workers",
        "4",
        "--phases",
        "fuzzing" if quick else "coverage,fuzzing",
        "--exclude-checks",
        "positive_data_acceptance",
    ]
    try:
        run = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=False, timeout=FUZZING_SECONDS
        )
    except subprocess.TimeoutExpired:
        return 1, f"did not end in {FUZZING_SECONDS} s"
    output = run.stdout + run.stderr
    lines = [line.strip("= ") for line in output.splitlines() if re.search(r"\d generated|No issues", line)]
    return run.returncode, ", ".join(lines) or output[-300:]
