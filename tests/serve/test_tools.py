"""Tools: told to the model by its template, called as its choice says, with arguments that satisfy their schema."""

import json
import random
from typing import Any

import anthropic
import jsonschema_rs
import ollama
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.text.chat_tokenizer import ChatTokenizer
from stages.serve.api import jobs
from stages.serve.api import ollama as ollama_route
from stages.serve.call_parser import CallParser
from stages.serve.tool_format import HERMES, ToolFormat, describe_tools, tool_format
from stages.serve.tools import Function, ToolUse, join_calls, tool_use
from tests.serve.tiny_server import events, good, refused, say
from tests.text.chat_models import chat_tokenizer

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"enum": [1, 2, 30]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "get_weather", "description": "Tells it.", "parameters": PARAMETERS},
    },
    {"type": "function", "function": {"name": "wait"}, "cache_control": {"type": "ephemeral"}},
]
LLAMA = ToolFormat("", "parameters", "")
# How Qwen 2.5's template tells of tools and calls, in short.
QWEN = """{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}Call with <tool_call>.<|im_end|>
{% endif %}{% for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content }}
{%- for call in message.tool_calls %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% if enable_thinking is false %}!{% endif %}{% endif %}"""


@pytest.fixture
def client(roomy):
    with roomy.client() as client:
        yield client
    assert roomy.state.engine.compiles_after_ready == 0


def check(calls):
    for call in calls:
        assert call["type"] == "function"
        assert call["id"].startswith("call_")
        if call["function"]["name"] == "get_weather":
            jsonschema_rs.validate(PARAMETERS, json.loads(call["function"]["arguments"]))
        else:
            assert call["function"]["name"] == "wait"
            assert json.loads(call["function"]["arguments"]) == {}


def joined(text):
    """The message that the chunks of a stream make, and why it ended."""
    content, calls, reason = "", [], None
    for chunk in events(text):
        (choice,) = chunk["choices"]
        content, reason = content + choice["delta"].get("content", ""), choice["finish_reason"] or reason
        for part in choice["delta"].get("tool_calls", ()):
            if "id" in part:
                calls.append(part)
            else:
                calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
    return content, calls, reason


GO = [{"role": "user", "content": "Go"}]
NAMED = {"type": "function", "function": {"name": "get_weather"}}
ROOM = 150  # tokens: more than the letters of the longest call


@pytest.mark.law("constrained decoding")
@pytest.mark.parametrize("choice", ["required", NAMED, "auto"])
@pytest.mark.parametrize("parallel", [True, False])
def test_a_call_satisfies_its_schema_streamed_or_not(client, choice, parallel):
    body = say(
        "Go", ROOM, tools=TOOLS, tool_choice=choice, parallel_tool_calls=parallel, temperature=1.0, seed=4
    )
    if choice == "auto":  # a model without sense is led to begin a call
        body |= {"logit_bias": {str(token): 9 for token in chat_tokenizer().encode("<tool_call>").tolist()}}
    (whole,) = good(client.post("/v1/chat/completions", json=body))["choices"]
    content, calls, reason = joined(client.post("/v1/chat/completions", json=body | {"stream": True}).text)
    message = whole["message"]
    assert (content or None, reason) == (message["content"] or None, whole["finish_reason"])
    named = lambda calls: [call["function"] for call in calls]
    assert named(calls) == named(message.get("tool_calls", []))
    if choice != "auto":
        assert not message["content"]
        assert reason == "tool_calls" or (reason == "length" and parallel and choice == "required")
        check(calls if reason == "tool_calls" else calls[:-1])
        assert choice == "required" or {call["function"]["name"] for call in calls} == {"get_weather"}
        assert (choice == "required" and parallel) or len(calls) == 1


def test_an_answer_may_have_a_schema_beside_tools(client):
    answer = {"type": "json_schema", "json_schema": {"name": "x", "schema": PARAMETERS}}
    for seed in range(4):
        choice = good(
            client.chat("Go", ROOM, tools=TOOLS, response_format=answer, temperature=1.5, seed=seed)
        )["choices"][0]
        if choice["finish_reason"] == "stop":
            jsonschema_rs.validate(PARAMETERS, json.loads(choice["message"]["content"]))
        elif choice["finish_reason"] == "tool_calls":
            check(choice["message"]["tool_calls"])


