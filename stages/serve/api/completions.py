"""POST /v1/chat/completions and /v1/completions, OpenAI's: answers a conversation, or continues texts."""

import dataclasses
import math
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType
from starlette.types import ASGIApp

from engine.errors import InvalidField
from engine.inference.request import LogProb, SamplingParams
from engine.text.detokenizer import Detokenizer
from engine.text.documents import Passage
from stages.serve.api.generation import Piece, Reason, Usage, Writer, run
from stages.serve.api.jobs import ChatPrompt, Job, TextPrompts, only_grammar, sampling_of
from stages.serve.api.requests import (
    MAX_PROMPTS,
    MAX_STOPS,
    ApiCall,
    EmptyList,
    JsonObject,
    LogProbs,
    MaxTokens,
    MessageList,
    MinP,
    Parts,
    Penalty,
    Seed,
    Several,
    Stops,
    StrictFields,
    Temperature,
    TextPart,
    Texts,
    TokenId,
    TopK,
    TopP,
    UsualFields,
    in_range,
    join_text,
    prompt_texts,
    stop_texts,
)
from stages.serve.api.structured_outputs import GRAMMARS, AllowedTexts, StructuredOutputs
from stages.serve.tokenizer_pool import token_text
from stages.serve.tools import (
    NO_TOOLS,
    Function,
    Grammar,
    ToolUse,
    Turn,
    answer_grammar,
    call_turn,
    make_turn,
    tool_use,
)

DEFAULT_MAX_TOKENS = 16  # as OpenAI has it

BiasedToken = Annotated[str, Meta(pattern=r"^(0|[1-9][0-9]{0,8})$(?!\n)")]  # one spelling of each token


class StreamOptions(StrictFields):
    """`include_usage`: a last chunk has the token counts."""

    include_usage: bool | None = None
    continuous_usage_stats: Literal[False] | None = None  # vLLM's
    include_obfuscation: Literal[False] | None = None


class SamplingFields(UsualFields):
    """How completions are sampled and where they end: OpenAI's fields, and those that vLLM and SGLang add.

    Null means the default.

    `include_stop_str_in_output`, SGLang's `no_stop_trim`: the text ends with the stop string.
    `cache_salt`: only requests with the same one share the prefix cache.
    """

    min_tokens: Annotated[int, in_range("min_tokens")] | None = None
    temperature: Temperature = None
    top_p: TopP = None
    top_k: TopK = None
    min_p: MinP = None
    presence_penalty: Penalty = None
    frequency_penalty: Penalty = None
    repetition_penalty: Annotated[float, in_range("repetition_penalty")] | None = None
    logit_bias: (
        Annotated[dict[BiasedToken, Annotated[float, in_range("logit_bias")]], Meta(max_length=1024)] | None
    ) = None
    seed: Seed = None
    stop: Stops | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOPS)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    no_stop_trim: bool | None = None
    cache_salt: Annotated[str, Meta(min_length=1, max_length=1024)] | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonObject = None
    guided_regex: str | None = None
    guided_choice: AllowedTexts | None = None
    guided_grammar: str | None = None
    grammar: str | None = None

    @property
    def grammars(self) -> list[Grammar]:
        """The grammars that the request asks for. Raises InvalidField."""
        grammars = []
        if self.structured_outputs:
            grammars.append(self.structured_outputs.wanted_grammar)
        values = {
            "guided_json": self.guided_json,
            "guided_regex": self.guided_regex,
            "guided_choice": self.guided_choice,
            "guided_grammar": self.guided_grammar,
            "grammar": self.grammar,
        }
        for name, value in values.items():
            if value is not None:
                grammars.append(Grammar(name, partial(GRAMMARS[name], value)))
        return grammars

    def sampling(
        self, defaults: SamplingParams, max_tokens: int | None, logprobs: int | None
    ) -> SamplingParams:
        """Returns the defaults with what the request gives. Raises InvalidField."""
        return sampling_of(
            defaults,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias={int(token): value for token, value in (self.logit_bias or {}).items() if value},
            logprobs=logprobs,
            stop_token_ids=self.stop_token_ids,
            seed=self.seed,
        )

    def make_job(self, prompt: ChatPrompt | TextPrompts, sampling: SamplingParams, n: int = 1) -> Job:
        """Returns the job for `n` completions of each prompt. Raises InvalidField."""
        return Job(
            prompt=prompt,
            sampling=sampling,
            n=n,
            stops=stop_texts(self.stop),
            keeps_stop=bool(self.include_stop_str_in_output or self.no_stop_trim),
            ignores_eos=bool(self.ignore_eos),
            grammar=only_grammar(self.grammars),
            cache_salt=self.cache_salt or "",
            streams=bool(self.stream),
            ignored=self.ignored,
        )


