"""Dialects beside OpenAI's completions, each through its own client's first example: only the address is another."""

import datetime
import json
from typing import Any, Literal

import anthropic
import ollama
import openai
import pydantic
import pytest

from stages.serve.api.routes import ROUTES
from stages.serve.api.template_variables import template_variables
from tests.serve.tiny_server import events, good, refused, say

HELLO = [{"role": "user", "content": "Hello there"}]
CLAUDE, GEMMA, GPT = "claude-opus-5", "gemma3", "gpt-5"


@pytest.fixture(autouse=True)
def named(tiny_server, monkeypatch):
    """As `--name` names it, for examples whose model nobody changed; greedy, as answers are
    compared.
    """
    monkeypatch.setattr(tiny_server.state, "names", ["tiny", CLAUDE, GEMMA, GPT])
    monkeypatch.setattr(tiny_server.state, "sampling", tiny_server.state.sampling.__class__(temperature=0))


@pytest.fixture
def answer(client):
    """The text that the chat route answers to HELLO, in at most so many tokens."""
    return lambda most, **more: good(client.chat(most=most, **more))["choices"][0]["message"]["content"]


@pytest.fixture
def claude(tiny_server):
    with anthropic.Anthropic(base_url=tiny_server.url, api_key="any") as client:
        yield client


@pytest.fixture
def gpt(tiny_server):
    with openai.OpenAI(base_url=f"{tiny_server.url}/v1", api_key="any") as client:
        yield client


@pytest.fixture
def gemma(tiny_server):
    return ollama.Client(host=tiny_server.url)


def test_responses(gpt, answer):
    response = gpt.responses.create(model=GPT, input="Hello there", max_output_tokens=9)
    assert response.output_text == answer(9)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.usage.output_tokens == 9
    history = [
        *HELLO,
        *response.output,
        {"role": "user", "content": [{"type": "input_text", "text": "there"}]},
    ]
    longer = gpt.responses.create(
        model=GPT, instructions="Be brief.", input=history, max_output_tokens=3, store=False
    )
    assert longer.usage.input_tokens > response.usage.total_tokens
    assert (longer.instructions, longer.store) == ("Be brief.", False)
    counted = gpt.responses.input_tokens.count(model=GPT, instructions="Be brief.", input=history)
    assert (counted.object, counted.input_tokens) == ("response.input_tokens", longer.usage.input_tokens)


def test_responses_streamed(gpt, answer):
    text = answer(30)
    with gpt.responses.stream(model=GPT, input=HELLO, max_output_tokens=30) as stream:
        events = list(stream)
        final = (
            stream.get_final_response() if events[-1].type == "response.completed" else events[-1].response
        )
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type.removeprefix("response.") for event in events if "delta" not in event.type] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        final.status,
    ]
    assert (
        "".join(event.delta for event in events if event.type.endswith("delta")) == text == final.output_text
    )


WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "get_weather",
    "description": "Tells it.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Oslo"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


@pytest.fixture
def wide_gpt(roomy):
    with openai.OpenAI(base_url=f"{roomy.url}/v1", api_key="any") as client:
        yield client


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_weather"}])
def test_a_response_calls_a_function(wide_gpt, choice):
    fields: dict[str, Any] = {
        "model": "tiny",
        "input": HELLO,
        "tools": [WEATHER],
        "tool_choice": choice,
        "temperature": 0,
    }
    response = wide_gpt.responses.create(**fields, parallel_tool_calls=False, max_output_tokens=200)
    (call,) = response.output
    assert (call.type, call.name, response.status) == ("function_call", "get_weather", "completed")
    assert json.loads(call.arguments)["city"] in ("Rome", "Oslo")
    with wide_gpt.responses.stream(**fields, parallel_tool_calls=False, max_output_tokens=200) as stream:
        events = list(stream)
    (again,) = events[-1].response.output
    assert (again.name, again.arguments) == (call.name, call.arguments)
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == call.arguments
    assert [event.type.removeprefix("response.") for event in events if "delta" not in event.type] == [
        "created",
        "in_progress",
        "output_item.added",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny."}
    final = wide_gpt.responses.create(
        **fields | {"input": [*HELLO, call, result], "tool_choice": "none"}, max_output_tokens=5
    )
    assert final.output[0].type == "message"
    assert final.usage.input_tokens > len(call.arguments)
    for dumped in (call.model_dump(), call.model_dump(by_alias=True)):
        asked = fields | {"input": [*HELLO, dumped, result], "tool_choice": "none"}
        same = wide_gpt.responses.create(**asked, max_output_tokens=5)
        assert same.output_text == final.output_text


class Visit(
    pydantic.BaseModel, extra="forbid"
):  # other keys a model without sense may write until its context is full
    city: Literal["Rome", "Oslo"]
    days: Literal[1, 2, 30]


def test_answers_satisfy_a_schema_in_the_dialects_that_have_a_field_for_it(wide_gpt, roomy):
    parsed = wide_gpt.responses.parse(model="tiny", input="Hello there", text_format=Visit, temperature=1.5)
    assert (parsed.output_parsed.city in ("Rome", "Oslo"), parsed.text.format.name) == (True, "Visit")
    chat = ollama.Client(host=roomy.url)
    for answer in (
        chat.chat("tiny", HELLO, format=Visit.model_json_schema()).message.content,
        chat.generate("tiny", "Hello there", format=Visit.model_json_schema()).response,
    ):
        assert Visit.model_validate_json(answer).days in (1, 2, 30)
    assert chat.generate("tiny", "a", format="json", options={"num_predict": 2}).response.startswith("{")
    with pytest.raises(ollama.ResponseError, match=r"format: .*minimum"):
        chat.chat("tiny", HELLO, format={"type": "integer", "minimum": 5, "maximum": 3})
    text: Any = {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}
    with pytest.raises(openai.BadRequestError, match=r"text\.format\.schema: .*not"):
        wide_gpt.responses.create(model="tiny", input="a", text=text)


def test_anthropics_messages_satisfy_a_schema(roomy):
    with anthropic.Anthropic(base_url=roomy.url, api_key="any") as client:
        asked: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 200}
        assert client.messages.parse(**asked, output_format=Visit).parsed_output.days in (1, 2, 30)
        with client.messages.stream(**asked, output_format=Visit) as stream:
            assert stream.get_final_message().parsed_output.days in (1, 2, 30)
        bad: Any = {"format": {"type": "json_schema", "schema": {"not": {}}}, "effort": "low"}
        with pytest.raises(anthropic.BadRequestError, match=r"output_config\.format\.schema"):
            client.messages.create(**asked, output_config=bad)