@pytest.mark.parametrize(
    "grammar",
    ['call: "x" | "y"\nstart: call "!"', 'root ::= text "!"\ntext ::= [xy]', 'start: mark "!"\nmark: /[xy]/'],
    ids=["Lark", "GBNF", "start first"],
)
def test_an_answer_may_have_a_grammar_beside_tools(client, grammar):
    """Even one whose rules have the names of those around it."""
    ask = lambda seed: client.chat(
        "Go", ROOM, tools=TOOLS, guided_grammar=grammar, temperature=1.5, seed=seed
    )
    choices = [good(ask(seed))["choices"][0] for seed in range(4)]
    answers = [choice["message"]["content"] for choice in choices if choice["finish_reason"] == "stop"]
    assert answers
    assert {*answers} <= {"x!", "y!"}
    assert {choice["finish_reason"] for choice in choices} <= {"stop", "tool_calls", "length"}
    assert (
        refused(client.chat("Go", 5, tools=TOOLS, guided_grammar=grammar + "?)"))["param"] == "guided_grammar"
    )


def test_a_call_that_a_stop_string_cuts_is_none_that_the_answer_ends_with(client):
    fields = {"tools": TOOLS[:1], "tool_choice": NAMED, "max_tokens": ROOM}
    ended = lambda stop: good(client.chat("Go", **fields, stop=[stop]))["choices"][0]
    for stop, calls in {"city": 1, "name": 0, "call": 0}.items():
        assert ended(stop)["finish_reason"] == "stop"
        assert not ended(stop)["message"]["content"]
        assert len(ended(stop)["message"].get("tool_calls", ())) == calls
    assert ended("</tool")["finish_reason"] == "tool_calls"
    check(ended("</tool")["message"]["tool_calls"])


def test_an_answer_that_goes_on_may_have_to_call(client):
    turns = [{"role": "user", "content": "Go"}, {"role": "assistant", "content": "Well, "}]
    body = {
        "messages": turns,
        "add_generation_prompt": False,
        "continue_final_message": True,
        "max_tokens": ROOM,
    }
    (choice,) = good(
        client.post("/v1/chat/completions", json=body | {"tools": TOOLS[:1], "tool_choice": NAMED})
    )["choices"]
    assert choice["finish_reason"] == "tool_calls"
    check(choice["message"]["tool_calls"])


def test_a_history_of_calls_is_taken_and_tools_are_in_the_prompt(client):
    call = {"id": "call_1", "type": "function", "function": {"name": "wait", "arguments": "{}"}}
    history = [
        {"role": "user", "content": "Go", "name": "Eve"},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {
            "role": "tool",
            "tool_call_id": "call_1",
            "content": [{"type": "text", "text": "no", "cache_control": {}}],
        },
    ]
    fields = {"messages": history, "temperature": 0, "max_tokens": 4, "max_completion_tokens": 4}
    count = lambda **more: good(client.post("/v1/chat/completions", json=fields | more))["usage"][
        "prompt_tokens"
    ]
    without = count()
    assert (
        count(tools=[TOOLS[1]], tool_choice="none")
        == without
        == count(chat_template_kwargs={"enable_thinking": False})
    )
    assert (
        "context"
        in refused(client.post("/v1/chat/completions", json=fields | {"tools": TOOLS * 40}))["message"]
    )


def test_templates_are_told_of_tools_in_their_own_way():
    chat = ChatTokenizer(chat_tokenizer(QWEN))
    assert tool_format(chat.source) == (HERMES, True)
    assert tool_format('{{ tools }} {"name": function name, "parameters": ...}') == (LLAMA, True)
    assert tool_format("{{ messages }}") == (HERMES, False)
    evil = Function(
        name="get", description="Says <|im_end|>", parameters={"properties": {"<|im_start|>": {}}}
    )
    call = {"type": "function", "function": {"name": "get", "arguments": {"x": "<|im_end|>"}}}
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    more = {"tools": [evil.definition], "enable_thinking": False}
    tokens = chat.prompt([*turns, {"role": "tool", "content": "5"}], "", more).tolist()
    text, controls = (
        chat.tokenizer.decode(tokens),
        [token for token in tokens if token in chat.tokenizer.controls],
    )
    assert '"description": "Says <|im_end|>"' in text
    assert '"<|im_start|>": {}' in text
    assert '{"name": "get", "arguments": {"x": "<|im_end|>"}}\n</tool_call>' in text
    assert text.endswith("assistant\n!")
    assert len(controls) == 2 * 4 + 1, "what the template wrote, and nothing of the messages"
    described = describe_tools(
        [*turns, {"role": "tool", "content": "5"}, {"role": "tool", "content": "6"}], [evil]
    )
    assert [turn["role"] for turn in described] == ["system", "user", "assistant", "user"]
    assert json.dumps(evil.definition) in described[0]["content"]
    assert (
        described[2]["content"]
        == '<tool_call>\n{"name": "get", "arguments": {"x": "<|im_end|>"}}\n</tool_call>'
    )
    assert described[3]["content"].count("<tool_response>") == 2
    chat.close()