class CompletionFields(SamplingFields):
    """The fields of a chat's and a text's completions. Null means the default.

    `return_tokens_as_token_ids`: a token with a log-probability is called `token_id:5`.
    """

    max_tokens: MaxTokens | None = None
    n: Annotated[int, Meta(ge=1, le=16)] | None = None
    return_tokens_as_token_ids: bool | None = None
    add_special_tokens: bool | None = None
    stream_options: StreamOptions | None = None

    def check_stream_options(self) -> None:
        """Raises InvalidField for options of a stream where none is asked for."""
        if self.stream_options is not None and not self.stream:
            raise InvalidField("stream_options", "stream_options is given without stream being true.")


class CompletionRequest(CompletionFields, kw_only=True):
    """POST /v1/completions. `prompt`: a text, several, a list of token ids, or several such lists.

    `add_special_tokens`, true by default: a text begins with the model's start tokens. `echo`: the
    prompt comes before its completion, its log-probabilities too. `max_tokens` may then be 0.
    """

    prompt: Texts
    max_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    logprobs: LogProbs | None = None
    echo: bool | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    @property
    def choices(self) -> int:
        return (self.n or 1) * len(prompt_texts("prompt", self.prompt, MAX_PROMPTS))

    def job(self, defaults: SamplingParams) -> Job:
        """Returns what the request asks for, where the `defaults` stand for what it leaves out.

        Raises InvalidField.
        """
        if self.max_tokens == 0 and not self.echo:
            raise InvalidField("max_tokens", "max_tokens must be at least 1, or 0 with echo.")
        if self.echo and self.stream:
            raise InvalidField("echo", "echo is answered whole: leave stream out.")
        texts = prompt_texts("prompt", self.prompt, MAX_PROMPTS)
        prompt = TextPrompts("prompt", texts, special=self.add_special_tokens is not False)
        max_tokens = DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        self.check_stream_options()
        sampling = self.sampling(defaults, max_tokens or None, self.logprobs)
        job = self.make_job(prompt, sampling, self.n or 1)
        scores = bool(self.echo and self.logprobs is not None)
        return dataclasses.replace(job, n=job.n if max_tokens else 0, scores=scores)


class ReplyFields(msgspec.Struct, kw_only=True):
    """The fields of all replies and chunks with completions."""

    id: str
    created: int
    model: str
    system_fingerprint: str


class CachedTokens(msgspec.Struct):
    """Tokens of the prompt that the prefix cache held."""

    cached_tokens: int


class ReplyUsage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class CompletionLogProbs(msgspec.Struct):
    """Lists of one length: tokens, log-probabilities, the most probable ones, and the offsets in the text.

    The first token of a prompt has none.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(msgspec.Struct):
    index: int
    text: str
    finish_reason: Reason | None
    logprobs: CompletionLogProbs | None = None


class CompletionReply(ReplyFields, kw_only=True):
    """A whole reply, and one `data:` of a stream."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]
    usage: ReplyUsage | UnsetType | None = UNSET