REASONING: dict[str, Any] = {
    "type": "reasoning",
    "id": "rs_1",
    "summary": [{"type": "summary_text", "text": "I greet."}],
    "content": [{"type": "reasoning_text", "text": "A greeting."}],
    "encrypted_content": "gAAAA",
    "status": "completed",
}


def test_a_response_repeats_how_it_was_sampled(gpt, tiny_server, monkeypatch):
    monkeypatch.setattr(
        tiny_server.state, "sampling", tiny_server.state.sampling.__class__(temperature=0.3, top_p=0.8)
    )
    default = gpt.responses.create(model=GPT, input="Hello there", max_output_tokens=2)
    options: Any = {"include_obfuscation": False}
    events = gpt.responses.create(
        model=GPT, input="Hello there", max_output_tokens=2, stream=True, stream_options=options
    )
    assert [event.type for event in events][-1] == "response.incomplete"
    assert (default.temperature, default.top_p, default.truncation, default.background) == (
        0.3,
        0.8,
        "disabled",
        False,
    )
    own = gpt.responses.create(
        model=GPT,
        input="Hello there",
        max_output_tokens=2,
        temperature=0,
        top_p=0.5,
        truncation="auto",
        include=[],
    )
    assert (own.temperature, own.top_p, own.truncation, own.top_logprobs) == (0, 0.5, "auto", 0)


def test_reasoning_among_the_items_changes_nothing(gpt):
    plain: Any = {"model": GPT, "max_output_tokens": 6}
    answer = gpt.responses.create(**plain, input=HELLO).output_text
    for item in (
        REASONING,
        REASONING | {"content": None, "encrypted_content": None},
        REASONING | {"content": []},
    ):
        reply = gpt.responses.with_raw_response.create(
            **plain, input=[*HELLO, item], include=["reasoning.encrypted_content"]
        )
        assert (reply.parse().output_text, reply.headers["x-ignored-fields"]) == (answer, "input.reasoning")
        counted = gpt.responses.input_tokens.with_raw_response.count(model=GPT, input=[*HELLO, item])
        assert counted.headers["x-ignored-fields"] == "input.reasoning"
    with pytest.raises(openai.BadRequestError, match=r"input\[0\]\.content has no parts"):
        gpt.responses.create(**plain, input=[{"role": "user", "content": []}])


def test_what_a_response_includes(gpt, client):
    """Log-probabilities are those of a chat; of tools that there are none of there is nothing to
    include.
    """
    fields: Any = {"model": GPT, "input": "Hello there", "max_output_tokens": 5, "top_logprobs": 2}
    include = ["message.output_text.logprobs", "file_search_call.results", "web_search_call.action.sources"]
    chat = good(client.chat(logprobs=True, top_logprobs=2))["choices"][0]["logprobs"]["content"]
    reply = gpt.responses.create(**fields, include=include)
    assert [each.model_dump() for each in reply.output[0].content[0].logprobs] == chat
    *_, last = events = list(gpt.responses.create(**fields, include=include, stream=True))
    parts = [
        each for event in events if event.type == "response.output_text.delta" for each in event.logprobs
    ]
    assert [part.token for part in parts] == [each["token"] for each in chat]
    assert last.response.output[0].content[0].logprobs == reply.output[0].content[0].logprobs
    history = [*HELLO, *reply.output, *HELLO]
    assert (
        gpt.responses.create(model=GPT, input=history, max_output_tokens=1).usage.input_tokens
        > reply.usage.input_tokens
    )
    for more, words in (
        ({}, "top_logprobs is given without"),
        ({"include": include, "tools": [WEATHER]}, "beside tools"),
    ):
        with pytest.raises(openai.BadRequestError, match=words):
            gpt.responses.create(**fields, **more)
    with pytest.raises(openai.BadRequestError, match="include"):
        gpt.responses.create(**fields, include=["weather"])


