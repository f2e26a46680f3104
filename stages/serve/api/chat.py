"""POST /v1/chat/completions, OpenAI's: answers a conversation."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType
from starlette.types import ASGIApp

from engine.errors import InvalidField
from engine.inference.request import SamplingParams
from engine.text.documents import Passage
from stages.serve.api.choices import ChoicesWriter, CompletionFields, ReplyFields, ReplyUsage
from stages.serve.api.fields import (
    EmptyList,
    JsonObject,
    LogProbs,
    MaxTokens,
    MessageList,
    Parts,
    Several,
    StrictFields,
    TextPart,
    join_text,
)
from stages.serve.api.generation import run
from stages.serve.api.jobs import ChatPrompt, Job
from stages.serve.api.logprobs import TokenLogProb, token_logprob
from stages.serve.api.requests import ApiCall
from stages.serve.api.writer import Piece, Reason, Usage
from stages.serve.grammar import Grammar, answer_grammar
from stages.serve.tools import NO_TOOLS, Function, ToolUse, Turn, call_turn, make_turn, tool_use


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


class ToolField(StrictFields):
    """A tool, or in `tool_choice` the name of one."""

    type: Literal["function"]
    function: Function
    cache_control: JsonObject = None


Tools = Several[ToolField] | None


class ChatMessage(StrictFields):
    """A message of a conversation. An assistant's that calls tools needs no content.

    Earlier thoughts change nothing.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Parts[TextPart] | None = None
    name: str | None = None
    refusal: Literal[""] | None = None
    annotations: EmptyList | None = None
    tool_calls: Several[MessageCall] | None = None
    tool_call_id: str | None = None
    cache_control: JsonObject = None
    parsed: Any = None  # by OpenAI's client, which sends it back
    reasoning_content: str | None = None  # as DeepSeek and SGLang call the thoughts of an answer
    reasoning: str | None = None  # as vLLM calls them

    @property
    def thoughts(self) -> list[str]:
        """The names of the fields that hold thoughts."""
        names = []
        if self.reasoning_content:
            names.append("reasoning_content")
        if self.reasoning:
            names.append("reasoning")
        return names

    @property
    def turn(self) -> Turn:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            field = "messages[...].content"
            raise InvalidField(field, f"{field}: only an assistant's message with tool_calls may have none.")
        calls = [call.turn for call in self.tool_calls or ()]
        names = {"name": self.name, "tool_call_id": self.tool_call_id}
        return make_turn(self.role, join_text(self.content), tool_calls=calls, **names)


Messages = MessageList[ChatMessage]


class JsonSchema(StrictFields):
    """A schema that an answer is to satisfy; it is enforced whether or not it is `strict`."""

    name: str | None = None
    schema: JsonObject = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(StrictFields):
    """The format of answers: text, a JSON object, or JSON that satisfies a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(CompletionFields, kw_only=True):
    """POST /v1/chat/completions.

    `continue_final_message`, without `add_generation_prompt`: goes on with the last message.
    """

    messages: Messages
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    echo: bool | None = None
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: LogProbs | None = None
    response_format: ResponseFormat | None = None
    modalities: Annotated[list[Literal["text"]], Meta(max_length=1)] | None = None
    tools: Tools = None
    tool_choice: Literal["none", "auto", "required"] | ToolField | None = None
    chat_template_kwargs: JsonObject = None
    parallel_tool_calls: bool | None = None

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def ignored(self) -> list[str]:
        names = super().ignored
        for message in self.messages:
            for thought in message.thoughts:
                name = f"messages.{thought}"
                if name not in names:
                    names.append(name)
        return names

    @property
    def tool_use(self) -> ToolUse:
        """The tools that an answer may call. Raises InvalidField."""
        choice = self.tool_choice
        tool_name = choice.function.name if isinstance(choice, ToolField) else None
        functions = [each.function for each in self.tools or ()]
        return tool_use(functions, tool_name, choice, self.parallel_tool_calls)

    @property
    def grammars(self) -> list[Grammar]:
        grammars = super().grammars
        form = self.response_format
        if form is None or form.type == "text":
            return grammars
        if (form.json_schema is None) != (form.type == "json_object"):
            field = "response_format.json_schema"
            raise InvalidField(field, f"{field} belongs to the type json_schema, and only to it.")
        if form.json_schema is None:
            return [*grammars, answer_grammar("response_format", None)]
        return [*grammars, answer_grammar("response_format.json_schema.schema", form.json_schema.schema)]

    def check(self) -> None:
        """Raises InvalidField for fields that are not for a chat, or do not go together."""
        if self.echo:
            raise InvalidField(
                "echo", "echo is for /v1/completions: a chat's answer comes without its messages."
            )
        if self.add_special_tokens:
            raise InvalidField(
                "add_special_tokens", "add_special_tokens must be false: the chat template writes them."
            )
        if self.top_logprobs and not self.logprobs:
            raise InvalidField("top_logprobs", "top_logprobs is given without logprobs being true.")
        most = self.max_completion_tokens
        if most and self.max_tokens and self.max_tokens != most:
            field = "max_completion_tokens"
            raise InvalidField(
                field, f"{field} is sent beside max_tokens, its older name, with another value."
            )

    def job(self, defaults: SamplingParams) -> Job:
        """Returns what the request asks for, where the `defaults` stand for what it leaves out.

        Raises InvalidField.
        """
        self.check()
        prompt = chat_prompt(
            self.messages,
            self.tool_use,
            self.chat_template_kwargs,
            begins=self.add_generation_prompt,
            goes_on=self.continue_final_message,
        )
        self.check_stream_options()
        max_tokens = self.max_completion_tokens or self.max_tokens
        logprobs = None
        if self.logprobs:
            logprobs = self.top_logprobs or 0
        return self.make_job(prompt, self.sampling(defaults, max_tokens, logprobs), self.n or 1)


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


class DocumentsUse(msgspec.Struct):
    """The passages of documents in a prompt, their tokens, and about the seconds that reading them took."""

    tokens: int
    seconds: float
    passages: Sequence[Passage]


class ChatFields(ReplyFields, kw_only=True):
    """The fields of chats' replies and chunks. `documents` is this server's own: absent without passages."""

    documents: DocumentsUse | UnsetType = UNSET


def documents_use(usage: Usage) -> DocumentsUse | UnsetType:
    """Returns the field `documents` of a reply.

    Its seconds are the passages' share of those until the first token.
    """
    if not usage.passages:
        return UNSET
    tokens = sum(passage.tokens for passage in usage.passages)
    share = min(tokens / max(usage.prompt - usage.cached, 1), 1)
    return DocumentsUse(tokens, round(usage.first_seconds * share, 4), usage.passages)


class ChatReply(ChatFields, kw_only=True):
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


class ChatChunk(ChatFields, kw_only=True):
    """One `data:` of a stream."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    usage: ReplyUsage | UnsetType | None = UNSET