class DefaultSampling(msgspec.Struct):
    """The sampling of a request that leaves these fields out.

    They have the same name and meaning in SamplingParams.
    """

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float


class ChoicesWriter(Writer):
    """Writes completions as choices, `choice` a whole one."""

    id_prefix: ClassVar[str]
    reply_type: ClassVar[Any]
    chunk_type: ClassVar[Any]

    def __init__(self, call: ApiCall) -> None:
        self.tokenizer = call.state.tokenizer.tokenizer
        self.body = call.body
        self._wants_usage = bool(self.body.stream_options and self.body.stream_options.include_usage)
        self._head = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": call.model.name,
            "system_fingerprint": call.model.fingerprint,
        }

    def choice(self, piece: Piece) -> Any:
        raise NotImplementedError

    def token_text(self, token: int) -> tuple[str, bytes]:
        """Returns the text of a token, or `token_id:` and its id if the body asks for that; and its bytes."""
        text, content = token_text(self.tokenizer, token)
        if self.body.return_tokens_as_token_ids:
            text = f"token_id:{token}"
        return text, content

    def reply(self, pieces: list[Piece], usage: Usage) -> Any:
        choices = list(map(self.choice, pieces))
        return self.reply_type(**self._head, choices=choices, usage=reply_usage(usage))

    def chunk(self, choices: list[Any], usage: ReplyUsage | None = None) -> Any:
        usage_field = usage if self._wants_usage else UNSET
        return self.chunk_type(**self._head, choices=choices, usage=usage_field)

    def end(self, usage: Usage) -> Iterable[Any]:
        if self._wants_usage:
            yield self.chunk([], reply_usage(usage))


def reply_usage(usage: Usage) -> ReplyUsage:
    return ReplyUsage(
        usage.prompt, usage.completion, usage.prompt + usage.completion, CachedTokens(usage.cached)
    )


class CompletionWriter(ChoicesWriter):
    id_prefix = "cmpl"
    reply_type = CompletionReply
    chunk_type = CompletionReply

    def __init__(self, call: ApiCall[CompletionRequest]) -> None:
        super().__init__(call)
        # Of each choice: where the next token begins in its text, and the tokens so far.
        self._offsets = defaultdict[int, int](int)
        self._streams = defaultdict[int, Detokenizer](self.tokenizer.stream)

    def choice(self, piece: Piece) -> CompletionChoice:
        return CompletionChoice(piece.choice, piece.text, piece.finish_reason, self._logprobs(piece))

    def chunks(self, piece: Piece) -> Iterable[Any]:
        if piece.text or piece.logprobs or piece.finish_reason:
            yield self.chunk([self.choice(piece)])

    def _logprobs(self, piece: Piece) -> CompletionLogProbs | None:
        if self.body.logprobs is None:
            return None
        columns = CompletionLogProbs([], [], [] if self.body.logprobs else None, [])
        for logprob in piece.logprobs:
            columns.tokens.append(self._name(logprob.token))
            value = None if math.isnan(logprob.logprob) else logprob.logprob
            columns.token_logprobs.append(value)
            if columns.top_logprobs is not None:
                top = {self._name(token): nats for token, nats in logprob.top}
                columns.top_logprobs.append(top or None)
            columns.text_offset.append(self._offsets[piece.choice])  # part of a character: its offset
            self._offsets[piece.choice] += len(self._streams[piece.choice].push(logprob.token))
        return columns

    def _name(self, token: int) -> str:
        text, _ = self.token_text(token)
        return text


