"""POST /v1/chat/completions, OpenAI's: answers a conversation."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType
from starlette.requests import Request as HttpRequest
from starlette.types import ASGIApp

from engine.inference.constraints import json_grammar
from engine.inference.request import LogProb
from stages.serve.api.completions import ChoicesWriter, CompletionFields, ReplyFields, ReplyUsage, documents_use
from stages.serve.api.generation import Piece, Prompts, Reason, Usage, chat_prompts
from stages.serve.api.requests import EmptyList, LogProbs, MaxTokens
from stages.serve.api.writer import respond
from stages.serve.errors import ApiError
from stages.serve.grammars import Grammar
from stages.serve.state import ServedModel, ServerState
from stages.serve.tokenizer_pool import token_text
from stages.serve.tools import NO_TOOLS, Tool, ToolCall, ToolUse, Turn


class TextPart(msgspec.Struct, forbid_unknown_fields=True):
    """A part of a message. Only text is supported."""

    type: Literal["text"]
    text: str
    cache_control: dict[str, Any] | None = None


class FunctionCall(msgspec.Struct):
    """A call's function, and its arguments as JSON. Without a name: the next part of them."""

    name: str | UnsetType
    arguments: str


class MessageCall(msgspec.Struct, kw_only=True):
    """A call of a tool, in a message or, with its `index`, in a stream."""

    index: int | UnsetType = UNSET
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = "function"
    function: FunctionCall

    @property
    def turn(self) -> Turn:
        return call_turn(self.id or "", str(self.function.name), self.function.arguments)


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


ToolName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,64}$(?!\n)")]


