"""The 48 kinds of call that OpenAI's own client makes, each a case: 47 work, and best_of, several tries, is refused.

None of them compiles a program, the first of its kind neither.
"""

import asyncio
import json
from typing import Any, Literal

import openai
import pydantic
import pytest

from tests.serve.tiny_server import until

pytestmark = pytest.mark.whole

MODEL = "gpt-4o-mini"  # by which the example of another asks
USER: dict[str, Any] = {"role": "user", "content": "Hello there, how are you?"}
MESSAGES: list[Any] = [USER]
PROMPT = "Hello there, how"


class Visit(pydantic.BaseModel, extra="forbid"):
    city: Literal["Rome", "Oslo"]
    days: Literal[1, 2, 30]


TOOLS: Any = [openai.pydantic_function_tool(Visit)]
RESPONSE: dict[str, Any] = {"model": MODEL, "input": "Hello there", "max_output_tokens": 8, "temperature": 0}


@pytest.fixture
def options(server):
    return {"base_url": f"{server.url}/v1", "api_key": "any", "max_retries": 20, "timeout": 300}


@pytest.fixture
def ai(options, server):
    with openai.OpenAI(**options) as client:
        yield client
    assert until(lambda: server.load == (0, 0, 0))
    assert server.state.engine.compiles_after_ready == 0


@pytest.fixture
def chat(ai):
    return lambda **fields: ai.chat.completions.create(
        **{"model": MODEL, "messages": MESSAGES, "max_tokens": 8} | fields
    )


@pytest.fixture
def complete(ai):
    return lambda **fields: ai.completions.create(
        **{"model": MODEL, "prompt": PROMPT, "max_tokens": 4} | fields
    )


def text_of(reply: Any) -> str:
    return reply.choices[0].message.content


def streamed(chunks: Any) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_chat(chat):
    reply = chat(temperature=0)
    assert text_of(reply)
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_stream(chat):
    assert streamed(chat(stream=True, seed=1)) == text_of(chat(seed=1))


def test_usage_in_a_stream(chat):
    *_, last = chat(stream=True, seed=1, stream_options={"include_usage": True})
    assert last.choices == []
    assert last.usage.total_tokens == chat(seed=1).usage.total_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_async(ai, options, stream):
    async def ask() -> str:
        async with openai.AsyncOpenAI(**options) as client:
            reply: Any = await client.chat.completions.create(
                model=MODEL, messages=MESSAGES, max_tokens=8, seed=1, stream=stream
            )
            return streamed([chunk async for chunk in reply]) if stream else text_of(reply)

    whole = ai.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=8, seed=1)
    assert asyncio.run(ask()) == text_of(whole)


def test_sixty_at_once(options, server):
    """More than slots and queue hold: the client asks again as Retry-After says."""

    async def ask_all() -> list[Any]:
        async with openai.AsyncOpenAI(**options) as client:
            ask = lambda: client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=2)
            return await asyncio.gather(*(ask() for _ in range(60)))

    assert len(asyncio.run(ask_all())) == 60
    assert server.state.engine.compiles_after_ready == 0


def test_logprobs(chat):
    reply = chat(logprobs=True, top_logprobs=3)
    assert [len(each.top_logprobs) for each in reply.choices[0].logprobs.content] == [
        3
    ] * reply.usage.completion_tokens


def test_several_choices(chat):
    assert [choice.index for choice in chat(n=3).choices] == [0, 1, 2]


def test_a_list_of_stops(chat):
    text = text_of(chat(seed=1))
    assert text_of(chat(seed=1, stop=[text[2:4], "\x00"])) == text[: text.index(text[2:4])]


