"""POST /v1/messages and /v1/messages/count_tokens, Anthropic's: answers messages, or counts their tokens."""

import uuid
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType
from starlette.responses import Response
from starlette.types import ASGIApp

from engine.inference.request import SamplingParams
from stages.serve.api.fields import (
    AnswerRequest,
    EmptyList,
    JsonObject,
    MaxTokens,
    MessageList,
    Several,
    StopTexts,
    StrictFields,
    TextParts,
    TopK,
    TopP,
    join_text,
)
from stages.serve.api.generation import run
from stages.serve.api.jobs import ChatPrompt, Job, only_grammar, sampling_of
from stages.serve.api.requests import ApiCall, ignored_header, json_reply
from stages.serve.api.unsupported import UNSUPPORTED
from stages.serve.api.writer import EventWriter, Piece, Usage
from stages.serve.bill import Bill
from stages.serve.errors import ApiError, ErrorDetails
from stages.serve.grammar import Grammar, answer_grammar
from stages.serve.tools import (
    Function,
    ToolCall,
    ToolUse,
    Turn,
    call_turn,
    make_turn,
    parse_arguments,
    tool_use,
)


class DocumentSource(StrictFields):
    """The text of a document, as it is or in parts."""

    type: Literal["text", "content"]
    media_type: Literal["text/plain"] | None = None
    data: str = ""
    content: TextParts = ""


class Citations(StrictFields):
    enabled: Literal[False] | None = None


class TextBlock(StrictFields, kw_only=True):
    """A text or a document: a block of a message, or a part of what a tool returned."""

    type: Literal["text", "document"]
    text: str = ""
    source: DocumentSource | None = None
    title: str | None = None
    context: str | None = None
    cache_control: JsonObject = None
    citations: EmptyList | Citations | None = None

    @property
    def plain_text(self) -> str:
        """The text; or a document, with its title and context before it and an empty line after it."""
        if not self.source:
            return self.text
        parts = [self.title, self.context, self.source.data, join_text(self.source.content)]
        return "\n".join(filter(None, parts)) + "\n\n"


class TurnBlock(TextBlock, kw_only=True):
    """A block of a message: text, a document, a call of a tool, what it returned, or a thought.

    No template reads a thought.
    """

    type: Literal["text", "document", "tool_use", "tool_result", "thinking", "redacted_thinking"]  # type: ignore[assignment]
    thinking: str = ""
    signature: str = ""
    data: str = ""
    id: str = ""
    name: str = ""
    input: dict[str, Any] = msgspec.field(default_factory=dict)
    tool_use_id: str = ""
    content: str | Annotated[list[TextBlock], Meta(max_length=256)] | None = None
    is_error: bool | None = None

    @property
    def is_thought(self) -> bool:
        return self.type in ("thinking", "redacted_thinking")

    @property
    def result(self) -> str:
        """The text of what a tool returned."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.plain_text for part in self.content or ())


class InputTurn(StrictFields):
    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[TurnBlock], Meta(max_length=256)]

    @property
    def has_thoughts(self) -> bool:
        return not isinstance(self.content, str) and any(block.is_thought for block in self.content)

    @property
    def turns(self) -> list[Turn]:
        """The message as templates read it, with each result of a tool as a message of its own."""
        if isinstance(self.content, str):
            return [make_turn(self.role, self.content)]
        turns: list[Turn] = []
        for block in self.content:
            if block.is_thought:
                continue
            if block.type == "tool_result":
                turns.append(make_turn("tool", block.result, tool_call_id=block.tool_use_id))
                continue
            if not turns or turns[-1]["role"] != self.role:
                turns.append(make_turn(self.role, ""))
            turns[-1]["content"] += block.plain_text
            if block.type == "tool_use":
                turns[-1].setdefault("tool_calls", []).append(call_turn(block.id, block.name, block.input))
        return turns or [make_turn(self.role, "")]


class ToolDefinition(Function, kw_only=True):
    """A function that the model may call, `strict` as in Function."""

    parameters: dict[str, Any] = msgspec.field(name="input_schema")
    type: Literal["custom"] | None = None
    cache_control: JsonObject = None
    eager_input_streaming: bool | None = None  # a stream has the input as it comes in any case


class ToolChoice(StrictFields):
    """Whether a tool is called: as the model likes, any, the one of this name, or none."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(StrictFields):
    """How much the model is to think, which changes no answer here."""

    type: Literal["enabled", "adaptive", "between_tools", "disabled"]
    budget_tokens: int | None = None
    display: str | None = None


