"""OpenAI's own client against a server (S10): a test module imports all of it, and gives the fixture `address`, an URL."""

import asyncio
from typing import Any

import openai
import pytest

MESSAGES: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello there"}]
CHAT: dict[str, Any] = {"model": "default", "messages": MESSAGES, "max_completion_tokens": 8, "temperature": 0}


def options(address: str) -> dict[str, Any]:
    return {"base_url": f"{address}/v1", "api_key": "any", "max_retries": 8, "timeout": 60}


@pytest.fixture
def ai(address):
    with openai.OpenAI(**options(address)) as client:
        yield client


def text_of(reply: Any) -> str:
    return reply.choices[0].message.content


def streamed(chunks: Any) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_a_chat(ai):
    raw = ai.chat.completions.with_raw_response.create(
        **CHAT | {"temperature": 1}, seed=1, n=2, logprobs=True, top_logprobs=3, presence_penalty=0.5, frequency_penalty=-0.5,
        logit_bias={"100": -100}, stop=["\x00"], top_p=0.9, user="me",
        extra_body={"top_k": 40, "min_p": 0.01, "repetition_penalty": 1.1},
    )  # fmt: skip
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
    assert ai.chat.completions.create(**CHAT | {"messages": longer}).choices[0].finish_reason in ("length", "stop")


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


def test_completions(ai):
    fields: dict[str, Any] = {"model": "default", "prompt": ["One, two,", "A, B,"], "max_tokens": 6, "temperature": 0}
    reply = ai.completions.create(**fields, logprobs=2)
    assert [choice.index for choice in reply.choices] == [0, 1]
    logprobs = reply.choices[0].logprobs
    assert len(logprobs.token_logprobs) == len(logprobs.tokens) <= 6
    assert all(len(top) >= 2 for top in logprobs.top_logprobs)
    texts = ["", ""]
    for chunk in ai.completions.create(**fields, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in reply.choices]
    stop = texts[0][len(texts[0]) // 2]
    stopped = ai.completions.create(**fields | {"prompt": "One, two,", "stop": [stop]}).choices[0]
    assert (stopped.finish_reason, stopped.text) == ("stop", texts[0][: texts[0].index(stop)])


def test_many_at_once(address):
    async def ask_all():
        async with openai.AsyncOpenAI(**options(address)) as client:

            async def ask():
                return text_of(await client.chat.completions.create(**CHAT))

            async def stream():
                return streamed([chunk async for chunk in await client.chat.completions.create(**CHAT, stream=True)])

            return await asyncio.gather(*(work() for work in (ask, stream) * 3))

    assert len(set(asyncio.run(ask_all()))) == 1


def test_several_choices_and_a_seed(ai):
    fields = CHAT | {"temperature": 1}
    assert len({choice.message.content for choice in ai.chat.completions.create(**fields, n=3, seed=5).choices}) > 1
    assert len({text_of(ai.chat.completions.create(**fields, seed=9)) for _ in range(3)}) == 1


def test_models(ai):
    names = [model.id for model in ai.models.list()]
    assert ai.models.retrieve(names[0]).owned_by == "thrice"
    with pytest.raises(openai.NotFoundError) as caught:
        ai.chat.completions.create(**CHAT | {"model": "gpt-none"})
    assert any(name in str(caught.value) for name in names)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 3}, "temperature"), ({"messages": []}, "messages"),
        ({"tools": [{"type": "function", "function": {"name": "f g", "parameters": {}}}]}, "tools"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
    ],
)  # fmt: skip
def test_errors_are_the_clients_own(ai, fields, param):
    with pytest.raises(openai.BadRequestError) as caught:
        ai.chat.completions.create(**CHAT | fields)
    assert caught.value.param.startswith(param)
    assert caught.value.body["message"]
    with pytest.raises(openai.BadRequestError, match=r"200,?000"):
        ai.completions.create(model="default", prompt=[5] * 200_000, max_tokens=5)