def test_a_model_that_must_call_ends(roomy):
    """A call is required and several are allowed: one without sense would call until the context is
    full.
    """
    with openai.OpenAI(base_url=f"{roomy.url}/v1", api_key="any") as client:
        answer = client.chat.completions.create(
            model="tiny",
            messages=HELLO,
            tools=[openai.pydantic_function_tool(Visit)],
            tool_choice="required",
            temperature=0,
            logit_bias={roomy.model.tokenizer.eos_id: -100},
        )
    assert answer.choices[0].finish_reason == "tool_calls"
    assert 1 <= len(answer.choices[0].message.tool_calls) <= 8


def test_a_response_may_call_or_speak(wide_gpt):
    response = wide_gpt.responses.create(
        model="tiny", input="Hello there", tools=[WEATHER], max_output_tokens=9, temperature=0
    )
    assert {item.type for item in response.output} <= {"message", "function_call"}
    with pytest.raises(openai.BadRequestError, match="no tool 'other'"):
        wide_gpt.responses.create(
            model="tiny", input="a", tools=[WEATHER], tool_choice={"type": "function", "name": "other"}
        )


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
    ],
)
def test_a_response_to_what_is_not_sent(client, fields, param):
    problem = refused(client.post("/v1/responses", json={"input": "Hello there"} | fields))
    assert problem["param"] == param
    assert "This server remembers nothing" in problem["message"]


def test_messages(claude, answer):
    message = claude.messages.create(model=CLAUDE, max_tokens=9, messages=HELLO)
    assert (message.content[0].text, message.stop_reason) == (answer(9), "max_tokens")
    assert message.usage.input_tokens + message.usage.cache_read_input_tokens > 0
    stop = answer(9)[2:4]
    stopped = claude.messages.create(model=CLAUDE, max_tokens=9, messages=HELLO, stop_sequences=[stop])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", stop)
    blocks = [{"type": "text", "text": "Hello there", "cache_control": {"type": "ephemeral"}}]
    again = claude.messages.create(model=CLAUDE, max_tokens=9, messages=[{"role": "user", "content": blocks}])
    assert again.content == message.content
    counted = claude.messages.count_tokens(model=CLAUDE, messages=HELLO)
    assert counted.input_tokens == again.usage.input_tokens + again.usage.cache_read_input_tokens
    system = claude.messages.create(model=CLAUDE, max_tokens=9, messages=HELLO, system="Be brief.")
    assert system.usage.input_tokens + system.usage.cache_read_input_tokens > counted.input_tokens


def test_messages_streamed(claude, answer):
    with claude.messages.stream(model=CLAUDE, max_tokens=30, messages=HELLO) as stream:
        text = "".join(stream.text_stream)
        message = stream.get_final_message()
    assert text == message.content[0].text == answer(30)
    whole = claude.messages.create(model=CLAUDE, max_tokens=30, messages=HELLO)
    assert (whole.content[0].text, whole.stop_reason) == (text, message.stop_reason)
    assert whole.usage.output_tokens == message.usage.output_tokens
    cut = [*HELLO, {"role": "assistant", "content": answer(4)}]
    rest = claude.messages.create(model=CLAUDE, max_tokens=5, messages=cut).content[0].text
    flags = {"add_generation_prompt": False, "continue_final_message": True}
    assert rest == answer(5, **flags, messages=cut)


@pytest.mark.parametrize("thinking", [{"type": "adaptive"}, {"type": "enabled", "budget_tokens": 1024}])
def test_thinking_changes_nothing_and_is_named(claude, thinking):
    asked: Any = {"model": CLAUDE, "max_tokens": 6}
    spoken: Any = [{"type": "text", "text": "Hi"}]
    thoughts = [
        {"type": "thinking", "thinking": "Hm.", "signature": "s"},
        {"type": "redacted_thinking", "data": "d"},
    ]
    replies = []
    for content, more in (
        ([*thoughts, *spoken], {"thinking": thinking}),
        (spoken, {"thinking": {"type": "disabled"}}),
    ):
        messages: Any = [*HELLO, {"role": "assistant", "content": content}, *HELLO]
        replies.append(claude.messages.with_raw_response.create(**asked, messages=messages, **more))
        counted = claude.messages.with_raw_response.count_tokens(model=CLAUDE, messages=messages, **more)
        usage = replies[-1].parse().usage
        assert counted.headers.get("x-ignored-fields") == replies[-1].headers.get("x-ignored-fields")
        assert counted.parse().input_tokens == usage.input_tokens + usage.cache_read_input_tokens
    assert [reply.headers.get("x-ignored-fields") for reply in replies] == [
        "thinking, messages.thinking",
        None,
    ]
    assert replies[0].parse().content == replies[1].parse().content


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_earlier_thoughts_change_nothing_and_are_named(client, name):
    """They come from clients of vLLM, and from litellm's proxy in place of Anthropic's thinking
    blocks.
    """
    spoken = {"role": "assistant", "content": "Hi"}
    thought = spoken | {name: "Hm."}
    replies = [
        client.chat(messages=[*HELLO, turn, *HELLO], max_tokens=5)
        for turn in (spoken, thought, spoken | {name: None})
    ]
    answers = [good(reply)["choices"][0]["message"] for reply in replies]
    assert answers[0] == answers[1] == answers[2]
    assert [reply.headers.get("x-ignored-fields") for reply in replies] == [None, f"messages.{name}", None]


