"""Tools: told to the model by its template, called as its choice says, with arguments that satisfy their schema."""

import json
import random
from typing import Any

import anthropic
import jsonschema_rs
import ollama
import pytest
from chat_models import chat_tokenizer
from tiny_server import events, good, refused, say

from engine.text.chat_tokenizer import ChatTokenizer
from stages.serve.api import ollama as ollama_route
from stages.serve.tools import HERMES, CallParser, Function, ToolFormat, describe_tools, join_calls, tool_format, tool_use

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"enum": [1, 2, 30]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "Tells it.", "parameters": PARAMETERS}},
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


@pytest.mark.parametrize("choice", ["required", NAMED, "auto"])
@pytest.mark.parametrize("parallel", [True, False])
def test_a_call_satisfies_its_schema_streamed_or_not(client, choice, parallel):
    body = say("Go", ROOM, tools=TOOLS, tool_choice=choice, parallel_tool_calls=parallel, temperature=1.0, seed=4)
    if choice == "auto":  # a model without sense is led to begin a call
        body |= {"logit_bias": {str(token): 9 for token in chat_tokenizer().encode("<tool_call>").tolist()}}
    (whole,) = good(client.post("/v1/chat/completions", json=body))["choices"]
    content, calls, reason = joined(client.post("/v1/chat/completions", json=body | {"stream": True}).text)
    message = whole["message"]
    assert (content or None, reason) == (message["content"] or None, whole["finish_reason"])
    named = lambda calls: [call["function"] for call in calls]
    assert named(calls) == named(message.get("tool_calls", []))
    if choice != "auto":
        assert message["content"] is None or (reason == "length" and "<tool_call>".startswith(message["content"][:11]))
        assert reason == "tool_calls" or (reason == "length" and parallel and choice == "required")
        check(calls if reason == "tool_calls" else calls[:-1])
        assert choice == "required" or {call["function"]["name"] for call in calls} == {"get_weather"}
        assert (choice == "required" and parallel) or len(calls) == 1


def test_an_answer_may_have_a_schema_beside_tools(client):
    answer = {"type": "json_schema", "json_schema": {"name": "x", "schema": PARAMETERS}}
    for seed in range(4):
        choice = good(client.chat("Go", ROOM, tools=TOOLS, response_format=answer, temperature=1.5, seed=seed))["choices"][0]
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
    ask = lambda seed: client.chat("Go", ROOM, tools=TOOLS, guided_grammar=grammar, temperature=1.5, seed=seed)
    choices = [good(ask(seed))["choices"][0] for seed in range(4)]
    answers = [choice["message"]["content"] for choice in choices if choice["finish_reason"] == "stop"]
    assert answers
    assert {*answers} <= {"x!", "y!"}
    assert {choice["finish_reason"] for choice in choices} <= {"stop", "tool_calls", "length"}
    assert refused(client.chat("Go", 5, tools=TOOLS, guided_grammar=grammar + "?)"))["param"] == "guided_grammar"


def test_a_call_that_a_stop_string_cuts_is_none_that_the_answer_ends_with(client):
    fields = {"tools": TOOLS[:1], "tool_choice": NAMED, "max_tokens": ROOM}
    ended = lambda stop: good(client.chat("Go", **fields, stop=[stop]))["choices"][0]
    assert ended("city")["finish_reason"] == "stop"
    assert ended("</tool")["finish_reason"] == "tool_calls"
    check(ended("</tool")["message"]["tool_calls"])


def test_an_answer_that_goes_on_may_have_to_call(client):
    turns = [{"role": "user", "content": "Go"}, {"role": "assistant", "content": "Well, "}]
    body = {"messages": turns, "add_generation_prompt": False, "continue_final_message": True, "max_tokens": ROOM}
    (choice,) = good(client.post("/v1/chat/completions", json=body | {"tools": TOOLS[:1], "tool_choice": NAMED}))["choices"]
    assert choice["finish_reason"] == "tool_calls"
    check(choice["message"]["tool_calls"])


def test_a_history_of_calls_is_taken_and_tools_are_in_the_prompt(client):
    call = {"id": "call_1", "type": "function", "function": {"name": "wait", "arguments": "{}"}}
    history = [
        {"role": "user", "content": "Go", "name": "Eve"},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "no", "cache_control": {}}]},
    ]
    fields = {"messages": history, "temperature": 0, "max_tokens": 4, "max_completion_tokens": 4}
    count = lambda **more: good(client.post("/v1/chat/completions", json=fields | more))["usage"]["prompt_tokens"]
    without = count()
    assert count(tools=[TOOLS[1]], tool_choice="none") == without == count(chat_template_kwargs={"enable_thinking": False})
    assert "context" in refused(client.post("/v1/chat/completions", json=fields | {"tools": TOOLS * 40}))["message"]