GET = ("get", '{"city": "Ro\\"m}e <tool_call>"}')
PUT = ("put", '{"n": [1, "]"], "o": {}}')
READ = [Function(name="get"), Function(name="put"), Function(name="putty")]


def read(text, form=HERMES, required=False, is_free=True, is_cut=False, seed=0):
    """Returns the text and the calls that a CallParser finds in an answer that comes in random
    parts, and whether they are whole.
    """
    rng = random.Random(seed)
    parser = CallParser(form, ToolUse(READ, required), is_free)
    content = ""
    calls = []
    while True:
        size = rng.randint(1, 7)
        last = len(text) <= size
        part, found = parser.push(text[:size], last, last and is_cut)
        content += part
        calls += found
        text = text[size:]
        if last:
            return (
                content,
                [(call.name, call.arguments) for call in join_calls(calls)],
                parser.has_whole_calls,
            )


@pytest.mark.parametrize("seed", range(20))
def test_calls_are_found_however_their_text_comes(seed):
    first, second = HERMES.call(*GET), HERMES.call(*PUT)
    for text, expected in {
        "": ("", []),
        "Hi <tool_ there": ("Hi <tool_ there", []),
        "Hi <tool": ("Hi <tool", []),
        '{"a": 1}': ('{"a": 1}', []),
        first: ("", [GET]),
        f"Well, {first}\n{second}\n": ("Well, ", [GET, PUT]),
        f"{first}\n\nAnd so on": ("", [GET]),
    }.items():
        content, calls, is_whole = read(text, seed=seed)
        assert (content.removesuffix("And so on"), calls, is_whole) == (*expected, bool(expected[1]))
    assert read(f"{first}\n{second}", required=True, seed=seed) == ("", [GET, PUT], True)
    for form in (
        HERMES,
        LLAMA,
    ):  # an answer with a grammar of its own is a call from its beginning on, or none
        assert read(form.call(*GET), form, is_free=False, seed=seed) == ("", [GET], True)
        for answer in ('{"name": "Eve"}', '{"nam', '["<tool_call>"]', "<tool_call> x"):
            assert read(answer, form, is_free=False, seed=seed) == (answer, [], False)
    assert read(LLAMA.call(*GET), LLAMA, seed=seed) == ("", [GET], True)
    assert read(f"Well, {LLAMA.call(*GET)}", LLAMA, seed=seed) == (f"Well, {LLAMA.call(*GET)}", [], False)


@given(
    required=st.booleans(),
    form=st.sampled_from([HERMES, LLAMA]),
    is_free=st.booleans(),
    calls=st.lists(st.sampled_from([GET, PUT, ("putty", "{}")]), min_size=1, max_size=3),
    text=st.sampled_from(["", "Well, ", "a < b: "]),
    seed=st.integers(0, 99),
)
def test_nothing_of_a_call_that_is_cut_is_text(required, form, is_free, calls, text, seed):
    """Wherever it is cut: there are the names whose openings are whole, and the arguments so far."""
    calls = calls if form.begin else calls[:1]
    text = text if form.begin and is_free and not required else ""
    answer = text
    places = []  # of the arguments of each call
    for name, arguments in calls:
        answer += "\n" * bool(places) + form.opening(name)
        places.append((name, len(answer), arguments))
        answer += arguments + "}" + form.end
    for size in range(1, len(answer) + 1):
        content, found, _ = read(answer[:size], form, required, is_free, is_cut=True, seed=seed)
        assert content == text[: size - (size == 3 and text.startswith("a <"))], (
            "but for what may begin a call"
        )
        assert found == [
            (name, arguments[: size - start]) for name, start, arguments in places if size >= start
        ]