def test_a_document_of_plain_text_is_read_before_the_question(claude):
    def tokens(*blocks: Any) -> int:
        return claude.messages.count_tokens(
            model=CLAUDE, messages=[{"role": "user", "content": [*blocks]}]
        ).input_tokens

    question = {"type": "text", "text": "Who?"}
    source = {"type": "text", "media_type": "text/plain", "data": "Ann is here."}
    document = {"type": "document", "source": source, "title": "Notes", "citations": {"enabled": False}}
    assert tokens(document, question) == tokens({"type": "text", "text": "Notes\nAnn is here.\n\nWho?"})
    parts = {
        "type": "content",
        "content": [{"type": "text", "text": "Ann is"}, {"type": "text", "text": " here."}],
    }
    assert tokens(document | {"source": parts}, question) == tokens(document, question)
    pdf = {"type": "base64", "media_type": "application/pdf", "data": "aGk="}
    for block, words in (
        (document | {"source": pdf}, "reads text alone"),
        (document | {"citations": {"enabled": True}}, "quotes"),
    ):
        with pytest.raises(anthropic.BadRequestError, match=words):
            tokens(block)


def test_a_tool_may_return_documents(claude):
    def tokens(content: Any) -> int:
        call: Any = {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {}}
        result: Any = {"type": "tool_result", "tool_use_id": "toolu_1", "content": content}
        messages: Any = [
            *HELLO,
            {"role": "assistant", "content": [call]},
            {"role": "user", "content": [result]},
        ]
        return claude.messages.count_tokens(model=CLAUDE, messages=messages).input_tokens

    source = {"type": "text", "media_type": "text/plain", "data": "Ann is here."}
    document = {"type": "document", "source": source, "title": "Notes"}
    assert tokens([{"type": "text", "text": "One:\n"}, document]) == tokens("One:\nNotes\nAnn is here.\n\n")
    with pytest.raises(anthropic.BadRequestError, match=r"content\[0\]\.type: Invalid enum value 'tool_use'"):
        tokens([{"type": "tool_use"}])


def test_models_as_anthropic_describes_them(claude, client, tiny_server):
    models = list(claude.models.list())
    assert [model.id for model in models] == ["tiny", CLAUDE, GEMMA, GPT]
    assert models[0].created_at.timestamp() == tiny_server.state.loaded_at
    assert claude.models.retrieve(CLAUDE).max_input_tokens == tiny_server.engine.capacity
    with pytest.raises(anthropic.NotFoundError, match="There is no model"):
        claude.models.retrieve("claude-none")
    page = good(client.get("/v1/models", headers={"anthropic-version": "2023-06-01"}))
    assert (page["first_id"], page["last_id"], page["has_more"]) == ("tiny", GPT, False)
    assert good(client.get("/v1/models"))["object"] == "list"


def test_models_come_in_pages(claude):
    names = ["tiny", CLAUDE, GEMMA, GPT]
    for limit in (1, 3, 4):
        assert [
            model.id for model in claude.models.list(limit=limit)
        ] == names  # the client asks for each page
    page = claude.models.list(limit=2, after_id="tiny")
    assert [model.id for model in page.data] == [CLAUDE, GEMMA]
    assert (page.first_id, page.last_id, page.has_more) == (CLAUDE, GEMMA, True)
    page = claude.models.list(limit=2, before_id=GPT)
    assert [model.id for model in page.data] == [CLAUDE, GEMMA]
    assert page.has_more
    page = claude.models.list(after_id=GPT)
    assert (page.data, page.first_id, page.last_id, page.has_more) == ([], None, None, False)
    for wrong, message in (
        ({"limit": 0}, "limit must be an integer from 1 to 1,000, not '0'"),
        ({"after_id": "claude-none"}, "after_id names no model here: 'claude-none'"),
        ({"after_id": "tiny", "before_id": GPT}, "give one of them"),
    ):
        with pytest.raises(anthropic.BadRequestError, match=message):
            claude.models.list(**wrong)