class Function(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A function that the model may call. `strict`: what of the schema cannot be enforced is refused, not ignored."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolField(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A tool, or in `tool_choice` the name of one."""

    type: Literal["function"]
    function: Function
    cache_control: dict[str, Any] | None = None


class Message(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A message of a conversation. An assistant's that calls tools needs no content."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Meta(min_length=1, max_length=256)] | None = None
    name: str | None = None
    refusal: Literal[""] | None = None
    annotations: EmptyList | None = None
    tool_calls: Annotated[list[MessageCall], Meta(max_length=128)] | None = None
    tool_call_id: str | None = None
    cache_control: dict[str, Any] | None = None
    parsed: Any = None  # by OpenAI's client, which sends it back
    function_call: None = None
    audio: None = None

    @property
    def turn(self) -> Turn:
        """The message as templates read it; the role `developer` becomes `system`."""
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ApiError(
                400,
                "messages[...].content: only an assistant's message with tool_calls may have none.",
                param="messages[...].content",
            )
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())
        calls = {"tool_calls": [call.turn for call in self.tool_calls]} if self.tool_calls else {}
        named = {name: value for name in ("name", "tool_call_id") if (value := getattr(self, name))}
        return {"role": "system" if self.role == "developer" else self.role, "content": text, **calls, **named}


Messages = Annotated[list[Message], Meta(min_length=1, max_length=4096)]


class JsonSchema(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A schema that an answer is to satisfy; it is enforced whether or not it is `strict`."""

    name: str
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, forbid_unknown_fields=True):
    """The format of answers: text, a JSON object, or JSON that satisfies a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


def answer_grammar(field: str, schema: dict[str, Any] | None) -> Grammar:
    return Grammar(field, partial(json_grammar, schema or {"type": "object"}))


def tool_use(functions: Sequence[Function], named: str | None, choice: Any, parallel: bool | None) -> ToolUse:
    """Returns the functions as tools. `named`: the one to be called, in place of the choice. Raises ApiError."""
    tools = []
    for function in functions:
        parameters = {"type": "object", "properties": {}, **(function.parameters or {})}
        if parameters["type"] != "object":
            message = f"tools: the parameters of {function.name} must be an object."
            raise ApiError(400, message, param="tools[...].function.parameters")
        tools.append(Tool(function.name, function.description or "", parameters, function.strict is True))
    required = choice == "required" or named is not None
    if named not in (None, *(tool.name for tool in tools)) or (required and not tools):
        raise ApiError(400, f"tool_choice: there is no tool {named or 'to call'!r:.80} in tools.", param="tool_choice")
    return ToolUse(() if choice == "none" else tools, required, named, parallel is not False)


class ChatRequest(CompletionFields, kw_only=True):
    """POST /v1/chat/completions. `continue_final_message`, without `add_generation_prompt`: goes on with the last message."""

    messages: Messages
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: LogProbs | None = None
    response_format: ResponseFormat | None = None
    modalities: Annotated[list[Literal["text"]], Meta(max_length=1)] | None = None
    tools: Annotated[list[ToolField], Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolField | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prediction: dict[str, Any] | None = None
    service_tier: str | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None

    @property
    def tool_use(self) -> ToolUse:
        choice = self.tool_choice
        named = choice.function.name if isinstance(choice, ToolField) else None
        functions = [each.function for each in self.tools or ()]
        return tool_use(functions, named, "auto" if choice is None else choice, self.parallel_tool_calls)

    @property
    def grammars(self) -> list[Grammar]:
        grammars, wanted = super().grammars, self.response_format
        if wanted and wanted.type != "text":
            field = "response_format" if wanted.type == "json_object" else "response_format.json_schema.schema"
            if (wanted.json_schema is None) != (wanted.type == "json_object"):
                message = "response_format.json_schema belongs to the type json_schema, and only to it."
                raise ApiError(400, message, param="response_format.json_schema")
            grammars.append(answer_grammar(field, wanted.json_schema.schema if wanted.json_schema else None))
        return grammars


class TopLogProb(msgspec.Struct):
    """A token, its log-probability in nats, and its bytes."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogProb(TopLogProb):
    """The sampled token, and the most probable ones in its place."""

    top_logprobs: list[TopLogProb]


class ChatLogProbs(msgspec.Struct):
    """Log-probabilities of the tokens of a chat choice."""

    content: list[TokenLogProb]
    refusal: None = None


class ReplyMessage(msgspec.Struct):
    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    tool_calls: list[MessageCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct):
    index: int
    message: ReplyMessage
    finish_reason: Reason
    logprobs: ChatLogProbs | None = None


class ChatReply(ReplyFields, kw_only=True):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: ReplyUsage


class Delta(msgspec.Struct):
    """The new part of the assistant's message."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    tool_calls: list[MessageCall] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct):
    index: int
    delta: Delta
    finish_reason: Reason | None = None
    logprobs: ChatLogProbs | None = None


class ChatChunk(ReplyFields, kw_only=True):
    """One `data:` of a stream."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    usage: ReplyUsage | UnsetType | None = UNSET


class ChatWriter(ChoicesWriter):
    id_prefix, reply_type, chunk_type = "chatcmpl", ChatReply, ChatChunk

    def __init__(self, state: ServerState, model: ServedModel, body: ChatRequest) -> None:
        super().__init__(state, model, body)
        self._wants_logprobs, self._n = body.logprobs, body.n or 1

    def choice(self, piece: Piece) -> ChatChoice:
        calls = [MessageCall(id=call.id, function=FunctionCall(call.name, call.arguments)) for call in piece.calls]
        message = ReplyMessage(piece.text or (None if calls else ""), tool_calls=calls or UNSET)
        return ChatChoice(piece.choice, message, piece.finish_reason, self._logprobs(piece))  # type: ignore[arg-type]

    def begin(self, usage: Usage) -> Iterable[ChatChunk]:
        begin = lambda index: ChatChunkChoice(index, Delta("assistant", ""))
        return [self.chunk(begin(index), documents=documents_use(usage)) for index in range(self._n)]

    def chunks(self, piece: Piece) -> Iterator[Any]:
        if piece.text or piece.logprobs:
            delta = Delta(content=piece.text) if piece.text else Delta()
            yield self.chunk(ChatChunkChoice(piece.choice, delta, None, self._logprobs(piece)))
        for call in piece.calls:
            begins = {"id": call.id, "type": "function"} if call.id else {"id": UNSET, "type": UNSET}
            function = FunctionCall(call.name or UNSET, call.arguments)
            delta = Delta(tool_calls=[MessageCall(index=call.number, function=function, **begins)])
            yield self.chunk(ChatChunkChoice(piece.choice, delta))
        if piece.finish_reason:
            yield self.chunk(ChatChunkChoice(piece.choice, Delta(), piece.finish_reason))

    def _logprobs(self, piece: Piece) -> ChatLogProbs | None:
        return ChatLogProbs(list(map(self._token_logprob, piece.logprobs))) if self._wants_logprobs else None

    def _token_logprob(self, logprob: LogProb) -> TokenLogProb:
        shown = lambda token, nats: ((text := token_text(self.tokenizer, token))[0], nats, list(text[1]))
        top = [TopLogProb(*shown(token, nats)) for token, nats in logprob.top]
        return TokenLogProb(*shown(logprob.token, logprob.logprob), top)


def conversation(
    state: ServerState,
    messages: list[Message],
    *,
    begins: bool | None,
    goes_on: bool | None,
    tools: ToolUse = NO_TOOLS,
    variables: dict[str, Any] | None = None,
) -> Prompts:
    """Returns the prompt of messages; `tools` and `variables` as of `chat_prompts`.

    It goes up to the assistant's next turn, which `begins`, or to the end of its last one if that `goes_on`: vLLM's
    add_generation_prompt and continue_final_message. Raises ApiError.
    """
    turns = [message.turn for message in messages]
    if (goes_on is True) == (begins is not False):
        message = "add_generation_prompt must be false with continue_final_message true, and true without."
        raise ApiError(400, message, param="add_generation_prompt")
    if not goes_on:
        return chat_prompts(state, turns, tools=tools, variables=variables)
    answer = turns.pop()
    if answer["role"] != "assistant" or not turns:
        message = "continue_final_message goes on with an answer: the last message must be the assistant's, after another."
        raise ApiError(400, message, param="messages")
    return chat_prompts(state, turns, answer["content"], tools=tools, variables=variables)


async def chat_completions(state: ServerState, http: HttpRequest, body: ChatRequest) -> ASGIApp:
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs is given without logprobs being true.", param="top_logprobs")
    if body.max_completion_tokens not in (None, body.max_tokens or body.max_completion_tokens):
        message = "max_completion_tokens is sent beside max_tokens, its older name, with another value."
        raise ApiError(400, message, param="max_completion_tokens")
    writer = ChatWriter(state, http.state.model, body)
    prompts = conversation(
        state,
        body.messages,
        begins=body.add_generation_prompt,
        goes_on=body.continue_final_message,
        tools=body.tool_use,
        variables=body.chat_template_kwargs,
    )
    generation = await body.generate(
        state,
        http,
        prompts,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    return respond(body, writer, generation)
