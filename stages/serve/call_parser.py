"""Takes the calls of tools out of the text of a completion as it comes."""

import itertools
import re
from collections.abc import Sequence
from typing import Literal

import msgspec

from engine.text.detokenizer import overlap
from stages.serve.tool_format import ToolFormat
from stages.serve.tools import ToolCall, ToolUse, make_call_id


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


def without_space(text: str) -> str:
    return "".join(text.split())


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
        return self._end.is_reached and without_space(self._rest) == self._closing and self._is_json

    def push(self, text: str) -> bool:
        """Returns whether the answer, whose next part is `text`, may still be a call."""
        self._rest += text
        if not self.name:
            head = self._head.match(self._rest)
            if not head:
                begin = without_space(self._rest)
                return any(call.startswith(begin) for call in self._begins)
            self.name = head[2]
            self._closing = "}```" if head[1] else "}"
            self._rest = self._rest[head.end() :]
        if not self._end.is_reached:
            size = self._end.take(self._rest)
            self.arguments += self._rest[:size]
            self._rest = self._rest[size:]
        return not self._rest or self._closing.startswith(without_space(self._rest))

    @property
    def _is_json(self) -> bool:
        try:
            return isinstance(msgspec.json.decode(self.arguments), dict)
        except msgspec.DecodeError:
            return False


class CallParser:
    """Takes the calls out of a completion's text as it comes.

    The grammar of the tools has seen to their form; `tool_grammar` has the table of its modes, and
    of the state in which each begins. `is_free`: the text beside calls has no grammar of its own.

    - Calls with a mark may stand anywhere in free text. Any other answer is calls from its
      beginning on, or none.
    - A call that is cut has its name and its arguments so far.
    - A call that is cut before its arguments begin is left out.
    - No part of a call is text.
    """

    def __init__(self, form: ToolFormat, tools: ToolUse, is_free: bool) -> None:
        self._names = [tool.name for tool in tools.tools]
        self._openings = tuple(map(form.opening, self._names))
        self._closing = "}" + form.end  # of the call, behind its arguments
        self._text = ""  # not yet read
        self._state: Literal["start", "text", "opening", "arguments", "closing"] = "start"
        self._mark = ""  # of calls that may stand anywhere in the text
        self._bare: BareCall | None = None  # as long as the answer may be one
        if tools.required:
            self._state = "opening"
        elif is_free and form.mark:
            self._state = "text"
            self._mark = form.mark
            self._bare = BareCall(self._names)
        self._arguments = JsonEnd()
        self._after_call = False  # whether no text has come since the last call
        self.calls = 0  # how many have begun

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
        return self._take_all(last, is_cut)

    def _take_all(self, last: bool, is_cut: bool) -> tuple[str, list[ToolCall]]:
        """Takes out text and calls in turn, until it is not certain yet what the rest is."""
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
        return [ToolCall(number=0, id=make_call_id(), name=call.name, arguments=call.arguments)]

    def _start(self, last: bool, is_cut: bool) -> None:
        """Decides whether an answer begins with a call, once enough of its text is there."""
        if self._text.startswith(self._openings):
            self._state = "opening"
            return
        may_still_open = any(opening.startswith(self._text) for opening in self._openings)
        if not may_still_open or (last and not is_cut):
            self._state = "text"
        elif last:  # a call that is cut
            self._text = ""

    def _take_text(self, last: bool, is_cut: bool) -> str:
        """Takes out the text before the mark of a call, or before what may begin one."""
        size = len(self._text)
        if self._mark and self._mark in self._text:
            size = self._text.index(self._mark)
            self._state = "opening"
        elif self._mark and (is_cut or not last):
            size -= overlap(self._text, self._mark)
        part = self._text[:size]
        self._text = self._text[size:]
        if last and self._state == "text":  # what is left may begin a call that is cut
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
                return [ToolCall(number=self.calls - 1, id=make_call_id(), name=name, arguments="")]
        if last:
            self._text = ""
        return []

    def _take_arguments(self) -> ToolCall:
        """Takes out what is there of a call's arguments."""
        size = self._arguments.take(self._text)
        part = self._text[:size]
        self._text = self._text[size:]
        if self._arguments.is_reached:
            self._state = "closing"
        return ToolCall(number=self.calls - 1, id="", name="", arguments=part)

    def _close(self, last: bool) -> None:
        """Takes out the closing of a call, once it is whole; or what there is of it, if no more comes."""
        if self._text.startswith(self._closing):
            self._text = self._text.removeprefix(self._closing)
            self._state = "text" if self._mark else "opening"
            self._after_call = True
        elif last:
            self._text = ""