def test_ids_of_anthropics_are_told_by_their_beginnings(roomy):
    tool: Any = {"name": "get_weather", "input_schema": WEATHER["parameters"], "eager_input_streaming": True}
    asked: Any = {
        "model": "tiny",
        "max_tokens": 200,
        "messages": HELLO,
        "tools": [tool],
        "tool_choice": {"type": "any"},
    }
    with anthropic.Anthropic(base_url=roomy.url, api_key="any") as client:
        reply = client.messages.with_raw_response.create(**asked)
        assert {block.id[:6] for block in reply.parse().content if block.type == "tool_use"} == {"toolu_"}
        assert reply.headers["request-id"] == reply.headers["x-request-id"]
        with client.messages.stream(**asked) as stream:
            assert stream.get_final_message().content[0].id.startswith("toolu_")
        with pytest.raises(anthropic.NotFoundError) as caught:
            client.messages.create(**asked | {"model": "none"})
        assert caught.value.request_id.startswith("req_")


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        (
            {"enable_thinking": False, "messages": []},
            "chat_template_kwargs.enable_thinking, chat_template_kwargs.messages",
        ),
        ({"odd\r\nname": 1, "thinking": 1}, "chat_template_kwargs"),
        ({f"name_{n}": n for n in range(17)}, "chat_template_kwargs"),
        ({}, None),
    ],
)
def test_variables_that_the_template_does_not_read_are_named(client, kwargs, named):
    reply = client.chat(chat_template_kwargs=kwargs)
    assert reply.headers.get("x-ignored-fields") == named
    assert good(reply)["choices"] == good(client.chat())["choices"]


def test_a_variable_that_the_template_reads_is_not_named(client, tiny_server, monkeypatch):
    monkeypatch.setattr(tiny_server.state.tokenizer, "template", "{% if enable_thinking %}<think>{% endif %}")
    assert "x-ignored-fields" not in client.chat(chat_template_kwargs={"enable_thinking": True}).headers


def test_ollamas_think_reaches_the_template(client, tiny_server):
    """False, as `enable_thinking`; without it the template decides."""
    prompts = []
    encode = tiny_server.state.tokenizer.encode_chat

    async def noting(turns, answer, variables, tools):
        prompts.append(variables)
        return await encode(turns, answer, variables, tools)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_server.state.tokenizer, "encode_chat", noting)
        for path, prompt in (
            ("chat", {"messages": [{"role": "user", "content": "Hi"}]}),
            ("generate", {"prompt": "Hi"}),
        ):
            for think in ({"think": False}, {"think": None}, {}):
                body = {"model": "tiny", "stream": False, "options": {"num_predict": 1}} | prompt | think
                assert "x-ignored-fields" not in client.post(f"/api/{path}", json=body).headers
    assert prompts == [{"enable_thinking": False}, {}, {}] * 2


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("{% if enable_thinking %}a{% endif %}{{ x.y }}", {"if", "enable_thinking", "endif", "x"}),
        ("thinking {{ 'thinking' + messages[0].thinking }}{%- set tools = \"thinking\" -%}", {"set", "0"}),
    ],
)
def test_the_variables_of_a_template(source, names):
    assert template_variables(source) == names


def test_version(client):
    assert good(client.get("/version")) == {"version": "1.2.3"}


def test_an_error_of_a_message_is_its_clients_own(claude, tiny_server):
    with pytest.raises(anthropic.NotFoundError, match="There is no model"):
        claude.messages.create(model="claude-none", max_tokens=9, messages=HELLO)
    with pytest.raises(anthropic.BadRequestError, match=r"tools.*name") as caught:
        claude.messages.create(
            model=CLAUDE, max_tokens=9, messages=HELLO, tools=[{"name": "f g", "input_schema": {}}]
        )
    assert caught.value.body["error"]["type"] == "invalid_request_error"


