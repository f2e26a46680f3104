"""Tools: their definitions in a prompt, the grammar of calls to them, and the calls in the text of a completion.

A model calls a tool as its chat template shows it: between `<tool_call>` and `</tool_call>` (Hermes, Qwen), or with an answer
that is one JSON object (Llama 3). A template that knows no tools gets Hermes' own description of them as a system message.
"""

import contextlib
import json
import re
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

from engine.errors import InvalidField
from engine.inference.constraints import json_grammar, json_rule
from engine.text.detokenizer import overlap

Turn = dict[str, Any]  # a message as templates read it
MAX_CALLS = 8  # in an answer that must call: a small model repeats its call until the context is full

# After Hermes 2 Pro (Teknium et al. 2024), as Qwen 2.5's template has it.
PREAMBLE = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


class Grammar(NamedTuple):
    """The grammar for which the field of a request asks; `make` returns it."""

    field: str
    make: Callable[[], str]


def answer_grammar(field: str, schema: dict[str, Any] | None) -> Grammar:
    return Grammar(field, lambda: json_grammar(schema or {"type": "object"}))


ToolName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,64}$(?!\n)")]


class Function(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A function that the model may call. `strict`: what of the schema cannot be enforced is refused, not ignored."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "object", "properties": {}, **(self.parameters or {})}

    @property
    def definition(self) -> dict[str, Any]:
        function = {"name": self.name, "description": self.description or "", "parameters": self.schema}
        return {"type": "function", "function": function}


class ToolCall(NamedTuple):
    """A call in a completion, or the next part of its arguments: then `id` and `name` are empty."""

    number: int
    id: str
    name: str
    arguments: str


class ToolFormat(NamedTuple):
    """How a model writes a call: `begin` {"name": ..., `key`: ...} `end`. Without a `begin` it is all of an answer."""

    begin: str
    key: str
    end: str

    def opening(self, name: str) -> str:
        return f'{self.begin}{{"name": {json.dumps(name)}, "{self.key}": '

    def call(self, name: str, arguments: str) -> str:
        return f"{self.opening(name)}{arguments}}}{self.end}"


HERMES = ToolFormat("<tool_call>\n", "arguments", "\n</tool_call>")


def tool_format(template: str) -> tuple[ToolFormat, bool]:
    """Returns the format in which a chat template shows calls, and whether the template knows tools at all."""
    if not re.search(r"\btools\b", template):
        return HERMES, False
    if "<tool_call>" in template:
        return HERMES, True
    return ToolFormat("", "parameters" if '"parameters"' in template else "arguments", ""), True


class ToolUse(NamedTuple):
    """The tools that an answer may call, or must if `required`: only the one of `name` if given, and several if `parallel`."""

    tools: Sequence[Function] = ()
    required: bool = False
    name: str | None = None
    parallel: bool = True

    def grammar(self, form: ToolFormat, answer: Grammar | None) -> Grammar:
        """Returns the grammar of calls and text, or of an answer that has a grammar of its own."""
        tools = [tool for tool in self.tools if self.name in (None, tool.name)]
        several = self.parallel and self.name is None and bool(form.begin)
        text = None if self.required else answer.make if answer else lambda: ""
        return Grammar("tools", lambda: tool_grammar(form, tools, several, text and text()))


NO_TOOLS = ToolUse()


def tool_use(
    functions: Sequence[Function], named: str | None = None, choice: Any = None, parallel: bool | None = True
) -> ToolUse:
    """Returns the use of functions as tools. `named`: the one to be called, in place of the choice. Raises InvalidField."""
    for function in functions:
        if function.schema["type"] != "object":
            field = "tools[...].function.parameters"
            raise InvalidField(field, f"tools: the parameters of {function.name} must be an object.")
    required = choice == "required" or named is not None
    if required and not functions:
        raise InvalidField("tool_choice", "tool_choice asks for a call, and there are no tools.")
    if named not in (None, *(function.name for function in functions)):
        raise InvalidField("tool_choice", f"tool_choice: there is no tool {named!r:.80} in tools.")
    return ToolUse(() if choice == "none" else functions, required, named, parallel is not False)


def make_turn(role: str, content: str, **more: Any) -> Turn:
    """Returns a message as templates read it, with what there is of `more`; the role `developer` becomes `system`."""
    present = {name: value for name, value in more.items() if value}
    return {"role": "system" if role == "developer" else role, "content": content, **present}


def call_turn(id: str, name: str, arguments: Any) -> Turn:
    """Returns a call as templates read it: its arguments are an object, or what else a model wrote."""
    if isinstance(arguments, str):
        with contextlib.suppress(msgspec.DecodeError):
            arguments = msgspec.json.decode(arguments)
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def parse_arguments(call: ToolCall) -> dict[str, Any]:
    """Returns the arguments of a whole call; none where the answer was cut off in them."""
    with contextlib.suppress(msgspec.DecodeError):
        return msgspec.json.decode(call.arguments)
    return {}


def join_calls(parts: Iterable[ToolCall]) -> list[ToolCall]:
    calls: list[ToolCall] = []
    for part in parts:
        if part.id:
            calls.append(part)
        else:
            calls[-1] = calls[-1]._replace(arguments=calls[-1].arguments + part.arguments)
    return calls


def tool_grammar(form: ToolFormat, tools: Sequence[Function], several: bool, text: str | None) -> str:
    """Returns the grammar of an answer that calls a tool, or `several`.

    In place of a call there may be text: None for no text, "" for any, or the grammar of a text. Raises UserError for
    parameters that cannot be enforced.
    """
    end = json.dumps("}" + form.end)
    # Where an answer may be JSON too, both are read in the same parts.
    parts = lambda name: [form.opening(name)] if form.begin else ["{", '"name"', ": ", f'"{name}"', ", ", f'"{form.key}"', ": "]
    opening = lambda tool: " ".join(map(json.dumps, parts(tool.name)))
    calls = [f"{opening(tool)} {json_rule(tool.schema, not tool.strict)} {end}" for tool in tools]
    if text == "" and form.begin:  # text and calls in turn; as soon as the mark is there, a call is forced (lazy)
        mark = form.begin.strip()
        rest = " | ".join(call.replace(json.dumps(mark)[:-1], '"', 1) for call in calls)
        start = "(mark call)* text" if several else "mark call | text"
        return f"start: {start}\nmark[lazy]: TEXT {json.dumps(mark)}\ntext: TEXT\nTEXT: /(?s:.*)/\ncall: {rest}"
    start = f'call ("\\n" call){{0,{MAX_CALLS - 1}}}' if several else "call"
    other = "" if text is None else " | text"
    if text and not text.startswith("start: %json"):  # its rules may have the names of those here
        text = f"%lark {{\n{text}\n}}"
    rule = "" if text is None else f"\ntext: {text.removeprefix('start: ')}" if text else "\ntext: | /[^\\{](?s:.*)/"
    return f"start: {start}{other}\ncall: {' | '.join(calls)}{rule}"


def describe_tools(turns: Iterable[Turn], tools: Sequence[Function]) -> list[Turn]:
    """Returns turns for a template that knows no tools: described in the system message, calls and results as text."""
    described: list[Turn] = []
    has_calls = False
    for turn in turns:
        has_calls = has_calls or "tool_calls" in turn
        if turn["role"] == "tool" and has_calls:
            text = f"<tool_response>\n{turn['content']}\n</tool_response>"
            if described and described[-1]["role"] == "user" and described[-1]["content"].endswith("</tool_response>"):
                described[-1]["content"] += f"\n{text}"
            else:
                described.append(make_turn("user", text))
            continue
        functions = [call["function"] for call in turn.get("tool_calls", ())]
        calls = [HERMES.call(each["name"], json.dumps(each["arguments"], ensure_ascii=False)) for each in functions]
        described.append({**turn, "content": "\n".join(filter(None, (turn["content"], *calls)))})
    if tools:
        preamble = PREAMBLE.format(tools="\n".join(json.dumps(tool.definition, ensure_ascii=False) for tool in tools))
        if described and described[0]["role"] == "system":
            described[0]["content"] += f"\n\n{preamble}"
        else:
            described.insert(0, make_turn("system", preamble))
    return described


class CallParser:
    """Takes the calls out of a completion's text as it comes. The grammar has seen to it that they are whole."""

    def __init__(self, form: ToolFormat) -> None:
        self._form, self._mark = form, form.begin + '{"name": "'
        self._tail = "}" + (form.end or "\0")  # of an answer that is a call: its end
        self._head = re.compile(re.escape(form.begin) + r'\{"name": "([^"]*)", "' + form.key + '": ')
        self._text, self.calls = "", 0
        self._begun = self._in_arguments = self._after_call = False

    @property
    def has_whole_calls(self) -> bool:
        """Whether there are calls, the last of which no stop string has cut."""
        return self.calls > 0 and not self._in_arguments

    def push(self, text: str, last: bool) -> tuple[str, list[ToolCall]]:
        """Returns what becomes certain to be text, and the calls. `last`: no more text comes."""
        self._text += text
        content, calls = "", list[ToolCall]()
        while self._text:
            may_call = bool(self._form.begin) or not self._begun
            if self._in_arguments:
                cut = overlap(self._text, self._tail)
                if last and cut > bool(self._form.end) and self._tail not in self._text:  # a stop string may cut the tail
                    self._text += self._tail[cut:]
                if self._text.startswith(self._tail):
                    self._text = self._text.removeprefix(self._tail)
                    self._in_arguments, self._after_call = False, True
                elif part := self._before(self._tail, last):
                    calls.append(ToolCall(self.calls - 1, "", "", part))
                else:
                    break
            elif may_call and (head := self._head.match(self._text)):
                self._text = self._text[head.end() :]
                self.calls, self._in_arguments, self._begun = self.calls + 1, True, True
                calls.append(ToolCall(self.calls - 1, f"call_{uuid.uuid4().hex[:24]}", head[1], ""))
            elif part := self._before(self._mark, last or not may_call):
                part = part.lstrip() if self._after_call else part  # line ends between calls are no text
                content, self._begun, self._after_call = content + part, True, self._after_call and not part
            else:
                break
        return content, calls

    def _before(self, mark: str, last: bool) -> str:
        """Takes out the text before a mark, or before what may begin one; if that is nothing, and no more comes, all of it.

        The JSON of arguments has no line end, with which the mark of their end begins.
        """
        at = self._text.find(mark)
        size = (at if at >= 0 else len(self._text) - overlap(self._text, mark)) or last * len(self._text)
        part, self._text = self._text[:size], self._text[size:]
        return part