class CountTokensRequest(AnswerRequest, kw_only=True):
    """POST /v1/messages/count_tokens. An answer goes on with the last message if that is the assistant's.

    `thinking`, and thoughts among the messages, change nothing.
    """

    messages: MessageList[InputTurn]
    system: TextParts | None = None
    thinking: Thinking | None = None
    tools: Several[ToolDefinition] | None = None
    tool_choice: ToolChoice | None = None

    @property
    def ignored(self) -> list[str]:
        names = super().ignored
        if self.thinking and self.thinking.type != "disabled":
            names.append("thinking")
        if any(turn.has_thoughts for turn in self.messages):
            names.append("messages.thinking")
        return names

    @property
    def prompt(self) -> ChatPrompt:
        """The conversation. Raises InvalidField."""
        turns: list[Turn] = []
        system = join_text(self.system)
        if system:
            turns.append(make_turn("system", system))
        for message in self.messages:
            turns += message.turns
        answer = ""
        if len(turns) > 1 and turns[-1]["role"] == "assistant" and "tool_calls" not in turns[-1]:
            answer = turns.pop()["content"]
        return ChatPrompt("messages", turns, answer, self.tool_use)

    @property
    def tool_use(self) -> ToolUse:
        """The tools that an answer may call. Raises InvalidField."""
        choice = self.tool_choice or ToolChoice(type="auto")
        kind: str = choice.type
        tool_name = None
        if choice.type == "any":
            kind = "required"
        elif choice.type == "tool":
            tool_name = choice.name or ""
        return tool_use(self.tools or (), tool_name, kind, not choice.disable_parallel_tool_use)


class OutputFormat(StrictFields):
    """The JSON schema that an answer is to satisfy."""

    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(StrictFields):
    """`effort` changes nothing."""

    format: OutputFormat | None = None
    effort: str | None = None


class MessagesRequest(CountTokensRequest, kw_only=True):
    """POST /v1/messages."""

    max_tokens: MaxTokens
    stream: bool | None = None
    temperature: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_p: TopP = None
    top_k: TopK = None
    stop: StopTexts | None = msgspec.field(default=None, name="stop_sequences")
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None  # as it was called at first
    thread: JsonObject = None  # where the server is to remember the conversation: see check_thread

    @property
    def ignored(self) -> list[str]:
        names = super().ignored
        if self.output_config and self.output_config.effort is not None:
            names.append("output_config.effort")
        return names

    @property
    def grammars(self) -> list[Grammar]:
        """The grammars that the request asks for."""
        grammars = []
        if self.output_config and self.output_config.format:
            schema = self.output_config.format.schema
            grammars.append(answer_grammar("output_config.format.schema", schema))
        if self.output_format:
            grammars.append(answer_grammar("output_format.schema", self.output_format.schema))
        return grammars

    def check_thread(self) -> None:
        """Raises ApiError for a thread, by whose code Anthropic's clients know that they are to send all turns.

        Their tool runner begins with a thread, and goes on without one after this error.
        """
        if self.thread is not None:
            details = ErrorDetails("thread_unsupported_request", ["thread"])
            raise ApiError(400, f"thread: {UNSUPPORTED['thread']}.", param="thread", details=details)

    def job(self, defaults: SamplingParams) -> Job:
        """Returns what the request asks for, where the `defaults` stand for what it leaves out.

        Raises InvalidField.
        """
        return Job(
            prompt=self.prompt,
            sampling=sampling_of(
                defaults,
                max_tokens=self.max_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
            ),
            stops=self.stop or (),
            grammar=only_grammar(self.grammars),
            streams=bool(self.stream),
            ignored=self.ignored,
        )


class CountTokensReply(msgspec.Struct):
    input_tokens: int


class ReplyBlock(msgspec.Struct, kw_only=True):
    """A block of a reply: text, or a call of a tool.

    A stream sends the `input` of a call in parts after it.
    """

    type: Literal["text", "tool_use"]
    text: str | UnsetType = UNSET
    id: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    input: dict[str, Any] | UnsetType = UNSET