CITY = '{"city": "Ro\\"m}e {"}'
BARE = [
    '{"name": "get", "arguments": %s}',
    '\n{\n  "name": "get",\n  "arguments": %s\n}\n',
    '```json\n{"name": "get", "arguments": %s}\n```',
    '```\n{"name":"get","parameters":%s}```\n',
]


@pytest.mark.parametrize("bare", BARE)
@pytest.mark.parametrize("seed", range(5))
def test_an_answer_that_is_one_bare_call_is_read_as_one(bare, seed):
    """Nothing of it is text where it is cut, and all of it where it turns out to be something else."""
    answer = bare % CITY
    assert read(answer, seed=seed) == ("", [("get", CITY)], True)
    start = answer.index(CITY)
    for size in range(1, len(answer) + 1):
        content, calls, is_whole = read(answer[:size], seed=seed, is_cut=True)
        assert content == ""
        assert calls == ([("get", CITY[: size - start])] if size > start else [])
        assert not is_whole or answer[:size].rstrip().endswith(answer.rstrip()[-1])
    for other in (
        f"So: {answer}",
        f"{answer} Good?",
        f"{answer}{answer}",
        answer.replace("get", "got"),
        answer.replace("name", "nam"),
        answer.replace(CITY, "[1]"),
        answer.replace(CITY, '{"a": b}'),
        answer.replace(CITY, '{}, "more": 1'),
        answer.rstrip()[:-1],
    ):
        assert read(other, seed=seed) == (other, [], False)
    assert read(answer, LLAMA, seed=seed) == (answer, [], False)
    assert read(answer, is_free=False, seed=seed) == (answer, [], False)


def test_what_can_be_no_bare_call_is_not_held_back():
    parser = CallParser(HERMES, ToolUse(READ), True)
    pieces = ['{"na', 'me": "p', "u", "b", "lic"]
    assert [parser.push(piece, False)[0] for piece in pieces] == ["", "", "", '{"name": "pub', "lic"]


def chat_answer(reply):
    (choice,) = reply["choices"]
    calls = [
        (call["function"]["name"], call["function"]["arguments"])
        for call in choice["message"].get("tool_calls", ())
    ]
    return choice["message"]["content"] or "", calls, choice["finish_reason"] == "length"


def chat_stream(text):
    content, calls, reason = joined(text)
    return (
        content,
        [(call["function"]["name"], call["function"]["arguments"]) for call in calls],
        reason == "length",
    )


def response_answer(reply):
    items = reply["output"]
    texts = [part["text"] for item in items if item["type"] == "message" for part in item["content"]]
    calls = [(item["name"], item["arguments"]) for item in items if item["type"] == "function_call"]
    return "".join(texts), calls, reply["incomplete_details"] == {"reason": "max_output_tokens"}


def named_events(text):
    return [
        json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")
    ]


def response_stream(text):
    events = named_events(text)
    deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    content, calls, is_cut = response_answer(events[-1]["response"])
    assert content == "".join(deltas)
    return content, calls, is_cut


def message_answer(reply):
    texts = [block["text"] for block in reply["content"] if block["type"] == "text"]
    calls = [
        (block["name"], json.dumps(block["input"]))
        for block in reply["content"]
        if block["type"] == "tool_use"
    ]
    return "".join(texts), calls, reply["stop_reason"] == "max_tokens"


def message_stream(text):
    content = ""
    calls = []
    is_cut = False
    for event in named_events(text):
        if event["type"] == "content_block_start" and event["content_block"]["type"] == "tool_use":
            calls.append((event["content_block"]["name"], ""))
        delta = event.get("delta", {})
        content += delta.get("text", "")
        if "partial_json" in delta:
            calls[-1] = (calls[-1][0], calls[-1][1] + delta["partial_json"])
        is_cut = is_cut or delta.get("stop_reason") == "max_tokens"
    return content, calls, is_cut


def ollama_answer(reply):
    message = reply["message"]
    calls = [
        (call["function"]["name"], json.dumps(call["function"]["arguments"]))
        for call in message.get("tool_calls", ())
    ]
    return message["content"], calls, reply["done_reason"] == "length"


