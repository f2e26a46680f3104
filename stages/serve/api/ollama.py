"""POST /api/chat and /api/generate, Ollama's: answers a conversation or a prompt, or continues a text."""

import datetime
import re
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType
from starlette.types import ASGIApp

from engine.errors import InvalidField
from engine.inference.request import SamplingParams
from stages.serve.api.chat import Tools
from stages.serve.api.fields import (
    AnswerRequest,
    EmptyList,
    LogProbs,
    MinP,
    Penalty,
    Seed,
    Several,
    Stops,
    StrictFields,
    Temperature,
    TopK,
    TopP,
    given_names,
    in_range,
    stop_texts,
)
from stages.serve.api.generation import run
from stages.serve.api.jobs import ChatPrompt, Job, TextPrompts, sampling_of
from stages.serve.api.logprobs import TokenLogProb, token_logprob
from stages.serve.api.requests import ApiCall, ignored_header, json_reply
from stages.serve.api.writer import Piece, Reason, Usage, Writer
from stages.serve.bill import Bill
from stages.serve.errors import ApiError
from stages.serve.grammar import answer_grammar
from stages.serve.tokenizer_pool import token_text
from stages.serve.tools import ToolCall, Turn, call_turn, join_calls, make_turn, parse_arguments, tool_use

MAX_NAMED = 32  # unknown options that a header names
ZERO_DURATION = re.compile(r"0+(\.0*)?(ns|us|µs|ms|s|m|h)?")  # a `keep_alive` that unloads


class Options(msgspec.Struct):
    """`num_predict`: the most tokens, as many as fit if negative. A penalty is for tokens of the whole text.

    An option that is not among them is ignored, as Ollama does, and named.
    """

    num_predict: Annotated[int, Meta(ge=-2, le=2**31 - 1)] | None = None
    temperature: Temperature = None
    top_k: TopK = None
    top_p: TopP = None
    min_p: MinP = None
    seed: Seed = None
    repetition_penalty: Annotated[float, in_range("repetition_penalty")] | None = msgspec.field(
        default=None, name="repeat_penalty"
    )
    presence_penalty: Penalty = None
    frequency_penalty: Penalty = None
    stop: Stops | None = None
    # What changes no answer: see IGNORED_OPTIONS.
    num_ctx: int | None = None
    num_keep: int | None = None
    num_batch: int | None = None
    num_gpu: int | None = None
    num_thread: int | None = None
    repeat_last_n: int | None = None
    use_mmap: bool | None = None
    use_mlock: bool | None = None


IGNORED_OPTIONS = (
    "num_ctx",
    "num_keep",
    "num_batch",
    "num_gpu",
    "num_thread",
    "repeat_last_n",
    "use_mmap",
    "use_mlock",
)
KNOWN_OPTIONS = {field.encode_name for field in msgspec.structs.fields(Options)}


class OptionNames(msgspec.Struct):
    """A body of which only the names of its options are read."""

    options: dict[str, msgspec.Raw] | None = None


class OllamaFields(AnswerRequest):
    """The fields that requests for an answer and for embeddings share."""

    options: Options | None = None
    truncate: bool | None = None

    def ignored_in(self, content: bytearray) -> list[str]:
        """Returns `ignored`, and the options in the JSON of the body that have no meaning here."""
        names = self.ignored
        if self.options:
            names += [f"options.{name}" for name in given_names(self.options, IGNORED_OPTIONS)]
        return names + unknown_options(content)


def unknown_options(content: bytearray) -> list[str]:
    """Returns the first names of a body's options that are not among Options, as a header can have them."""
    names = msgspec.json.decode(content, type=OptionNames).options or {}
    unknown = [name for name in names if name not in KNOWN_OPTIONS]
    # A name may hold any character, and a header only some.
    return [f"options.{ascii(name)[1:-1]:.64}" for name in unknown[:MAX_NAMED]]


