"""Tools that an answer may call: their definitions, the calls of them, and both as turns of a conversation."""

import contextlib
import uuid
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

from engine.errors import InvalidField

Turn = dict[str, Any]  # a message as templates read it
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
        """The schema of the arguments: without parameters there are none."""
        return {"type": "object", **(self.parameters or {"properties": {}})}

    @property
    def definition(self) -> dict[str, Any]:
        """The function as chat templates read it, which may look for `properties`."""
        parameters = {"type": "object", "properties": {}, **self.schema}
        function = {"name": self.name, "description": self.description or "", "parameters": parameters}
        return {"type": "function", "function": function}


class ToolCall(NamedTuple):
    """A call in a completion, or the next part of its arguments: then `id` and `name` are empty."""

    number: int
    id: str
    name: str
    arguments: str


def make_call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


class ToolUse(NamedTuple):
    """The tools that an answer may call, or must if `required`; several if `parallel`.

    `name`: of the only one that it may call, if given.
    """

    tools: Sequence[Function] = ()
    required: bool = False
    name: str | None = None
    parallel: bool = True

    @property
    def callable_tools(self) -> list[Function]:
        return [tool for tool in self.tools if self.name in (None, tool.name)]


NO_TOOLS = ToolUse()


def tool_use(
    functions: Sequence[Function], name: str | None = None, choice: Any = None, parallel: bool | None = True
) -> ToolUse:
    """Returns the use of functions as tools. `name`: the one to be called, in place of the choice.

    Raises InvalidField.
    """
    for function in functions:
        if function.schema["type"] != "object":
            field = "tools[...].function.parameters"
            raise InvalidField(field, f"tools: the parameters of {function.name} must be an object.")
    required = choice == "required" or name is not None
    if required and not functions:
        raise InvalidField("tool_choice", "tool_choice asks for a call, and there are no tools.")
    if name not in (None, *(function.name for function in functions)):
        raise InvalidField("tool_choice", f"tool_choice: there is no tool {name!r:.80} in tools.")
    if choice == "none":
        functions = ()
    return ToolUse(functions, required, name, parallel is not False)


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
    """Returns whole calls, of parts in the order in which they came."""
    calls: list[ToolCall] = []
    for part in parts:
        if part.id:
            calls.append(part)
        else:
            calls[-1] = calls[-1]._replace(arguments=calls[-1].arguments + part.arguments)
    return calls