def test_a_seed_with_sampling_and_penalties(chat):
    fields = {"seed": 7, "temperature": 1.1, "top_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.3}
    assert text_of(chat(**fields)) == text_of(chat(**fields))


def test_completions(complete):
    assert complete(temperature=0).choices[0].text


def test_models_list(ai):
    assert MODEL in [model.id for model in ai.models.list()]


def test_models_retrieve(ai):
    """By any of its names; it says its first."""
    assert ai.models.retrieve(MODEL).id == "tiny"


def test_the_stream_helper(ai, chat):
    """It takes no answer that was cut off for one."""
    text = text_of(chat(seed=1))
    fields: Any = {"model": MODEL, "messages": MESSAGES, "max_tokens": 8, "seed": 1, "stop": text[2:4]}
    with ai.chat.completions.stream(**fields) as stream:
        assert text_of(stream.get_final_completion()) == text[: text.index(text[2:4])]


ACCEPTED = {
    "max_completion_tokens": {"max_tokens": openai.omit, "max_completion_tokens": 5},
    "max_tokens twice": {"max_completion_tokens": 8},
    "more max_tokens than context": {"max_tokens": 1_000_000, "stop": ["e"]},
    "user, metadata and store false": {"user": "me", "metadata": {"a": "b"}, "store": False},
    "store true": {"store": True},
    "reasoning_effort": {"reasoning_effort": "low"},
    "verbosity": {"verbosity": "low"},
    "no tools": {"tools": []},
    "tools auto": {"tools": TOOLS},
    "top_p 0": {"top_p": 0},
    "empty assistant content": {"messages": [USER, {"role": "assistant", "content": ""}, USER]},
    "message name": {"messages": [USER | {"name": "bob"}]},
    "cache_control": {
        "messages": [
            USER | {"content": [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]},
        ]
    },
    "chat_template_kwargs": {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}},
    "extra fields of other servers": {
        "extra_body": {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": False}
    },
}


@pytest.mark.parametrize("fields", ACCEPTED.values(), ids=ACCEPTED)
def test_a_field_is_accepted(chat, fields):
    assert chat(**fields).choices[0].finish_reason in ("stop", "length", "tool_calls")


def test_prefill_of_the_answer(chat):
    """With the flags of other servers; without them a turn of the assistant's may be the last too."""
    messages = [USER, {"role": "assistant", "content": "I am"}]
    more = {"continue_final_message": True, "add_generation_prompt": False}
    goes_on, asks = (
        chat(messages=messages, temperature=0, extra_body=body).usage.prompt_tokens for body in (more, {})
    )
    assert goes_on < asks


def test_a_message_given_back(chat):
    """As the object that it was, and as a dictionary."""
    message = chat(seed=1).choices[0].message
    longer = [
        chat(messages=[USER, each, USER]).usage.prompt_tokens for each in (message, message.model_dump())
    ]
    assert longer[0] == longer[1]


def test_min_tokens(chat):
    assert chat(extra_body={"min_tokens": 8}).usage.completion_tokens == 8


def test_echo(complete):
    assert complete(echo=True).choices[0].text.startswith(PROMPT)


def test_echo_with_logprobs_and_no_completion(complete):
    """How lm-eval asks for the log-probabilities of a text."""
    reply = complete(echo=True, logprobs=1, max_tokens=0)
    scores = reply.choices[0].logprobs
    assert reply.choices[0].text == PROMPT == "".join(scores.tokens)
    assert scores.token_logprobs[0] is None
    assert all(value < 0 for value in scores.token_logprobs[1:])
    assert reply.usage.completion_tokens == 0


def test_embeddings(ai, server):
    reply = ai.embeddings.create(model=MODEL, input=["Hello", "there"])
    assert [sum(number**2 for number in each.embedding) for each in reply.data] == pytest.approx(
        [1, 1], abs=1e-5
    )
    assert len(reply.data[0].embedding) == server.engine.cfg.width
    reply = ai.embeddings.create(model=MODEL, input="Hello", dimensions=4, encoding_format="float")
    assert len(reply.data[0].embedding) == 4


def test_responses(ai):
    reply = ai.responses.create(**RESPONSE)
    assert reply.output_text
    assert 1 <= reply.usage.output_tokens <= 8


def test_responses_streamed(ai):
    *_, last = events = list(ai.responses.create(**RESPONSE, stream=True))
    assert last.type in ("response.completed", "response.incomplete")
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert deltas == last.response.output_text == ai.responses.create(**RESPONSE).output_text


@pytest.fixture
def called(chat):
    """A message with a call that was required, of a finite schema: an untrained model ends it."""
    reply = chat(
        tools=TOOLS, tool_choice="required", parallel_tool_calls=False, max_tokens=200, temperature=0
    )
    assert reply.choices[0].finish_reason == "tool_calls"
    return reply.choices[0].message


def test_tools_required(called):
    assert called.tool_calls[0].function.name == "Visit"
    assert Visit.model_validate_json(called.tool_calls[0].function.arguments)


def test_a_history_with_tool_calls(called, chat):
    result = {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": "It is sunny."}
    for message in (called, called.model_dump(), called.model_dump(exclude_none=True)):
        assert chat(messages=[USER, message, result], tools=TOOLS).choices


def test_a_history_with_null_content(called, chat):
    call = called.tool_calls[0].model_dump()
    result = {
        "role": "tool",
        "tool_call_id": call["id"],
        "content": [{"type": "text", "text": "It is sunny."}],
    }
    assert chat(
        messages=[USER, {"role": "assistant", "content": None, "tool_calls": [call]}, result, USER]
    ).choices


def test_json_object(chat):
    """An untrained model may write keys until its answer is cut off, and says so."""
    answer = chat(response_format={"type": "json_object"}, max_tokens=40, temperature=0).choices[0]
    assert answer.finish_reason == "length" or isinstance(json.loads(answer.message.content), dict)
    assert answer.message.content.startswith("{")


def test_json_schema(chat):
    schema = {"name": "visit", "strict": True, "schema": Visit.model_json_schema()}
    answer = chat(response_format={"type": "json_schema", "json_schema": schema}, max_tokens=200)
    assert Visit.model_validate_json(text_of(answer))


# it has no type for `parsed` in a message
@pytest.mark.filterwarnings("ignore:Pydantic serializer")
def test_the_clients_parse(ai):
    fields: Any = {"model": MODEL, "messages": MESSAGES, "max_tokens": 200}
    message = ai.chat.completions.parse(**fields, response_format=Visit).choices[0].message
    assert isinstance(message.parsed, Visit)
    fields["messages"] = [USER, message, USER]
    assert ai.chat.completions.parse(**fields, response_format=Visit).choices[0].message.parsed


REFUSED = {
    "suffix": (
        lambda ai, chat: ai.completions.create(model=MODEL, prompt=PROMPT, suffix="b"),
        "leave it out",
    ),
    "another model's name": (lambda ai, chat: chat(model="gpt-none"), "'gpt-4o-mini'.*ask for that"),
    "an image part": (
        lambda ai, chat: chat(
            messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]
        ),
        r"messages.*content.*reads text alone",
    ),
    "moderations": (lambda ai, chat: ai.moderations.create(input="a"), "/v1/moderations.*/openapi.json"),
    "best_of": (
        lambda ai, chat: ai.completions.create(model=MODEL, prompt=PROMPT, best_of=2),
        "best_of.*use n",
    ),
}


@pytest.mark.parametrize("call", REFUSED)
def test_a_sentence_names_the_field_and_says_what_to_do(ai, chat, call):
    """But for the last, it is as good as an answer."""
    ask, sentence = REFUSED[call]
    with pytest.raises((openai.BadRequestError, openai.NotFoundError), match=sentence):
        ask(ai, chat)