class OllamaRequest(OllamaFields):
    """The fields of /api/chat and /api/generate. `format`: json, or a JSON schema that the answer satisfies.

    `truncate` allows that a prompt longer than the context is cut, and `shift` that an answer goes
    on when the context is full. Neither is done here: the prompt is refused, and the answer ends.
    """

    stream: bool | None = True
    format: Literal["", "json"] | dict[str, Any] | None = None
    think: bool | str | None = None
    logprobs: bool | None = None
    top_logprobs: LogProbs | None = None
    shift: bool | None = None

    def __post_init__(self) -> None:
        if self.stream is None:
            self.stream = True

    def ignored_in(self, content: bytearray) -> list[str]:
        names = super().ignored_in(content)
        if self.truncate:
            names.append("truncate")
        if self.shift:
            names.append("shift")
        return names

    @property
    def thinks(self) -> bool | None:
        """False where `think` is false. Without it the chat template decides."""
        return False if self.think is False else None

    def check(self) -> None:
        """Raises InvalidField for fields that do not go together, and for thinking."""
        if self.think:  # in Ollama's words, by which clients know that they are to ask again without it
            raise InvalidField(
                "think", f'"{self.model}" does not support thinking: leave think out, or send false.'
            )
        if self.top_logprobs and not self.logprobs:
            raise InvalidField("top_logprobs", "top_logprobs is given without logprobs being true.")

    def load(self, call: ApiCall, *, is_chat: bool) -> ASGIApp:
        """Replies to a request without a prompt, by which Ollama loads or unloads a model.

        What is served here is loaded, and stays so.
        """
        writer = OllamaWriter(call, is_chat=is_chat)
        if ZERO_DURATION.fullmatch(str(self.keep_alive)):
            return reply_at_once(call, writer.loaded("unload"))
        return reply_at_once(call, writer.loaded("load"))

    def make_job(self, prompt: ChatPrompt | TextPrompts, defaults: SamplingParams, content: bytearray) -> Job:
        """Returns what a request of /api/chat or /api/generate asks for. Raises InvalidField."""
        options = self.options or Options()
        max_tokens = options.num_predict
        if max_tokens == 0:
            message = "num_predict must be at least 1, or negative for as many tokens as fit."
            raise InvalidField("options.num_predict", message)
        if max_tokens and max_tokens < 0:
            max_tokens = None
        grammar = None
        if isinstance(self.format, dict):
            grammar = answer_grammar("format", self.format)
        elif self.format:
            grammar = answer_grammar("format", None)
        logprobs = None
        if self.logprobs:
            logprobs = self.top_logprobs or 0
        sampling = sampling_of(
            defaults,
            max_tokens=max_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            seed=options.seed,
            repetition_penalty=options.repetition_penalty,
            presence_penalty=options.presence_penalty,
            frequency_penalty=options.frequency_penalty,
            logprobs=logprobs,
        )
        return Job(
            prompt=prompt,
            sampling=sampling,
            stops=stop_texts(options.stop),
            grammar=grammar,
            streams=bool(self.stream),
            ignored=self.ignored_in(content),
        )


def reply_at_once(call: ApiCall[Any], reply: msgspec.Struct) -> ASGIApp:
    """Replies to a request for which nothing is computed."""
    return json_reply(reply, headers=ignored_header(call.body.ignored_in(call.content)))


class OllamaFunction(msgspec.Struct, kw_only=True):
    name: str
    arguments: dict[str, Any] = {}


class OllamaCall(msgspec.Struct, kw_only=True):
    function: OllamaFunction
    id: str = ""