class ChatWriter(ChoicesWriter):
    id_prefix = "chatcmpl"
    reply_type = ChatReply
    chunk_type = ChatChunk

    def choice(self, piece: Piece) -> ChatChoice:
        calls = [
            MessageCall(id=call.id, function=FunctionCall(call.name, call.arguments)) for call in piece.calls
        ]
        content = None if calls and not piece.text else piece.text
        message = ReplyMessage(content, tool_calls=calls or UNSET)
        assert piece.finish_reason
        return ChatChoice(piece.choice, message, piece.finish_reason, self._logprobs(piece))

    def begin(self, usage: Usage) -> Iterable[ChatChunk]:
        chunks = [
            self.chunk([ChatChunkChoice(index, Delta("assistant", ""))]) for index in range(self.body.choices)
        ]
        return self._with_documents(chunks, usage)

    def chunks(self, piece: Piece) -> Iterator[Any]:
        if piece.text or piece.logprobs:
            delta = Delta(content=piece.text or UNSET)
            yield self.chunk([ChatChunkChoice(piece.choice, delta, None, self._logprobs(piece))])
        for call in piece.calls:
            function = FunctionCall(call.name or UNSET, call.arguments)
            part = MessageCall(index=call.number, type=UNSET, function=function)
            if call.id:  # it begins
                part.id = call.id
                part.type = "function"
            yield self.chunk([ChatChunkChoice(piece.choice, Delta(tool_calls=[part]))])
        if piece.finish_reason:
            yield self.chunk([ChatChunkChoice(piece.choice, Delta(), piece.finish_reason)])

    def end(self, usage: Usage) -> Iterable[ChatChunk]:
        return self._with_documents(super().end(usage), usage)

    def reply(self, pieces: list[Piece], usage: Usage) -> ChatReply:
        reply: ChatReply = super().reply(pieces, usage)
        reply.documents = documents_use(usage)
        return reply

    def _with_documents(self, chunks: Iterable[ChatChunk], usage: Usage) -> list[ChatChunk]:
        """Returns the first chunks of a stream, or its last, with the passages."""
        return [msgspec.structs.replace(chunk, documents=documents_use(usage)) for chunk in chunks]

    def _logprobs(self, piece: Piece) -> ChatLogProbs | None:
        if not self.body.logprobs:
            return None
        return ChatLogProbs([token_logprob(logprob, self.token_text) for logprob in piece.logprobs])


def chat_prompt(
    messages: Sequence[ChatMessage],
    tools: ToolUse = NO_TOOLS,
    variables: Mapping[str, Any] | None = None,
    *,
    begins: bool | None = None,
    goes_on: bool | None = None,
) -> ChatPrompt:
    """Returns the prompt of a body's `messages`; `tools` and `variables` as of ChatPrompt.

    It goes up to the assistant's next turn, which begins with `add_generation_prompt` (`begins`),
    or to the end of its last one with `continue_final_message` (`goes_on`), as in vLLM. Raises
    InvalidField.
    """
    turns = [message.turn for message in messages]
    answer = ""
    if bool(goes_on) == (begins is not False):
        field = "add_generation_prompt"
        raise InvalidField(
            field, f"{field} must be false with continue_final_message true, and true without."
        )
    if goes_on:
        if len(turns) < 2 or turns[-1]["role"] != "assistant":
            needed = "the last message must be the assistant's, after another"
            message = f"continue_final_message goes on with an answer: {needed}."
            raise InvalidField("messages", message)
        answer = turns.pop()["content"]
    return ChatPrompt("messages", turns, answer, tools, variables or {})


async def create_chat_completion(call: ApiCall[ChatRequest]) -> ASGIApp:
    """Answers a conversation."""
    return await run(call, call.body.job(call.state.sampling), ChatWriter(call))