def test_anthropics_tool_runner_goes_on_without_a_thread(roomy):
    """It asks the server to remember the conversation, and sends it whole where the server's error says so."""

    def get_weather(city: Literal["Rome", "Oslo"]) -> str:
        """Tells the weather in a city."""
        return f"It is sunny in {city}."

    with anthropic.Anthropic(base_url=roomy.url, api_key="any") as client:
        asked: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 100}
        for stream in (False, True):
            runner: Any = client.beta.messages.tool_runner(
                **asked,
                tools=[anthropic.beta_tool(get_weather)],
                tool_choice={"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True},
                max_iterations=2,
                stream=stream,
            )
            replies = [reply.get_final_message() if stream else reply for reply in runner]
            assert [reply.content[0].input["city"] in ("Rome", "Oslo") for reply in replies] == [True, True]
            # The second has read the whole conversation.
            read = [reply.usage.input_tokens + reply.usage.cache_read_input_tokens for reply in replies]
            assert read[1] > read[0]
        with pytest.raises(anthropic.BadRequestError, match=r"thread: .*remembers nothing") as caught:
            client.beta.messages.thread(model="tiny", max_tokens=9).send(HELLO[0])
    assert caught.value.body["error"]["param"] == "thread"


@pytest.mark.parametrize("kind", ["bash_20250124", "web_search_20250305", "memory_20250818"])
def test_why_a_tool_of_anthropics_own_is_refused(claude, kind):
    with pytest.raises(anthropic.BadRequestError, match=r"tools\[0\]\.type: .*runs no tools"):
        claude.messages.create(
            model=CLAUDE, max_tokens=9, messages=HELLO, tools=[{"type": kind, "name": "own"}]
        )


def test_why_a_tool_of_openais_own_is_refused(gpt):
    with pytest.raises(openai.BadRequestError, match=r"tools\[0\]\.type: .*runs no tools"):
        gpt.responses.create(model=GPT, input="Hello", tools=[{"type": "web_search_preview"}])


@pytest.mark.parametrize("field", ["input_examples", "allowed_callers", "defer_loading"])
def test_why_a_field_of_anthropics_tools_is_refused(claude, field):
    tool = {"name": "own", "input_schema": {"type": "object"}, field: True}
    with pytest.raises(anthropic.BadRequestError, match=rf"tools\[0\]\.{field}: .*unknown.*\. [A-Z]"):
        claude.messages.create(model=CLAUDE, max_tokens=9, messages=HELLO, tools=[tool])


def test_anthropics_system_message_may_stand_among_the_others(claude):
    among: Any = [{"role": "system", "content": "Be brief."}, *HELLO]
    greedy = {"temperature": 0}
    first = claude.messages.create(model=CLAUDE, max_tokens=9, messages=among, extra_body=greedy)
    second = claude.messages.create(
        model=CLAUDE, max_tokens=9, messages=HELLO, system="Be brief.", extra_body=greedy
    )
    assert [block.text for block in first.content] == [block.text for block in second.content]
    assert claude.messages.count_tokens(model=CLAUDE, messages=among) == claude.messages.count_tokens(
        model=CLAUDE, messages=HELLO, system="Be brief."
    )


def test_why_anthropics_batches_and_files_are_absent(claude):
    with pytest.raises(anthropic.NotFoundError, match="no batches: send each message by itself"):
        claude.messages.batches.list()
    with pytest.raises(anthropic.NotFoundError, match="send their text in the messages"):
        claude.beta.files.list()


def test_why_ollama_changes_no_model(gemma, tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    for change in (
        lambda: gemma.create("mine", from_=GEMMA),
        lambda: gemma.create_blob(file),
        lambda: gemma.copy(GEMMA, "mine"),
        lambda: gemma.delete(GEMMA),
        lambda: gemma.push(GEMMA),
    ):
        with pytest.raises(
            ollama.ResponseError, match="no request makes, copies, sends or deletes"
        ) as caught:
            change()
        assert caught.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match=r"template: .*that the server was started with"):
        gemma.generate(GEMMA, "Hello", template="{{ .Prompt }}")


def test_ollama_chats_and_generates(gemma, answer):
    options = {"num_predict": 9, "num_ctx": 64}
    reply = gemma.chat(model=GEMMA, messages=HELLO, options=options)
    assert (reply.message.content, reply.done, reply.done_reason) == (answer(9), True, "length")
    assert reply.eval_count == 9
    assert 0 < reply.prompt_eval_duration < reply.total_duration
    parts = list(gemma.chat(model=f"{GEMMA}:latest", messages=HELLO, options=options, stream=True))
    assert "".join(part.message.content for part in parts) == answer(9)
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert gemma.generate(model=GEMMA, prompt="Hello there", options=options).response == answer(9)
    assert gemma.generate(model=GEMMA, prompt="Hello there", options={"num_predict": -1}).eval_count > 9


def test_ollama_continues_a_raw_prompt(gemma, client):
    reply = gemma.generate(model=GEMMA, prompt="Hello there", raw=True, options={"num_predict": 6})
    assert reply.response == good(client.complete(most=6))["choices"][0]["text"]


def test_ollama_lists_and_shows_the_model(gemma, client, tiny_server):
    models = gemma.list().models
    assert (
        [model.model for model in models]
        == [model.model for model in gemma.ps().models]
        == ["tiny", CLAUDE, GEMMA, GPT]
    )
    assert models[0].size > 0
    shown = gemma.show(GEMMA)
    assert (shown.capabilities, shown.modelinfo["llama.context_length"]) == (
        ["completion", "tools", "embedding"],
        tiny_server.engine.capacity,
    )
    loaded = gemma.ps().models[0]
    # on a processor
    assert (loaded.size_vram, loaded.context_length) == (0, tiny_server.engine.capacity)
    assert loaded.expires_at - datetime.datetime.now(datetime.UTC) > datetime.timedelta(days=365)
    for name, status in ((GEMMA, 200), ("none", 404)):
        assert client.post("/api/show", json={"name": name}).status_code == status
    assert client.get("/api/version").json()["version"].count(".") == 2


# of curl's -d, and of the simple POST of a page
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
PLAIN = {"Content-Type": "text/plain;charset=UTF-8"}  # of a text that fetch sends
BYTES = {"Content-Type": "application/octet-stream"}  # of litellm's proxy
UTF_16 = {"Content-Type": "text/plain; charset=utf-16"}


def test_only_ollamas_routes_take_a_body_without_a_type_or_with_any(client):
    body = b'{"prompt": "a", "options": {"num_predict": 1}}'
    for headers, status in (({}, 200), (FORM, 200), (PLAIN, 200), (BYTES, 200), (UTF_16, 415)):
        assert client.post("/api/generate", headers=headers, content=body).status_code == status
    for headers in ({}, FORM, PLAIN, BYTES):
        assert client.post("/v1/completions", headers=headers, content=body).status_code == 415


@pytest.mark.parametrize(
    "path", [route.path for route in ROUTES if route.path.startswith("/api/") and route.body]
)
def test_a_page_elsewhere_may_send_ollamas_routes_no_form(client, path):
    """By its Origin, which a browser sends with each POST to another site, or by the site that it
    names where that is lost.
    """
    foreign = [{"Origin": origin} for origin in ("http://evil.example", "null", "http://127.0.0.1:1")]
    foreign += [{"Sec-Fetch-Site": site} for site in ("cross-site", "same-site")]
    for headers in foreign:
        for kind in ({}, FORM, PLAIN, BYTES, {"Content-Type": "application/json"}):
            assert client.post(path, headers=headers | kind, content=b"{}").status_code == 403


def test_ollama_loads_a_model_by_an_empty_prompt(gemma, client, tiny_server):
    """Nothing is loaded or unloaded; the reply says that it is, and holds no place."""
    for keep_alive, reason in ((None, "load"), ("5m", "load"), (-1, "load"), (0, "unload"), ("0s", "unload")):
        reply = gemma.generate(model=GEMMA, prompt="", keep_alive=keep_alive)
        assert (reply.response, reply.done, reply.done_reason) == ("", True, reason)
        reply = gemma.chat(model=GEMMA, messages=[], keep_alive=keep_alive)
        assert (reply.message.role, reply.message.content, reply.done, reply.done_reason) == (
            "assistant",
            "",
            True,
            reason,
        )
    assert [part.done_reason for part in gemma.generate(model=GEMMA, stream=True)] == ["load"]
    for path in ("/api/generate", "/api/chat"):
        assert good(client.post(path, json={"model": GEMMA}))["done_reason"] == "load"
        refused(client.post(path, json={"model": "none"}), 404)
    assert tiny_server.load == (0, 0, 0)
    assert gemma.pull(GEMMA).status == "success"
    with pytest.raises(ollama.ResponseError, match="There is no model"):
        gemma.pull("none")


def test_ollama_names_the_options_that_it_ignores(client):
    """Those that the server does not know too, whatever they are called; a known one has its type."""
    options = {"num_predict": 1, "num_ctx": 64, "typical_p": 0.7, "mirostat": 1, "ü\n,": None} | {
        f"x{n}": n for n in range(99)
    }
    for path, body in (
        ("/api/generate", {"prompt": "a"}),
        ("/api/chat", {"messages": HELLO}),
        ("/api/embed", {"input": "a"}),
    ):
        reply = client.post(path, json=body | {"options": options})
        good(reply) if path == "/api/embed" else reply.raise_for_status()
        named = reply.headers["x-ignored-fields"].split(", ")
        assert named[:4] == ["options.num_ctx", "options.typical_p", "options.mirostat", r"options.\xfc\n,"]
        assert len(named) < 50
        refused(client.post(path, json=body | {"options": options | {"num_ctx": "large"}}))
    body = {"prompt": "a", "stream": None, "options": None, "truncate": False, "shift": True, "think": False}
    reply = client.post("/api/generate", json=body)
    assert (reply.status_code, reply.headers["x-ignored-fields"]) == (200, "shift")
    assert reply.text.count("\n") > 1  # null is the default: a stream


def test_ollama_returns_logprobs(gemma, client):
    options = {"num_predict": 4}
    fields: dict[str, Any] = {
        "model": GEMMA,
        "messages": HELLO,
        "options": options,
        "logprobs": True,
        "top_logprobs": 2,
    }
    scores = gemma.chat(**fields).logprobs
    wanted = good(client.chat(most=4, logprobs=True, top_logprobs=2))["choices"][0]["logprobs"]["content"]
    assert [(each.token, each.logprob) for each in scores] == [
        (each["token"], each["logprob"]) for each in wanted
    ]
    assert [top.token for top in scores[0].top_logprobs] == [
        top["token"] for top in wanted[0]["top_logprobs"]
    ]
    parts = [score for part in gemma.chat(**fields, stream=True) for score in part.logprobs or ()]
    assert parts == scores
    assert len(gemma.generate(GEMMA, "Hello there", options=options, logprobs=True).logprobs) == 4
    assert gemma.chat(model=GEMMA, messages=HELLO, options=options).logprobs is None
    with pytest.raises(ollama.ResponseError, match="without logprobs"):
        gemma.chat(**fields | {"logprobs": False})


def test_ollama_embeds(gemma, client, tiny_server):
    texts = ["Hello there", "1234"]
    wanted = [
        each["embedding"] for each in good(client.post("/v1/embeddings", json={"input": texts}))["data"]
    ]
    reply = gemma.embed(GEMMA, texts)
    assert reply.embeddings == wanted
    assert reply.prompt_eval_count == sum(len(client.tokens(text)) for text in texts)
    assert gemma.embed(GEMMA, texts[0]).embeddings == wanted[:1]
    assert gemma.embeddings(GEMMA, texts[1]).embedding == wanted[1]
    assert len(gemma.embed(GEMMA, texts, dimensions=3).embeddings[1]) == 3
    assert (gemma.embed(GEMMA, "").embeddings, gemma.embeddings(GEMMA, "").embedding) == ([], [])
    long = "Hello " * 400
    cut = tiny_server.model.tokenizer.decode(client.tokens(long)[: tiny_server.engine.capacity - 1])
    assert gemma.embed(GEMMA, long).embeddings == gemma.embed(GEMMA, cut, truncate=False).embeddings
    with pytest.raises(ollama.ResponseError, match="Nothing was left out"):
        gemma.embed(GEMMA, long, truncate=False)
    for fields in ({"input": ["a"] * 129}, {"input": 5}, {"input": "a", "dimensions": 10**6}):
        refused(client.post("/api/embed", json=fields))
    assert tiny_server.load == (0, 0, 0)


def test_an_error_of_ollamas_is_a_sentence(gemma, client):
    thinking = [({"think": value}, f'"{GEMMA}" does not support thinking') for value in (True, "low")]
    for fields, words in (
        ({"model": "none"}, "There is no model"),
        ({"options": {"num_predict": 0}}, "num_predict"),
        *thinking,
    ):
        with pytest.raises(ollama.ResponseError, match=words) as caught:
            gemma.chat(**{"model": GEMMA, "messages": HELLO} | fields)
        assert isinstance(caught.value.error, str)
    assert isinstance(client.get("/api/none").json()["error"], str)


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages", "/api/chat"])
def test_a_stream_that_fails_ends_with_an_error(client, tiny_server, monkeypatch, path):
    step = tiny_server.engine.step
    monkeypatch.setattr(
        tiny_server.engine, "step", lambda: [event._replace(finish_reason="error") for event in step()]
    )
    body = (
        {"input": "Hello"}
        if "responses" in path
        else {"messages": HELLO} | ({"max_tokens": 5} if "v1" in path else {})
    )
    last = client.post(path, json=body | {"stream": True}).text.strip().split("\n")[-1]
    assert "finite logits" in json.dumps(json.loads(last.removeprefix("data: ")))


# The bodies that `vllm-router` 0.1.17 sends to its workers for requests with a model, messages or a
# prompt, and max_tokens.
ROUTED_CHAT = (
    b'{"model":"tiny","messages":[{"role":"user","content":"Hello there"}],"stream":false,"max_tokens":5,"logprobs":false,'
    b'"no_stop_trim":false,"ignore_eos":false,"continue_final_message":false,"skip_special_tokens":true,'
    b'"separate_reasoning":true,"stream_reasoning":true,"return_hidden_states":false,"include_reasoning":true}'
)
ROUTED_STREAM = ROUTED_CHAT.replace(
    b'"stream":false', b'"stream":true,"stream_options":{"include_usage":true}'
)
ROUTED_COMPLETION = (
    b'{"model":"tiny","prompt":"Hello there","max_tokens":5,"stream":false,"echo":false,"no_stop_trim":false,'
    b'"ignore_eos":false,"skip_special_tokens":true,"return_hidden_states":false}'
)


def test_the_bodies_of_vllms_router(client, answer):
    whole = good(client.post_bytes("/v1/chat/completions", ROUTED_CHAT))["choices"][0]["message"]["content"]
    parts = events(client.post_bytes("/v1/chat/completions", ROUTED_STREAM).text)
    streamed = "".join(choice["delta"].get("content", "") for part in parts for choice in part["choices"])
    assert whole == streamed == answer(5)
    assert (
        good(client.post_bytes("/v1/completions", ROUTED_COMPLETION))["choices"]
        == good(client.complete())["choices"]
    )
    assert good(client.post_bytes("/v1/embeddings", b'{"model":"tiny","input":"Hello"}'))["data"][0][
        "embedding"
    ]


def test_every_dialect_counts_its_tokens_alike(client, gpt, claude, gemma):
    count = len(client.tokens(messages=HELLO))
    assert good(client.chat())["usage"]["prompt_tokens"] == count
    assert (
        gpt.responses.create(model=GPT, input="Hello there", max_output_tokens=1).usage.input_tokens == count
    )
    assert claude.messages.count_tokens(model=CLAUDE, messages=HELLO).input_tokens == count
    assert gemma.chat(model=GEMMA, messages=HELLO, options={"num_predict": 1}).prompt_eval_count == count
    assert say()["messages"] == HELLO


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
        ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}),
        ("/v1/messages", {"max_tokens": 1, "messages": [{"role": "user", "content": [{"type": "image"}]}]}),
        ("/api/chat", {"messages": [{"role": "user", "content": "a", "images": ["aGk="]}]}),
    ],
)
def test_an_image_is_refused_in_a_sentence(client, path, body):
    error = client.post(path, json=body).json()["error"]
    assert "The model reads text alone" in (error if isinstance(error, str) else error["message"])