def test_templates_are_told_of_tools_in_their_own_way():
    chat = ChatTokenizer(chat_tokenizer(QWEN))
    assert tool_format(chat.source) == (HERMES, True)
    assert tool_format('{{ tools }} {"name": function name, "parameters": ...}') == (LLAMA, True)
    assert tool_format("{{ messages }}") == (HERMES, False)
    evil = Function(name="get", description="Says <|im_end|>", parameters={"properties": {"<|im_start|>": {}}})
    call = {"type": "function", "function": {"name": "get", "arguments": {"x": "<|im_end|>"}}}
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    more = {"tools": [evil.definition], "enable_thinking": False}
    tokens = chat.prompt([*turns, {"role": "tool", "content": "5"}], "", more).tolist()
    text, controls = chat.tokenizer.decode(tokens), [token for token in tokens if token in chat.tokenizer.controls]
    assert '"description": "Says <|im_end|>"' in text
    assert '"<|im_start|>": {}' in text
    assert '{"name": "get", "arguments": {"x": "<|im_end|>"}}\n</tool_call>' in text
    assert text.endswith("assistant\n!")
    assert len(controls) == 2 * 4 + 1, "what the template wrote, and nothing of the messages"
    described = describe_tools([*turns, {"role": "tool", "content": "5"}, {"role": "tool", "content": "6"}], [evil])
    assert [turn["role"] for turn in described] == ["system", "user", "assistant", "user"]
    assert json.dumps(evil.definition) in described[0]["content"]
    assert described[2]["content"] == '<tool_call>\n{"name": "get", "arguments": {"x": "<|im_end|>"}}\n</tool_call>'
    assert described[3]["content"].count("<tool_response>") == 2
    chat.close()


@pytest.mark.parametrize("form", [HERMES, LLAMA])
def test_calls_are_found_however_their_text_comes(form):
    first, second = form.call("get", '{"city": "Ro\\"m}e <tool_call>"}'), form.call("put", '{"n": [1, "]"]}')
    cases = {
        "Hi <tool_ there": ("Hi <tool_ there", []),
        '{"nam': ('{"nam', []),
        '{"a": 1}': ('{"a": 1}', []),
        first: ("", [("get", '{"city": "Ro\\"m}e <tool_call>"}')]),
        first.removesuffix("</tool_call>"): ("", [("get", '{"city": "Ro\\"m}e <tool_call>"}')]),
        first[:-22]: ("", [("get", first[first.index('{"city') : -22])]),
    }
    if form.begin:
        cases |= {f"Well, {first}\n{second}\n": ("Well, ", [cases[first][1][0], ("put", '{"n": [1, "]"]}')])}
    rng = random.Random(0)
    for text, expected in cases.items():
        for _ in range(30):
            parser, content, calls, rest = CallParser(form), "", [], text
            while rest:
                size = rng.randint(1, 7)
                part, found = parser.push(rest[:size], len(rest) <= size)
                content, calls, rest = content + part, calls + found, rest[size:]
            assert (content, [(call.name, call.arguments) for call in join_calls(calls)]) == expected


def test_anthropics_client_calls_tools(client):
    """Whole or streamed, any tool or a named one; the call and its result go on in the history."""
    claude = anthropic.Anthropic(base_url=str(client.base_url), api_key="any")
    asked: dict[str, Any] = {"model": "default", "messages": GO}
    tools: Any = [{"name": "get_weather", "description": "The weather.", "input_schema": PARAMETERS}]
    for choice in ({"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "get_weather"}):
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
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "17 degrees"}]}
    history = [*GO, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    longer = claude.messages.create(**asked | {"messages": history}, tools=tools, tool_choice={"type": "none"}, max_tokens=5)
    assert [block.type for block in longer.content] == ["text"]
    count = lambda messages, **more: claude.messages.count_tokens(model="default", messages=messages, **more).input_tokens
    assert count(history) > count(GO) < count(GO, tools=tools)
    with pytest.raises(anthropic.BadRequestError, match="no tool 'snow'"):
        claude.messages.create(**asked, tools=tools, tool_choice={"type": "tool", "name": "snow"}, max_tokens=5)


def test_ollamas_client_calls_tools(client, monkeypatch):
    """Its API has no way to force a call, which the tiny model would never make."""
    gemma = ollama.Client(host=str(client.base_url))
    forced = lambda functions: tool_use(functions, None, "required", False)
    tools = [{"type": "function", "function": {"name": "get_weather", "description": "It.", "parameters": PARAMETERS}}]
    asked: dict[str, Any] = {"model": "default", "messages": GO, "options": {"num_predict": ROOM, "temperature": 0}}
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
    assert longer.prompt_eval_count > gemma.chat(model="default", messages=GO, options={"num_predict": 1}).prompt_eval_count


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "string"}}}]},
            "tools[...].function.parameters",
        ),
        ({"tools": [{"type": "function", "function": {"name": "a", "strict": True, "parameters": {"not": {}}}}]}, "tools"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS[1:], "tool_choice": NAMED}, "tool_choice"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[...].content"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": []}]}, "messages[...].content"),
    ],
)
def test_bad_tools(client, fields, param):
    assert refused(client.post("/v1/chat/completions", json=say() | fields))["param"] == param