class EchoWriter(CompletionWriter):
    """Writes replies in which each completion comes behind its prompt, of tokens."""

    def __init__(self, call: ApiCall[CompletionRequest], prompts: Sequence[Sequence[int]]) -> None:
        super().__init__(call)
        self._prompts = prompts

    def reply(self, pieces: list[Piece], usage: Usage) -> Any:
        rest = iter(pieces)
        echoed: list[Piece] = []
        for prompt in self._prompts:
            scores: Sequence[LogProb] = ()
            if self.body.logprobs is not None and len(prompt) > 1:
                scores = next(rest).logprobs
            for _ in range(self.body.n or 1):
                piece = Piece(0, "", [], "length")
                if self.body.max_tokens != 0:
                    piece = next(rest)
                logprobs = [LogProb(prompt[0], math.nan, ()), *scores, *piece.logprobs]
                text = self.tokenizer.decode(prompt) + piece.text
                echoed.append(piece._replace(choice=len(echoed), text=text, logprobs=logprobs))
        return super().reply(echoed, usage._replace(prompt=sum(map(len, self._prompts))))


async def create_completion(call: ApiCall[CompletionRequest]) -> ASGIApp:
    """Continues texts.

    Each prompt `n` times; the choices of a prompt follow each other.
    """
    job = call.body.job(call.state.sampling)
    if not call.body.echo:
        return await run(call, job, CompletionWriter(call))
    tokens = (await job.prompt.encode(call.state)).tokens
    job = dataclasses.replace(job, prompt=TextPrompts("prompt", tokens))
    return await run(call, job, EchoWriter(call, tokens))


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
        """The names of the fields that hold any."""
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
        thoughts: list[str] = []
        for message in self.messages:
            thoughts += message.thoughts
        return [*super().ignored, *(f"messages.{name}" for name in dict.fromkeys(thoughts))]

    @property
    def tool_use(self) -> ToolUse:
        choice = self.tool_choice
        named = choice.function.name if isinstance(choice, ToolField) else None
        functions = [each.function for each in self.tools or ()]
        return tool_use(functions, named, choice, self.parallel_tool_calls)

    @property
    def grammars(self) -> list[Grammar]:
        grammars = super().grammars
        wanted = self.response_format
        if wanted is None or wanted.type == "text":
            return grammars
        if (wanted.json_schema is None) != (wanted.type == "json_object"):
            field = "response_format.json_schema"
            raise InvalidField(field, f"{field} belongs to the type json_schema, and only to it.")
        if wanted.json_schema is None:
            return [*grammars, answer_grammar("response_format", None)]
        return [*grammars, answer_grammar("response_format.json_schema.schema", wanted.json_schema.schema)]

    def job(self, defaults: SamplingParams) -> Job:
        """Returns what the request asks for, where the `defaults` stand for what it leaves out.

        Raises InvalidField.
        """
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
        max_tokens = self.max_completion_tokens or self.max_tokens
        if self.max_tokens and self.max_tokens != max_tokens:
            field = "max_completion_tokens"
            raise InvalidField(
                field, f"{field} is sent beside max_tokens, its older name, with another value."
            )
        prompt = chat_prompt(
            self.messages,
            self.tool_use,
            self.chat_template_kwargs,
            begins=self.add_generation_prompt,
            goes_on=self.continue_final_message,
        )
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        self.check_stream_options()
        return self.make_job(prompt, self.sampling(defaults, max_tokens, logprobs), self.n or 1)


class TopLogProb(msgspec.Struct):
    """A token, its log-probability in nats, and its bytes."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogProb(TopLogProb):
    """The sampled token, and the most probable ones in its place."""

    top_logprobs: list[TopLogProb]


def token_logprob(logprob: LogProb, text_of: Callable[[int], tuple[str, bytes]]) -> TokenLogProb:
    """Returns a sampled token and its log-probability as clients read them.

    `text_of`: a token's id -> its text, its bytes.
    """

    def fields(token: int, nats: float) -> tuple[str, float, list[int]]:
        text, content = text_of(token)
        return text, nats, list(content)

    top = [TopLogProb(*fields(token, nats)) for token, nats in logprob.top]
    return TokenLogProb(*fields(logprob.token, logprob.logprob), top)


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
