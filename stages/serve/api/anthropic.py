"""POST /v1/messages and /v1/messages/count_tokens, Anthropic's: answers a conversation, or counts its tokens."""

import uuid
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from stages.serve.api.generation import Piece, Prompts, Usage, chat_prompts, generate
from stages.serve.api.requests import EmptyList, MaxTokens, ModelRequest, StopTexts, in_range
from stages.serve.api.writer import EventWriter, json_reply, respond
from stages.serve.state import ServerState


class TextBlock(msgspec.Struct, forbid_unknown_fields=True):
    """A block of text. `cache_control` changes nothing: the prefix cache holds every prompt."""

    type: Literal["text"]
    text: str
    cache_control: dict[str, Any] | None = None
    citations: EmptyList | None = None


Blocks = str | Annotated[list[TextBlock], Meta(max_length=256)]


def _text(blocks: Blocks | None) -> str:
    return blocks if isinstance(blocks, str) else "".join(block.text for block in blocks or ())


class Turn(msgspec.Struct, forbid_unknown_fields=True):
    role: Literal["user", "assistant"]
    content: Blocks


class CountTokensRequest(ModelRequest, kw_only=True):
    """POST /v1/messages/count_tokens. An answer goes on with the last message if that is the assistant's."""

    messages: Annotated[list[Turn], Meta(min_length=1, max_length=4096)]
    system: Blocks | None = None
    thinking: dict[Literal["type"], Literal["disabled"]] | None = None
    tools: EmptyList | None = None
    cache_control: dict[str, Any] | None = None

    def prompts(self, state: ServerState) -> Prompts:
        turns = [{"role": turn.role, "content": _text(turn.content)} for turn in self.messages]
        if system := _text(self.system):
            turns.insert(0, {"role": "system", "content": system})
        goes_on = len(turns) > 1 and turns[-1]["role"] == "assistant"
        return chat_prompts(state, turns, turns.pop()["content"] if goes_on else "")


class MessagesRequest(CountTokensRequest, kw_only=True):
    """POST /v1/messages."""

    max_tokens: MaxTokens
    stream: bool | None = None
    temperature: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_p: Annotated[float, in_range("top_p")] | None = None
    top_k: Annotated[int, in_range("top_k")] | None = None
    stop_sequences: StopTexts | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None


class CountTokensReply(msgspec.Struct):
    """The reply of POST /v1/messages/count_tokens."""

    input_tokens: int


class ReplyBlock(msgspec.Struct):
    text: str
    type: Literal["text"] = "text"


class MessageReply(msgspec.Struct, kw_only=True):
    """A whole reply, and, without content, the start of a stream."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[ReplyBlock] = []
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence"] | None = None
    stop_sequence: str | None = None
    usage: dict[str, int]


class MessageWriter(EventWriter):
    """Writes the replies and events of /v1/messages."""

    def __init__(self, state: ServerState) -> None:
        self._head: dict[str, Any] = {"id": f"msg_{uuid.uuid4().hex}", "model": state.name}
        self._stop: dict[str, Any] = {}

    def reply(self, pieces: list[Piece], usage: Usage) -> MessageReply:
        return MessageReply(**self._head, content=[ReplyBlock(pieces[0].text)], usage=_usage(usage), **_stop(pieces[0]))

    def begin(self, usage: Usage) -> Iterator[dict[str, Any]]:
        yield {"type": "message_start", "message": MessageReply(**self._head, usage=_usage(usage))}
        yield {"type": "content_block_start", "index": 0, "content_block": ReplyBlock("")}

    def chunks(self, piece: Piece) -> Iterator[dict[str, Any]]:
        if piece.text:
            yield {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": piece.text}}
        if piece.finish_reason:
            self._stop = _stop(piece)

    def end(self, usage: Usage) -> Iterator[dict[str, Any]]:
        yield {"type": "content_block_stop", "index": 0}
        yield {"type": "message_delta", "delta": self._stop, "usage": _usage(usage)}
        yield {"type": "message_stop"}


def _usage(usage: Usage) -> dict[str, int]:
    """Returns the counts; those of the prompt are apart for tokens that the prefix cache held."""
    read = {"cache_creation_input_tokens": 0, "cache_read_input_tokens": usage.cached}
    return {"input_tokens": usage.prompt - usage.cached, "output_tokens": usage.completion, **read}


def _stop(piece: Piece) -> dict[str, Any]:
    reason = "max_tokens" if piece.finish_reason == "length" else "end_turn" if piece.stop is None else "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": piece.stop}


async def messages(state: ServerState, http: Request, body: MessagesRequest) -> ASGIApp:
    """Writes the assistant's next turn."""
    options = {name: getattr(body, name) for name in ("max_tokens", "temperature", "top_p", "top_k")}
    writer = MessageWriter(state)
    return respond(body, writer, await generate(state, http, body.prompts(state), options, stops=body.stop_sequences or ()))


async def count_tokens(state: ServerState, _: Request, body: CountTokensRequest) -> Response:
    (tokens,) = await body.prompts(state).encode()
    return json_reply(CountTokensReply(len(tokens)))
