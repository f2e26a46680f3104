"""POST /v1/responses, OpenAI's: answers a conversation that is sent whole, for this server remembers none."""

import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.types import ASGIApp

from stages.serve.api.generation import Piece, Usage, chat_prompts, generate
from stages.serve.api.requests import EmptyList, GenerationRequest, MaxTokens, in_range
from stages.serve.api.writer import EventWriter, respond
from stages.serve.errors import ApiError
from stages.serve.state import ServerState


class InputText(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A text of a message, or of an earlier answer."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: EmptyList | None = None
    logprobs: EmptyList | None = None


class InputMessage(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A message of a conversation, or an earlier answer as it was sent."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[InputText], Meta(min_length=1, max_length=256)]
    type: Literal["message"] = "message"
    id: str | None = None
    status: str | None = None
    phase: str | None = None

    @property
    def turn(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class TextOptions(msgspec.Struct, forbid_unknown_fields=True):
    format: dict[Literal["type"], Literal["text"]] | None = None
    verbosity: str | None = None


class ResponseRequest(GenerationRequest, kw_only=True):
    """POST /v1/responses. `input`: a question, or a conversation."""

    input: str | Annotated[list[InputMessage], Meta(min_length=1, max_length=4096)]
    instructions: str | None = None
    max_output_tokens: MaxTokens | None = None
    temperature: Annotated[float, in_range("temperature")] | None = None
    top_p: Annotated[float, in_range("top_p")] | None = None
    text: TextOptions | None = None
    store: Literal[False] | None = None
    previous_response_id: None = None
    conversation: None = None
    background: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    include: list[Literal["reasoning.encrypted_content"]] | None = None
    tools: EmptyList | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: dict[str, Any] | None = None
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    user: str | None = None


class ResponseReply(msgspec.Struct, kw_only=True):
    """A whole reply, and what the first and last events of a stream hold. `output`: one message, once it is there."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Literal["in_progress", "completed", "incomplete"] = "in_progress"
    model: str
    output: list[dict[str, Any]] = []
    usage: dict[str, Any] | None = None
    incomplete_details: dict[str, str] | None = None
    error: None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    text: TextOptions
    tools: list[None] = []
    tool_choice: Literal["auto"] = "auto"
    parallel_tool_calls: bool = False
    previous_response_id: None = None
    store: bool = False


class ResponseWriter(EventWriter):
    """Writes the replies and events of /v1/responses."""

    def __init__(self, state: ServerState, body: ResponseRequest) -> None:
        self._head: dict[str, Any] = {
            "id": f"resp_{uuid.uuid4().hex}", "created_at": int(time.time()), "model": state.name,
            "instructions": body.instructions, "max_output_tokens": body.max_output_tokens, "metadata": body.metadata or {},
            "text": TextOptions({"type": "text"}),
        }  # fmt: skip
        self._item = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant"}
        self._text, self._status, self._count = "", "completed", 0

    def reply(self, pieces: list[Piece], usage: Usage) -> ResponseReply:
        self._take(pieces[0])
        return self._ended(usage)

    def begin(self, usage: Usage) -> Iterator[dict[str, Any]]:
        started = ResponseReply(**self._head)
        yield self._event("created", response=started)
        yield self._event("in_progress", response=started)
        item = {**self._item, "status": "in_progress", "content": []}
        yield self._event("output_item.added", output_index=0, item=item)
        yield self._part_event("content_part.added", part=_part(""))

    def chunks(self, piece: Piece) -> Iterable[dict[str, Any]]:
        self._take(piece)
        return [self._part_event("output_text.delta", delta=piece.text, logprobs=[])] if piece.text else []

    def end(self, usage: Usage) -> Iterator[dict[str, Any]]:
        ended = self._ended(usage)
        yield self._part_event("output_text.done", text=self._text, logprobs=[])
        yield self._part_event("content_part.done", part=_part(self._text))
        yield self._event("output_item.done", output_index=0, item=ended.output[0])
        yield self._event(self._status, response=ended)

    def error(self, error: ApiError) -> bytes:
        fields = msgspec.structs.asdict(error.error) | {"type": "error", "sequence_number": self._count}
        return self.frame(fields)

    def _take(self, piece: Piece) -> None:
        self._text += piece.text
        self._status = "incomplete" if piece.finish_reason == "length" else "completed"

    def _ended(self, usage: Usage) -> ResponseReply:
        counts = {
            "input_tokens": usage.prompt, "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
            "output_tokens": usage.completion, "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.prompt + usage.completion,
        }  # fmt: skip
        reply = ResponseReply(**self._head, status=self._status, usage=counts)  # type: ignore[arg-type]
        reply.output = [{**self._item, "status": self._status, "content": [_part(self._text)]}]
        if self._status == "incomplete":
            reply.incomplete_details = {"reason": "max_output_tokens"}
        return reply

    def _part_event(self, kind: str, **fields: Any) -> dict[str, Any]:
        return self._event(kind, output_index=0, content_index=0, item_id=self._item["id"], **fields)

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._count += 1
        return {"type": f"response.{kind}", "sequence_number": self._count - 1, **fields}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


async def responses(state: ServerState, http: Request, body: ResponseRequest) -> ASGIApp:
    """Writes the assistant's next turn."""
    turns = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else [each.turn for each in body.input]
    if body.instructions:
        turns.insert(0, {"role": "system", "content": body.instructions})
    options = {"max_tokens": body.max_output_tokens, "temperature": body.temperature, "top_p": body.top_p}
    writer = ResponseWriter(state, body)
    return respond(body, writer, await generate(state, http, chat_prompts(state, turns, field="input"), options))