def ollama_stream(text):
    lines = [json.loads(line) for line in text.splitlines()]
    calls = [call for line in lines for call in line["message"].get("tool_calls", ())]
    content = "".join(line["message"]["content"] for line in lines)
    return ollama_answer(
        {"message": {"content": content, "tool_calls": calls}, "done_reason": lines[-1]["done_reason"]}
    )


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.night)])
def test_in_no_dialect_does_a_call_that_is_cut_become_text(client, monkeypatch, stride):
    """Whole or streamed, at every length of a call that must be made, or at one in five."""
    monkeypatch.setattr(
        ollama_route, "tool_use", lambda functions: tool_use(functions, None, "required", False)
    )
    weather = TOOLS[0]["function"]
    anthropics = {"name": weather["name"], "input_schema": PARAMETERS}
    asked: dict[str, Any] = {"messages": GO, "temperature": 0}
    forced = {"tool_choice": "required", "parallel_tool_calls": False}
    choice = {"type": "any", "disable_parallel_tool_use": True}
    responses = {"input": "Go", "temperature": 0, "tools": [weather | {"type": "function"}], **forced}
    dialects: Any = {
        "/v1/chat/completions": (
            asked | {"tools": TOOLS[:1], **forced},
            "max_tokens",
            chat_answer,
            chat_stream,
        ),
        "/v1/responses": (responses, "max_output_tokens", response_answer, response_stream),
        "/v1/messages": (
            asked | {"tools": [anthropics], "tool_choice": choice},
            "max_tokens",
            message_answer,
            message_stream,
        ),
        "/api/chat": ({"messages": GO, "tools": TOOLS[:1]}, "num_predict", ollama_answer, ollama_stream),
    }
    for path, (body, limit, read_answer, read_stream) in dialects.items():
        size = 0
        is_cut = True
        lengths = set()
        while is_cut:
            size += stride
            most = (
                {"options": {"num_predict": size, "temperature": 0}}
                if limit == "num_predict"
                else {limit: size}
            )
            content, calls, is_cut = read_answer(
                good(client.post(path, json=body | most | {"stream": False}))
            )
            streamed = read_stream(client.post(path, json=body | most | {"stream": True}).text)
            assert (content, streamed[0], streamed[2]) == ("", "", is_cut), (path, size)
            for name, arguments in (*calls, *streamed[1]):
                assert name == "get_weather"
                assert is_cut or json.loads(arguments).keys() == {"city", "days"}
                lengths.add(len(arguments))
            if read_answer in (chat_answer, response_answer) or not is_cut:
                as_text = lambda calls: [arguments.replace(" ", "") for _, arguments in calls]
                assert as_text(calls) == as_text(streamed[1])
        assert size > 30
        assert len(lengths) > (0 if path == "/api/chat" else 10 // stride), "arguments as far as they came"


def test_anthropics_client_calls_tools(client):
    """Whole or streamed, any tool or a named one; the call and its result go on in the history."""
    claude = anthropic.Anthropic(base_url=str(client.base_url), api_key="any")
    asked: dict[str, Any] = {"model": "default", "messages": GO}
    tools: Any = [{"name": "get_weather", "description": "The weather.", "input_schema": PARAMETERS}]
    for choice in (
        {"type": "any", "disable_parallel_tool_use": True},
        {"type": "tool", "name": "get_weather"},
    ):
        fields: Any = asked | {"tools": tools, "tool_choice": choice, "max_tokens": ROOM}
        message = claude.messages.create(**fields)
        (call,) = message.content
        assert (message.stop_reason, call.type, call.name) == ("tool_use", "tool_use", "get_weather")
        jsonschema_rs.validate(PARAMETERS, call.input)
        with claude.messages.stream(**fields) as stream:
            streamed = stream.get_final_message()
        assert [block.type for block in streamed.content] == ["tool_use"]
        jsonschema_rs.validate(PARAMETERS, streamed.content[0].input)
        assert streamed.stop_reason == "tool_use"
    result = {
        "type": "tool_result",
        "tool_use_id": call.id,
        "content": [{"type": "text", "text": "17 degrees"}],
    }
    history = [*GO, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    longer = claude.messages.create(
        **asked | {"messages": history}, tools=tools, tool_choice={"type": "none"}, max_tokens=5
    )
    assert [block.type for block in longer.content] == ["text"]
    count = lambda messages, **more: (
        claude.messages.count_tokens(model="default", messages=messages, **more).input_tokens
    )
    assert count(history) > count(GO) < count(GO, tools=tools)
    with pytest.raises(anthropic.BadRequestError, match="no tool 'snow'"):
        claude.messages.create(
            **asked, tools=tools, tool_choice={"type": "tool", "name": "snow"}, max_tokens=5
        )


def test_ollamas_client_calls_tools(client, monkeypatch):
    """Its API has no way to force a call, which the tiny model would never make."""
    gemma = ollama.Client(host=str(client.base_url))
    forced = lambda functions: tool_use(functions, None, "required", False)
    tools = [
        {
            "type": "function",
            "function": {"name": "get_weather", "description": "It.", "parameters": PARAMETERS},
        }
    ]
    asked: dict[str, Any] = {
        "model": "default",
        "messages": GO,
        "options": {"num_predict": ROOM, "temperature": 0},
    }
    plain = gemma.chat(**asked, tools=tools)
    assert plain.message.content
    assert not plain.message.tool_calls
    monkeypatch.setattr(ollama_route, "tool_use", forced)
    message = gemma.chat(**asked, tools=tools).message
    (call,) = message.tool_calls
    assert (call.function.name, call.function.arguments["city"] in ("Rome", "Oslo")) == ("get_weather", True)
    *_, called, last = gemma.chat(**asked, tools=tools, stream=True)
    assert (called.message.tool_calls, called.done, last.done_reason) == ([call], False, "stop")
    monkeypatch.undo()
    history = [*GO, message, {"role": "tool", "tool_name": "get_weather", "content": "17 degrees"}]
    longer = gemma.chat(model="default", messages=history, options={"num_predict": 3})
    assert (
        longer.prompt_eval_count
        > gemma.chat(model="default", messages=GO, options={"num_predict": 1}).prompt_eval_count
    )


@pytest.mark.parametrize("answer", ["Well, %s", "%s"])
def test_a_call_that_the_model_chose_to_make_is_no_text_where_it_is_cut(client, monkeypatch, answer):
    """A model without sense is led to write it by another grammar."""
    text = answer % HERMES.call("get_weather", '{"city": "Rome", "days": 1}')
    monkeypatch.setattr(jobs, "tool_grammar", lambda *_: f"start: {json.dumps(text)}")
    for size in range(1, 200, 3):
        fields = {"tools": TOOLS, "stream": size % 2 == 0}
        reply = client.chat("Go", size, **fields)
        content, calls, is_cut = chat_stream(reply.text) if fields["stream"] else chat_answer(good(reply))
        assert answer.removesuffix("%s").startswith(content)
        if not is_cut:
            assert calls == [("get_weather", '{"city": "Rome", "days": 1}')]
            return


@pytest.mark.parametrize("choice", ["auto", None])
def test_a_bare_call_is_a_call_where_text_was_allowed(client, monkeypatch, choice):
    """As Qwen2.5-Coder writes it. An answer that was to be JSON is none."""
    arguments = '{\n    "city": "Rome"\n  }'
    bare = '```json\n{\n  "name": "get_weather",\n  "arguments": ' + arguments + "\n}\n```"
    monkeypatch.setattr(jobs, "tool_grammar", lambda *_: f"start: {json.dumps(bare)}")
    fields = {"tools": TOOLS, "tool_choice": choice}
    (whole,) = good(client.chat("Go", ROOM, **fields))["choices"]
    assert (whole["message"]["content"], whole["finish_reason"]) == (None, "tool_calls")
    assert whole["message"]["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": arguments}
    content, calls, reason = joined(client.chat("Go", ROOM, **fields, stream=True).text)
    assert (content, calls[0]["function"], reason) == (
        "",
        whole["message"]["tool_calls"][0]["function"],
        "tool_calls",
    )
    (answer,) = good(client.chat("Go", ROOM, **fields, response_format={"type": "json_object"}))["choices"]
    assert (answer["message"]["content"], answer["finish_reason"]) == (bare, "stop")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "string"}}}]},
            "tools[...].function.parameters",
        ),
        (
            {
                "tools": [
                    {"type": "function", "function": {"name": "a", "strict": True, "parameters": {"not": {}}}}
                ]
            },
            "tools",
        ),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS[1:], "tool_choice": NAMED}, "tool_choice"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[...].content"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": []}]}, "messages[...].content"),
    ],
)
def test_bad_tools(client, fields, param):
    assert refused(client.post("/v1/chat/completions", json=say() | fields))["param"] == param
