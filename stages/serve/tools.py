"""Tools: their definitions in a prompt, the grammar of calls to them, and the calls in a completion.

A model calls a tool as its chat template shows it: between `<tool_call>` and `</tool_call>`
(Hermes, Qwen), or with an answer that is one JSON object (Llama 3). A template that knows no tools
gets Hermes' own description of them as a system message.
"""

import contextlib
import itertools
import json
import re
import uuid
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

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

For each function call, return a json object with function name and arguments within <tool_call></tool_call> \
XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


class Grammar(NamedTuple):
    """The grammar for which the field of a request asks; `make` returns it."""

    field: str
    make: Callable[[], str]


def answer_grammar(field: str, schema: dict[str, Any] | None) -> Grammar:
    return Grammar(field, partial(json_grammar, schema or {"type": "object"}))


ToolName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,64}$(?!\n)")]


class Function(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A function that the model may call.

    `strict`: what of the schema cannot be enforced is refused, not ignored.
    """

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


def make_call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


class ToolFormat(NamedTuple):
    """How a model writes a call: `begin` {"name": ..., `key`: ...} `end`.

    Without a `begin` it is all of an answer.
    """

    begin: str
    key: str
    end: str

    def opening(self, name: str) -> str:
        return f'{self.begin}{{"name": {json.dumps(name)}, "{self.key}": '

    def call(self, name: str, arguments: str) -> str:
        return f"{self.opening(name)}{arguments}}}{self.end}"


HERMES = ToolFormat("<tool_call>\n", "arguments", "\n</tool_call>")


def tool_format(template: str) -> tuple[ToolFormat, bool]:
    """Returns the format in which a chat template shows calls, and whether it knows tools at all."""
    if not re.search(r"\btools\b", template):
        return HERMES, False
    if "<tool_call>" in template:
        return HERMES, True
    key = "parameters" if '"parameters"' in template else "arguments"
    return ToolFormat("", key, ""), True


class ToolUse(NamedTuple):
    """The tools that an answer may call, or must if `required`; several if `parallel`.

    `name`: of the only one that it may call, if given.
    """

    tools: Sequence[Function] = ()
    required: bool = False
    name: str | None = None
    parallel: bool = True

    def grammar(self, form: ToolFormat, answer: Grammar | None) -> Grammar:
        """Returns the grammar of calls and text, or of an answer that has a grammar of its own."""
        tools = [tool for tool in self.tools if self.name in (None, tool.name)]
        several = self.parallel and self.name is None and bool(form.begin)

        def make() -> str:
            text = None
            if not self.required:
                text = answer.make() if answer else ""
            return tool_grammar(form, tools, several, text)

        return Grammar("tools", make)


NO_TOOLS = ToolUse()


def tool_use(
    functions: Sequence[Function], named: str | None = None, choice: Any = None, parallel: bool | None = True
) -> ToolUse:
    """Returns the use of functions as tools. `named`: the one to be called, in place of the choice.

    Raises InvalidField.
    """
    for function in functions:
        if function.schema["type"] != "object":
            field = "tools[...].function.parameters"
            raise InvalidField(field, f"tools: the parameters of {function.name} must be an object.")
    required = choice == "required" or named is not None
    if required and not functions:
        raise InvalidField("tool_choice", "tool_choice asks for a call, and there are no tools.")
    if named not in (None, *(function.name for function in functions)):
        raise InvalidField("tool_choice", f"tool_choice: there is no tool {named!r:.80} in tools.")
    if choice == "none":
        functions = ()
    return ToolUse(functions, required, named, parallel is not False)


def make_turn(role: str, content: str, **more: Any) -> Turn:
    """Returns a message as templates read it, with what there is of `more`; `developer` becomes `system`."""
    if role == "developer":
        role = "system"
    present = {name: value for name, value in more.items() if value}
    return {"role": role, "content": content, **present}


def call_turn(id: str, name: str, arguments: Any) -> Turn:
    """Returns a call as templates read it: its arguments are an object, or what else a model wrote."""
    if isinstance(arguments, str):
        with contextlib.suppress(msgspec.DecodeError):
            arguments = msgspec.json.decode(arguments)
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def parse_arguments(call: ToolCall) -> dict[str, Any] | None:
    """Returns the arguments of a call; None where they are cut."""
    with contextlib.suppress(msgspec.DecodeError):
        return msgspec.json.decode(call.arguments)
    return None


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

    In place of a call there may be text: None for no text, "" for any, or the grammar of a text.
    Raises UserError for parameters that cannot be enforced.
    """
    calls = [call_rule(form, tool) for tool in tools]
    # Text and calls in turn; as soon as the mark is there, a call is forced (lazy).
    if text == "" and form.begin:
        mark = form.begin.strip()
        rest = " | ".join(call.replace(json.dumps(mark)[:-1], '"', 1) for call in calls)
        start = "(mark call)* text" if several else "mark call | text"
        return (
            f"start: {start}\nmark[lazy]: TEXT {json.dumps(mark)}\ntext: TEXT\nTEXT: /(?s:.*)/\ncall: {rest}"
        )
    start = "call"
    if several:
        start = f'call ("\\n" call){{0,{MAX_CALLS - 1}}}'
    rules = f"call: {' | '.join(calls)}"
    if text is None:
        return f"start: {start}\n{rules}"
    if not text:
        return f"start: {start} | text\n{rules}\ntext: | /[^\\{{](?s:.*)/"
    if not text.startswith("start: %json"):  # its rules may have the names of those here
        text = f"%lark {{\n{text}\n}}"
    return f"start: {start} | text\n{rules}\ntext: {text.removeprefix('start: ')}"


def call_rule(form: ToolFormat, tool: Function) -> str:
    """Returns the grammar's rule of a call of one tool.

    Raises UserError for parameters that cannot be enforced.
    """
    parts = [form.opening(tool.name)]
    if not form.begin:  # where an answer may be JSON too, both are read in the same parts
        parts = ["{", '"name"', ": ", f'"{tool.name}"', ", ", f'"{form.key}"', ": "]
    opening = " ".join(map(json.dumps, parts))
    return f"{opening} {json_rule(tool.schema, not tool.strict)} {json.dumps('}' + form.end)}"


def describe_tools(turns: Iterable[Turn], tools: Sequence[Function]) -> list[Turn]:
    """Returns turns for a template that knows no tools: the system message describes them.

    Calls and their results become text.
    """
    described: list[Turn] = []
    has_calls = False
    for turn in turns:
        has_calls = has_calls or "tool_calls" in turn
        if turn["role"] == "tool" and has_calls:
            text = f"<tool_response>\n{turn['content']}\n</tool_response>"
            if (
                described
                and described[-1]["role"] == "user"
                and described[-1]["content"].endswith("</tool_response>")
            ):
                described[-1]["content"] += f"\n{text}"
            else:
                described.append(make_turn("user", text))
            continue
        functions = [call["function"] for call in turn.get("tool_calls", ())]
        calls = [
            HERMES.call(each["name"], json.dumps(each["arguments"], ensure_ascii=False)) for each in functions
        ]
        described.append({**turn, "content": "\n".join(filter(None, (turn["content"], *calls)))})
    if tools:
        preamble = PREAMBLE.format(
            tools="\n".join(json.dumps(tool.definition, ensure_ascii=False) for tool in tools)
        )
        if described and described[0]["role"] == "system":
            described[0]["content"] += f"\n\n{preamble}"
        else:
            described.insert(0, make_turn("system", preamble))
    return described


class JsonEnd:
    """Finds the end of a JSON object whose text comes in parts."""

    def __init__(self) -> None:
        self.is_reached = False
        self._depth = 0
        self._in_string = False
        self._is_escaped = False

    def take(self, text: str) -> int:
        """Returns how many characters of the next part belong to the object."""
        for index, character in enumerate(text):
            if self._is_escaped:
                self._is_escaped = False
            elif self._in_string:
                self._is_escaped = character == "\\"
                self._in_string = character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.is_reached = True
                    return index + 1
        return len(text)


class BareCall:
    """A call without its mark, which some models write although their template has it (Qwen2.5-Coder).

    It is all of an answer: one JSON object of the name of a tool and the arguments. White space and
    a fence of ``` or ```json may be around it.
    """

    def __init__(self, names: Sequence[str]) -> None:
        # How a call may begin, without white space, of which the names and the keys have none.
        self._begins = []
        for fence, name, key in itertools.product(("", "```", "```json"), names, ("arguments", "parameters")):
            self._begins.append(f'{fence}{{"name":"{name}","{key}":{{')
        any_name = "|".join(map(re.escape, names))
        head = r'\s*(```(?:json)?\s*)?\{\s*"name"\s*:\s*"(%s)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
        self._head = re.compile(head % any_name)
        self._end = JsonEnd()
        # Text not yet read: the answer's beginning until its arguments begin, and then what follows
        # them.
        self._rest = ""
        self._closing = ""  # what must follow the arguments, without white space
        self.name = ""
        self.arguments = ""

    @property
    def is_whole(self) -> bool:
        """Whether the answer so far is a call with nothing missing."""
        return self._end.is_reached and "".join(self._rest.split()) == self._closing and self._is_json

    def push(self, text: str) -> bool:
        """Returns whether the answer, whose next part is `text`, may still be a call."""
        self._rest += text
        if not self.name:
            head = self._head.match(self._rest)
            if not head:
                begin = "".join(self._rest.split())
                return any(call.startswith(begin) for call in self._begins)
            self.name = head[2]
            self._closing = "}```" if head[1] else "}"
            self._rest = self._rest[head.end() :]
        if not self._end.is_reached:
            size = self._end.take(self._rest)
            self.arguments += self._rest[:size]
            self._rest = self._rest[size:]
        return not self._rest or self._closing.startswith("".join(self._rest.split()))

    @property
    def _is_json(self) -> bool:
        try:
            return isinstance(msgspec.json.decode(self.arguments), dict)
        except msgspec.DecodeError:
            return False


class CallParser:
    """Takes the calls out of a completion's text as it comes.

    The grammar of the tools has seen to their form.

    `is_free`: the text beside calls has no grammar of its own, so that calls with a mark may stand
    anywhere in it; else an answer is calls from its beginning on, or none. A call that is cut has
    its name and its arguments so far. One that is cut before its arguments begin is left out. No
    part of a call is text.
    """

    def __init__(self, form: ToolFormat, tools: ToolUse, is_free: bool) -> None:
        self._names = [tool.name for tool in tools.tools]
        self._openings = tuple(map(form.opening, self._names))
        self._closing = "}" + form.end
        self._mark = ""
        if is_free and not tools.required:
            self._mark = form.begin.strip()
        self._text = ""
        self._state: Literal["start", "text", "opening", "arguments", "closing"] = "start"
        if tools.required:
            self._state = "opening"
        elif self._mark:
            self._state = "text"
        self._arguments = JsonEnd()
        self._after_call = False
        self._bare: BareCall | None = None
        if self._mark:
            self._bare = BareCall(self._names)
        self.calls = 0

    @property
    def has_whole_calls(self) -> bool:
        """Whether there are calls, and the arguments of the last are whole."""
        return self.calls > 0 and self._state != "arguments"

    def push(self, text: str, last: bool, is_cut: bool = False) -> tuple[str, list[ToolCall]]:
        """Returns what becomes certain to be text, and the calls.

        `last`: no more text comes. `is_cut`: a limit or a stop string has ended the text, so that
        an end which may begin a call is left out as a call that is cut.
        """
        self._text += text
        if self._bare:
            may_be_call = self._bare.push(text)
            if may_be_call and not last:
                return "", []
            bare = self._bare
            self._bare = None
            if may_be_call and (is_cut or bare.is_whole):
                return "", self._take_bare(bare)
        content = ""
        calls: list[ToolCall] = []
        while self._text:
            before = self._text, self._state
            if self._state == "start":
                self._start(last, is_cut)
            elif self._state == "text":
                content += self._take_text(last, is_cut)
            elif self._state == "opening":
                calls += self._open(last)
            elif self._state == "arguments":
                calls.append(self._take_arguments())
            else:
                self._close(last)
            if (self._text, self._state) == before:
                break
        return content, calls

    def _take_bare(self, call: BareCall) -> list[ToolCall]:
        """Returns the call without a mark that is all of the answer, as far as it goes where it is cut."""
        self._text = ""
        if not call.name:
            return []
        self.calls = 1
        if not call.is_whole:
            self._state = "arguments"
        return [ToolCall(0, make_call_id(), call.name, call.arguments)]

    def _start(self, last: bool, is_cut: bool) -> None:
        """Decides whether an answer begins with a call, once enough of its text is there."""
        if self._text.startswith(self._openings):
            self._state = "opening"
        elif not any(opening.startswith(self._text) for opening in self._openings) or (last and not is_cut):
            self._state = "text"
        elif last:
            self._text = ""

    def _take_text(self, last: bool, is_cut: bool) -> str:
        """Takes out the text before the mark of a call, or before what may begin one."""
        size = -1
        if self._mark:
            size = self._text.find(self._mark)
        if size >= 0:
            self._state = "opening"
        else:
            size = len(self._text)
            if self._mark and (is_cut or not last):
                size -= overlap(self._text, self._mark)
        part = self._text[:size]
        self._text = self._text[size:]
        if last and self._state == "text":
            self._text = ""
        if self._after_call:  # line ends between calls are no text
            part = part.lstrip()
            self._after_call = not part
        return part

    def _open(self, last: bool) -> list[ToolCall]:
        """Takes out the opening of a call, once it is whole."""
        self._text = self._text.lstrip()  # between calls
        for name, opening in zip(self._names, self._openings):
            if self._text.startswith(opening):
                self._text = self._text.removeprefix(opening)
                self._state = "arguments"
                self._arguments = JsonEnd()
                self.calls += 1
                return [ToolCall(self.calls - 1, make_call_id(), name, "")]
        if last:
            self._text = ""
        return []

    def _take_arguments(self) -> ToolCall:
        size = self._arguments.take(self._text)
        part = self._text[:size]
        self._text = self._text[size:]
        if self._arguments.is_reached:
            self._state = "closing"
        return ToolCall(self.calls - 1, "", "", part)

    def _close(self, last: bool) -> None:
        """Takes out the closing of a call, once it is whole; or what there is of it, if no more comes."""
        if self._text.startswith(self._closing):
            self._text = self._text.removeprefix(self._closing)
            self._state = "text" if self._mark else "opening"
            self._after_call = True
        elif last:
            self._text = ""
