"""Writes the grammar of an answer that calls tools, in llguidance's dialect of Lark."""

import json
from collections.abc import Sequence

from engine.inference.grammars import json_rule
from stages.serve.grammar import Grammar
from stages.serve.tool_format import ToolFormat
from stages.serve.tools import Function, ToolUse

MAX_CALLS = 8  # in an answer that must call: a small model repeats its call until the context is full
JSON_START = "start: %json"


def tool_grammar(use: ToolUse, form: ToolFormat, answer: Grammar | None) -> str:
    """Returns the grammar of an answer that calls tools, or may and else is text, which keeps to `answer`.

    The CallParser reads it from a state that follows from the same three questions:

        must it call?   has its text a grammar?   has a call a mark?   grammar              first state
        yes             either                    either               calls_only           opening
        no              yes                       either               calls_or_grammar     start
        no              no                        yes                  marked_grammar       text
        no              no                        no                   calls_or_any_text    start

    Raises UserError for parameters that cannot be enforced, and as `answer` does.
    """
    tools = use.callable_tools
    several = use.parallel and use.name is None and bool(form.mark)
    if use.required:
        return calls_only(form, tools, several)
    if answer:
        return calls_or_grammar(form, tools, several, answer.make())
    if form.mark:
        return marked_grammar(form, tools, several)
    return calls_or_any_text(form, tools)


def marked_grammar(form: ToolFormat, tools: Sequence[Function], several: bool) -> str:
    """Returns the grammar of a text with a call in it, or of text and `several` calls in turn.

    As soon as the mark is there, a call is forced (lazy).
    """
    start = "(mark call)* text" if several else "mark call | text"
    mark = f"mark[lazy]: TEXT {json.dumps(form.mark)}"
    call = _alternatives([call_rule(form, tool, after_mark=True) for tool in tools])
    return f"start: {start}\n{mark}\ntext: TEXT\nTEXT: /(?s:.*)/\n{call}"


def calls_only(form: ToolFormat, tools: Sequence[Function], several: bool) -> str:
    """Returns the grammar of an answer that is one call, or `several`: at most MAX_CALLS."""
    call = _alternatives([call_rule(form, tool) for tool in tools])
    return f"start: {_calls(several)}\n{call}"


def calls_or_any_text(form: ToolFormat, tools: Sequence[Function]) -> str:
    """Returns the grammar of an answer that is a call without a mark, or a text that begins otherwise."""
    call = _alternatives([call_rule(form, tool) for tool in tools])
    return f"start: call | text\n{call}\ntext: | /[^\\{{](?s:.*)/"


def calls_or_grammar(form: ToolFormat, tools: Sequence[Function], several: bool, answer: str) -> str:
    """Returns the grammar of an answer as `calls_only` has it, or of a text that keeps to `answer`."""
    call = _alternatives([call_rule(form, tool) for tool in tools])
    text = f"%lark {{\n{answer}\n}}"  # nested: its rules may have the names of those here
    if answer.startswith(JSON_START):
        text = answer.removeprefix("start: ")
    return f"start: {_calls(several)} | text\n{call}\ntext: {text}"


def _calls(several: bool) -> str:
    """Returns the part of the start rule that stands for one call, or for several."""
    if not several:
        return "call"
    return f'call ("\\n" call){{0,{MAX_CALLS - 1}}}'


def _alternatives(calls: Sequence[str]) -> str:
    """Returns the rule of a call, of the rules of calls of each tool."""
    return f"call: {' | '.join(calls)}"


def call_rule(form: ToolFormat, tool: Function, *, after_mark: bool = False) -> str:
    """Returns the grammar of a call of one tool, without the mark of its beginning if `after_mark`.

    Raises UserError for parameters that cannot be enforced.
    """
    opening = form.opening(tool.name)
    parts = [opening]
    if after_mark:
        parts = [opening.removeprefix(form.mark)]
    elif not form.mark:  # where an answer may be JSON too, both are read in the same parts
        parts = ["{", '"name"', ": ", f'"{tool.name}"', ", ", f'"{form.key}"', ": "]
    begin = " ".join(map(json.dumps, parts))
    end = json.dumps("}" + form.end)
    return f"{begin} {json_rule(tool.schema, not tool.strict)} {end}"