class OllamaMessage(StrictFields):
    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    thinking: str | None = None
    images: EmptyList | None = None
    tool_calls: Several[OllamaCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None

    @property
    def turn(self) -> Turn:
        calls = [
            call_turn(call.id, call.function.name, call.function.arguments) for call in self.tool_calls or ()
        ]
        return make_turn(
            self.role, self.content, name=self.tool_name, tool_call_id=self.tool_call_id, tool_calls=calls
        )


class OllamaChatRequest(OllamaRequest, kw_only=True):
    """POST /api/chat."""

    messages: Annotated[list[OllamaMessage], Meta(max_length=4096)] | None = None
    tools: Tools = None

    def job(self, defaults: SamplingParams, content: bytearray) -> Job:
        """Returns what the request, with the JSON `content`, asks for. Raises InvalidField."""
        turns = [message.turn for message in self.messages or ()]
        tools = tool_use([tool.function for tool in self.tools or ()])
        prompt = ChatPrompt("messages", turns, tools=tools, thinks=self.thinks)
        return self.make_job(prompt, defaults, content)


class OllamaGenerateRequest(OllamaRequest, kw_only=True):
    """POST /api/generate. With `raw` the prompt is continued, else it is a message of the user's."""

    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None
    suffix: Literal[""] | None = None
    template: Literal[""] | None = None
    images: EmptyList | None = None
    context: EmptyList | None = None

    def job(self, defaults: SamplingParams, content: bytearray) -> Job:
        """Returns what the request, with the JSON `content`, asks for. Raises InvalidField."""
        text = self.prompt or ""
        if self.raw:
            return self.make_job(TextPrompts("prompt", [text]), defaults, content)
        turns = [make_turn("user", text)]
        if self.system:
            turns.insert(0, make_turn("system", self.system))
        return self.make_job(ChatPrompt("prompt", turns, thinks=self.thinks), defaults, content)


class OllamaReply(msgspec.Struct, kw_only=True):
    """A whole reply, and one line of a stream.

    Durations are in nanoseconds, the prompt's from the request's arrival.
    """

    model: str
    created_at: datetime.datetime
    message: dict[str, Any] | UnsetType = UNSET
    response: str | UnsetType = UNSET
    done: bool = False
    done_reason: Literal["stop", "length", "load", "unload"] | UnsetType = UNSET
    logprobs: list[TokenLogProb] | UnsetType = UNSET
    total_duration: int | UnsetType = UNSET
    load_duration: int | UnsetType = UNSET
    prompt_eval_count: int | UnsetType = UNSET
    prompt_eval_duration: int | UnsetType = UNSET
    eval_count: int | UnsetType = UNSET
    eval_duration: int | UnsetType = UNSET
    cost: Bill | UnsetType = UNSET


class OllamaWriter(Writer):
    """Writes the replies of /api/chat, or of /api/generate, a stream as a line of JSON for each piece."""

    media = "application/x-ndjson"
    last = b""

    def __init__(self, call: ApiCall, *, is_chat: bool) -> None:
        self._model = call.model.name
        self._is_chat = is_chat
        self._tokenizer = call.state.tokenizer.tokenizer
        self._reason: Reason | None = None
        self._calls: list[ToolCall] = []  # a stream has each whole, at its end

    def loaded(self, reason: Literal["load", "unload"]) -> OllamaReply:
        """Returns the reply to a request without a prompt."""
        return self._reply("", done=True, done_reason=reason)

    def reply(self, pieces: list[Piece], usage: Usage) -> OllamaReply:
        piece = pieces[0]
        self._remember(piece)
        return self._reply(piece.text, self._calls, **self._logprobs(piece), **self._end(usage))

    def chunks(self, piece: Piece) -> Iterable[OllamaReply]:
        self._remember(piece)
        if not piece.text and not piece.logprobs:
            return []
        return [self._reply(piece.text, **self._logprobs(piece))]

    def end(self, usage: Usage) -> Iterable[OllamaReply]:
        if self._calls:
            yield self._reply("", self._calls)
        yield self._reply("", **self._end(usage))

    def frame(self, chunk: Any) -> bytes:
        return msgspec.json.encode(chunk) + b"\n"

    def error(self, error: ApiError) -> bytes:
        return self.frame({"error": str(error)})

    def comment(self, text: str) -> bytes:
        return b""  # a line of JSON has none

    def _remember(self, piece: Piece) -> None:
        """Remembers what comes at the end: the calls, and why the completion ended."""
        self._reason = piece.finish_reason
        self._calls += piece.calls

    def _reply(self, text: str, parts: Sequence[ToolCall] = (), **fields: Any) -> OllamaReply:
        """Returns a reply, or a line of a stream, with a text, calls and more fields."""
        answer: dict[str, Any] = {"response": text}
        if self._is_chat:
            answer = {"message": make_turn("assistant", text, tool_calls=_whole_calls(parts))}
        now = datetime.datetime.now(datetime.UTC)
        return OllamaReply(model=self._model, created_at=now, **answer, **fields)

    def _logprobs(self, piece: Piece) -> dict[str, Any]:
        if not piece.logprobs:
            return {}
        text_of = partial(token_text, self._tokenizer)
        return {"logprobs": [token_logprob(logprob, text_of) for logprob in piece.logprobs]}

    def _end(self, usage: Usage) -> dict[str, Any]:
        """Returns the fields of a whole reply, and of the last line of a stream."""
        first = round(usage.first_seconds * 1e9)
        total = round(usage.seconds * 1e9)
        return {
            "done": True,
            "done_reason": "length" if self._reason == "length" else "stop",
            "total_duration": total,
            "load_duration": 0,
            "prompt_eval_count": usage.prompt,
            "prompt_eval_duration": first,
            "eval_count": usage.completion,
            "eval_duration": total - first,
            "cost": usage.cost,
        }


def _whole_calls(parts: Sequence[ToolCall]) -> list[dict[str, Any]]:
    """Returns calls as Ollama has them, without one that is cut: a client would call with less."""
    calls = []
    for call in join_calls(parts):
        arguments = parse_arguments(call)
        if arguments is not None:
            calls.append({"function": {"name": call.name, "arguments": arguments}})
    return calls


async def ollama_chat(call: ApiCall[OllamaChatRequest]) -> ASGIApp:
    """Answers a conversation, as Ollama has it."""
    body = call.body
    body.check()
    if not body.messages:
        return body.load(call, is_chat=True)
    job = body.job(call.state.sampling, call.content)
    return await run(call, job, OllamaWriter(call, is_chat=True))


async def ollama_generate(call: ApiCall[OllamaGenerateRequest]) -> ASGIApp:
    """Answers or continues a prompt, as Ollama has it."""
    body = call.body
    body.check()
    if not body.prompt:
        return body.load(call, is_chat=False)
    job = body.job(call.state.sampling, call.content)
    return await run(call, job, OllamaWriter(call, is_chat=False))
