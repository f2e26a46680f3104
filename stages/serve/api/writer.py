"""Writer: what a dialect makes of the pieces of completions, as one reply or as a stream."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import msgspec
from msgspec import UNSET, UnsetType

from engine.inference.request import LogProb
from engine.text.documents import Passage
from stages.serve.bill import Bill
from stages.serve.errors import ApiError
from stages.serve.tools import ToolCall, join_calls

Reason = Literal["stop", "length", "tool_calls"]


class Piece(NamedTuple):
    """What is new of one choice."""

    # The index of the choice.
    choice: int
    text: str
    logprobs: Sequence[LogProb]
    # Why the choice ended, or None.
    finish_reason: Reason | None
    # The stop string that ended it.
    stop: str | None = None
    # Calls of tools, or their next parts, which are not part of the text.
    calls: Sequence[ToolCall] = ()
    # The embedding (D,) of the prompt, if it is asked for.
    embedding: Any = None


class Usage(NamedTuple):
    """The tokens and the seconds of a generation, until now."""

    # Tokens of the prompts, of the completions, and those of the prompts that the prefix cache
    # held.
    prompt: int
    completion: int
    cached: int
    # From the request's arrival to the first token, 0 before it.
    first_seconds: float
    # From the request's arrival until now.
    seconds: float
    # Passages of documents, whose tokens are in the prompts.
    passages: Sequence[Passage] = ()
    # What it has cost, if that is asked for, and not before its end.
    cost: Bill | UnsetType = UNSET


def join_pieces(parts: Sequence[Piece]) -> Piece:
    """Returns the pieces of one choice as one."""
    logprobs: list[LogProb] = []
    calls: list[ToolCall] = []
    for part in parts:
        logprobs += part.logprobs
        calls += part.calls
    text = "".join(part.text for part in parts)
    return parts[-1]._replace(text=text, logprobs=logprobs, calls=join_calls(calls))


class Writer:
    """Writes the pieces of a generation in one dialect, as a reply of one Struct or as chunks of a stream.

    A stream is what `begin`, `chunks`, for each piece, and `end` return, each chunk as `frame` has
    it, and then `last`: by default server-sent events as OpenAI has them. `comment` is a line that
    clients pass over.
    """

    media = "text/event-stream; charset=utf-8"
    last = b"data: [DONE]\n\n"

    def reply(self, pieces: list[Piece], usage: Usage) -> msgspec.Struct:
        raise NotImplementedError

    def begin(self, usage: Usage) -> Iterable[Any]:
        return ()

    def chunks(self, piece: Piece) -> Iterable[Any]:
        raise NotImplementedError

    def end(self, usage: Usage) -> Iterable[Any]:
        return ()

    def frame(self, chunk: Any) -> bytes:
        return b"data: " + msgspec.json.encode(chunk) + b"\n\n"

    def error(self, error: ApiError) -> bytes:
        return b"data: " + error.body + b"\n\n"

    def comment(self, text: str) -> bytes:
        return f": {text}\n\n".encode()


class EventWriter(Writer):
    """Writes server-sent events that have their chunk's type as a name."""

    last = b""

    def frame(self, chunk: Any) -> bytes:
        return b"event: " + chunk["type"].encode() + b"\n" + super().frame(chunk)

    def error(self, error: ApiError) -> bytes:
        return b"event: error\n" + super().error(error)