class MessageUsage(msgspec.Struct):
    """Tokens; those of the prompt that the prefix cache held are counted apart. `cost`: where it is asked for."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int = 0
    cost: Bill | UnsetType = UNSET


class MessageReply(msgspec.Struct, kw_only=True):
    """A whole reply, and, without content, the start of a stream."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[ReplyBlock] = []
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"] | None = None
    stop_sequence: str | None = None
    usage: MessageUsage


class MessageWriter(EventWriter):
    def __init__(self, call: ApiCall) -> None:
        self._head: dict[str, Any] = {"id": f"msg_{uuid.uuid4().hex}", "model": call.model.name}
        self._stop: dict[str, Any] = {}
        self._blocks = 0
        self._in_text = False

    def reply(self, pieces: list[Piece], usage: Usage) -> MessageReply:
        (piece,) = pieces
        blocks = []
        if piece.text or not piece.calls:
            blocks.append(ReplyBlock(type="text", text=piece.text))
        for call in piece.calls:
            arguments = parse_arguments(call) or {}
            blocks.append(ReplyBlock(type="tool_use", id=_tool_use_id(call), name=call.name, input=arguments))
        return self._message(usage, content=blocks, **_stop(piece))

    def begin(self, usage: Usage) -> Iterator[dict[str, Any]]:
        yield {"type": "message_start", "message": self._message(usage)}

    def chunks(self, piece: Piece) -> Iterator[dict[str, Any]]:
        ends_empty = piece.finish_reason and not piece.calls and not self._blocks
        if piece.text or ends_empty:
            if not self._in_text:
                yield from self._open(ReplyBlock(type="text", text=""))
            yield self._delta("text_delta", text=piece.text)
        for call in piece.calls:
            if call.id:
                yield from self._open(
                    ReplyBlock(type="tool_use", id=_tool_use_id(call), name=call.name, input={})
                )
            if call.arguments:
                yield self._delta("input_json_delta", partial_json=call.arguments)
        if piece.finish_reason:
            self._stop = _stop(piece)

    def end(self, usage: Usage) -> Iterator[dict[str, Any]]:
        yield from self._close()
        yield {"type": "message_delta", "delta": self._stop, "usage": _usage(usage)}
        yield {"type": "message_stop"}

    def _message(self, usage: Usage, **fields: Any) -> MessageReply:
        return MessageReply(**self._head, usage=_usage(usage), **fields)

    def _open(self, block: ReplyBlock) -> Iterator[dict[str, Any]]:
        """Ends the block before, and begins the next."""
        yield from self._close()
        self._blocks += 1
        self._in_text = block.type == "text"
        yield {"type": "content_block_start", "index": self._blocks - 1, "content_block": block}

    def _close(self) -> Iterator[dict[str, Any]]:
        """Ends the last block."""
        if self._blocks:
            yield {"type": "content_block_stop", "index": self._blocks - 1}

    def _delta(self, kind: str, **fields: Any) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._blocks - 1, "delta": {"type": kind, **fields}}


def _tool_use_id(call: ToolCall) -> str:
    return "toolu_" + call.id.removeprefix("call_")


def _usage(usage: Usage) -> MessageUsage:
    return MessageUsage(
        input_tokens=usage.prompt - usage.cached,
        output_tokens=usage.completion,
        cache_read_input_tokens=usage.cached,
        cost=usage.cost,
    )


def _stop(piece: Piece) -> dict[str, Any]:
    """Returns why a completion ended, as fields of a reply."""
    reason = "end_turn"
    if piece.finish_reason == "length":
        reason = "max_tokens"
    elif piece.finish_reason == "tool_calls":
        reason = "tool_use"
    elif piece.stop is not None:
        reason = "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": piece.stop}


async def create_message(call: ApiCall[MessagesRequest]) -> ASGIApp:
    """Answers a conversation, as Anthropic has it."""
    call.body.check_thread()
    return await run(call, call.body.job(call.state.sampling), MessageWriter(call))


async def count_tokens(call: ApiCall[CountTokensRequest]) -> Response:
    """The tokens of a conversation."""
    prompts = await call.body.prompt.encode(call.state)
    reply = CountTokensReply(len(prompts.tokens[0]))
    return json_reply(reply, headers=ignored_header([*call.body.ignored, *prompts.ignored]))
