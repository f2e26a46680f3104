"""How a chat template shows tools and calls of them; the description of tools for one that knows none.

A model calls a tool as its chat template shows it: between `<tool_call>` and `</tool_call>`
(Hermes, Qwen), or with an answer that is one JSON object (Llama 3). A template that knows no tools
gets Hermes' own description of them as a system message.
"""

import json
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from stages.serve.tools import Function, Turn, make_turn

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


class ToolFormat(NamedTuple):
    """How a model writes a call: `begin` {"name": ..., `key`: ...} `end`.

    Without a `begin` it is all of an answer.
    """

    begin: str
    key: str
    end: str

    @property
    def mark(self) -> str:
        """The text that tells a call from other text; empty where a call is all of an answer."""
        return self.begin.strip()

    def opening(self, name: str) -> str:
        """Returns the text of a call of this tool up to its arguments."""
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


def describe_tools(turns: Iterable[Turn], tools: Sequence[Function]) -> list[Turn]:
    """Returns turns for a template that knows no tools: the system message describes them.

    Calls and their results become text.
    """
    new_turns: list[Turn] = []
    has_calls = False
    for turn in turns:
        has_calls = has_calls or "tool_calls" in turn
        if turn["role"] == "tool" and has_calls:
            _append_result(new_turns, turn["content"])
        else:
            new_turns.append({**turn, "content": _content_with_calls(turn)})
    if tools:
        _add_preamble(new_turns, tools)
    return new_turns


def _append_result(turns: list[Turn], content: str) -> None:
    """Appends what a tool returned, as a message of the user's; results in a row share one."""
    text = f"<tool_response>\n{content}\n</tool_response>"
    last = turns[-1] if turns else None
    if last and last["role"] == "user" and last["content"].endswith("</tool_response>"):
        last["content"] += f"\n{text}"
    else:
        turns.append(make_turn("user", text))


def _content_with_calls(turn: Turn) -> str:
    """Returns the text of a message and its calls, on lines of their own."""
    parts = [turn["content"]]
    for call in turn.get("tool_calls", ()):
        function = call["function"]
        arguments = json.dumps(function["arguments"], ensure_ascii=False)
        parts.append(HERMES.call(function["name"], arguments))
    return "\n".join(filter(None, parts))


def _add_preamble(turns: list[Turn], tools: Sequence[Function]) -> None:
    """Adds the description of the tools to the system message, which is made if there is none."""
    definitions = [json.dumps(tool.definition, ensure_ascii=False) for tool in tools]
    preamble = PREAMBLE.format(tools="\n".join(definitions))
    if turns and turns[0]["role"] == "system":
        turns[0]["content"] += f"\n\n{preamble}"
    else:
        turns.insert(0, make_turn("system", preamble))
