"""Ollama's routes: POST /api/chat, /api/generate and /api/show, GET /api/tags, /api/ps and /api/version."""

import datetime
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

import jax
import msgspec
from msgspec import UNSET, Meta, UnsetType

from engine.counting.params import count_params
from engine.errors import InvalidField
from engine.model.weights.matmul import weight_types
from stages.serve.api.completions import Tools
from stages.serve.api.generation import (
    Answer,
    DocumentsUse,
    Piece,
    Prompts,
    Reason,
    Usage,
    Writer,
    chat_prompts,
    generate,
    text_prompts,
)
from stages.serve.api.requests import (
    Call,
    Conversation,
    EmptyList,
    Fields,
    GenerationRequest,
    MinP,
    ModelRequest,
    Penalty,
    Seed,
    Several,
    Stops,
    Temperature,
    TopK,
    TopP,
    in_range,
)
from stages.serve.errors import ApiError
from stages.serve.state import ServedModel, ServerState
from stages.serve.tools import ToolCall, Turn, answer_grammar, call_turn, join_calls, make_turn, parse_arguments, tool_use


class Options(Fields):
    """`num_predict`: the most tokens, as many as fit if negative. A penalty is for tokens of the whole text."""

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
    mirostat: Literal[0] | None = None
    # What changes no answer: see IGNORED_INSIDE.
    num_ctx: int | None = None
    num_keep: int | None = None
    num_batch: int | None = None
    num_gpu: int | None = None
    num_thread: int | None = None
    repeat_last_n: int | None = None
    use_mmap: bool | None = None
    use_mlock: bool | None = None


class OllamaRequest(GenerationRequest):
    """The fields of /api/chat and /api/generate. `format`: json, or a JSON schema that the answer satisfies."""

    stream: bool = True
    options: Options = msgspec.field(default_factory=Options)
    format: Literal["", "json"] | dict[str, Any] | None = None
    think: Literal[False] | None = None
    logprobs: Literal[False] | None = None

    async def respond(self, call: Call, prompts: Prompts, is_chat: bool) -> Answer:
        most, writer = self.options.num_predict, OllamaWriter(call.model, is_chat)
        if most == 0:
            message = "num_predict must be at least 1, or negative for as many tokens as fit."
            raise InvalidField("options.num_predict", message)
        grammars = [answer_grammar("format", self.format if isinstance(self.format, dict) else None)] if self.format else []
        limit = most if most and most > 0 else None
        return await generate(call, prompts, writer, fields=self.options, grammars=grammars, max_tokens=limit)


class OllamaFunction(msgspec.Struct, kw_only=True):
    name: str
    arguments: dict[str, Any] = {}


class OllamaCall(msgspec.Struct, kw_only=True):
    function: OllamaFunction
    id: str = ""


class OllamaMessage(Fields):
    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    thinking: str | None = None
    images: EmptyList | None = None
    tool_calls: Several[OllamaCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None

    @property
    def turn(self) -> Turn:
        calls = [call_turn(call.id, call.function.name, call.function.arguments) for call in self.tool_calls or ()]
        return make_turn(self.role, self.content, name=self.tool_name, tool_call_id=self.tool_call_id, tool_calls=calls)


class OllamaChatRequest(OllamaRequest, kw_only=True):
    """POST /api/chat."""

    messages: Conversation[OllamaMessage]
    tools: Tools = None


class OllamaGenerateRequest(OllamaRequest, kw_only=True):
    """POST /api/generate. With `raw` the prompt is continued, else it is a message of the user's."""

    prompt: Annotated[str, Meta(min_length=1)]
    system: str | None = None
    raw: bool | None = None
    suffix: Literal[""] | None = None
    template: Literal[""] | None = None
    images: EmptyList | None = None
    context: EmptyList | None = None


class OllamaReply(msgspec.Struct, kw_only=True):
    """A whole reply, and one line of a stream. Durations are in nanoseconds, the prompt's from the request's arrival."""

    model: str
    created_at: datetime.datetime
    message: dict[str, Any] | UnsetType = UNSET
    response: str | UnsetType = UNSET
    done: bool = False
    done_reason: Literal["stop", "length"] | UnsetType = UNSET
    total_duration: int | UnsetType = UNSET
    prompt_eval_count: int | UnsetType = UNSET
    prompt_eval_duration: int | UnsetType = UNSET
    eval_count: int | UnsetType = UNSET
    eval_duration: int | UnsetType = UNSET
    documents: DocumentsUse | UnsetType = UNSET


class OllamaWriter(Writer):
    """Writes the replies of /api/chat, or of /api/generate, a stream as a line of JSON for each piece."""

    media, last = "application/x-ndjson", b""

    def __init__(self, model: ServedModel, is_chat: bool) -> None:
        self._model, self._is_chat = model.name, is_chat
        self._reason: Reason | None = None
        self._calls: list[ToolCall] = []  # a stream has each whole, at its end

    def reply(self, pieces: list[Piece], usage: Usage) -> OllamaReply:
        self.chunks(pieces[0])
        return self._reply(pieces[0].text, self._calls, **self._end(usage))

    def chunks(self, piece: Piece) -> Iterable[OllamaReply]:
        self._reason = piece.finish_reason
        self._calls += piece.calls
        return [self._reply(piece.text)] if piece.text else []

    def end(self, usage: Usage) -> Iterable[OllamaReply]:
        calls = [self._reply("", self._calls)] if self._calls else []
        return [*calls, self._reply("", **self._end(usage))]

    def frame(self, chunk: Any) -> bytes:
        return msgspec.json.encode(chunk) + b"\n"

    def error(self, error: ApiError) -> bytes:
        return self.frame({"error": str(error)})

    def comment(self, text: str) -> bytes:
        return b""  # a line of JSON has none

    def _reply(self, text: str, parts: Sequence[ToolCall] = (), **end: Any) -> OllamaReply:
        calls = []
        for call in join_calls(parts):
            arguments = parse_arguments(call)
            if arguments is not None:  # an object cannot be cut, and a client would call with less
                calls.append({"function": {"name": call.name, "arguments": arguments}})
        form: dict[str, Any] = {"response": text}
        if self._is_chat:
            form = {"message": make_turn("assistant", text, tool_calls=calls)}
        return OllamaReply(model=self._model, created_at=datetime.datetime.now(datetime.UTC), **form, **end)

    def _end(self, usage: Usage) -> dict[str, Any]:
        first, total = (round(seconds * 1e9) for seconds in (usage.first_seconds, usage.seconds))
        return {
            "done": True,
            "done_reason": "length" if self._reason == "length" else "stop",
            "total_duration": total,
            "prompt_eval_count": usage.prompt,
            "prompt_eval_duration": first,
            "eval_count": usage.completion,
            "eval_duration": total - first,
            "documents": usage.documents,
        }


async def ollama_chat(call: Call[OllamaChatRequest]) -> Answer[OllamaReply]:
    """Answers a conversation, as Ollama has it."""
    tools = tool_use([tool.function for tool in call.body.tools or ()])
    prompts = await chat_prompts(call, [message.turn for message in call.body.messages], tools=tools)
    return await call.body.respond(call, prompts, True)


async def ollama_generate(call: Call[OllamaGenerateRequest]) -> Answer[OllamaReply]:
    """Answers or continues a prompt, as Ollama has it."""
    body = call.body
    system = [make_turn("system", body.system)] if body.system else []
    turns = [*system, make_turn("user", body.prompt)]
    prompts = await (text_prompts(call, 1) if body.raw else chat_prompts(call, turns))
    return await body.respond(call, prompts, False)


class Tags(msgspec.Struct):
    """The reply of GET /api/tags, and of /api/ps: what is served is loaded."""

    models: list[dict[str, Any]]


class Version(msgspec.Struct):
    """The reply of GET /api/version. Clients ask whether it is new enough for tools and schemas."""

    version: str = "0.12.0"


class ShowRequest(ModelRequest):
    """POST /api/show. `name`: what older clients call the model."""

    name: str | None = None
    verbose: bool | None = None


class Show(msgspec.Struct):
    modified_at: datetime.datetime
    details: dict[str, str]
    model_info: dict[str, Any]
    template: str
    capabilities: tuple[str, ...] = ("completion", "tools")


async def ollama_tags(call: Call) -> Tags:
    """The model that is served, as Ollama has it."""
    state = call.state
    engine, at = state.engine.engine, _loaded_at(state)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(engine.params))
    model = {"modified_at": at, "size": size, "digest": state.digest, "details": _details(state)}
    return Tags([{"name": name, "model": name, **model} for name in state.served_names])


async def ollama_ps(call: Call) -> Tags:
    """The model that is served: it is loaded."""
    return await ollama_tags(call)


async def ollama_version(_: Call) -> Version:
    """A version of Ollama that has what is here."""
    return Version()


async def ollama_show(call: Call[ShowRequest]) -> Show:
    """What a model is and can do."""
    state = call.state
    if call.body.name:
        state.find_model(call.body.name)
    cfg = state.engine.cfg
    info = {
        "general.architecture": "llama",
        "general.parameter_count": count_params(cfg).total,
        "llama.context_length": state.engine.capacity,
        "llama.embedding_length": cfg.width,
    }
    return Show(_loaded_at(state), _details(state), info, state.tokenizer.template)


def _loaded_at(state: ServerState) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(state.loaded_at, datetime.UTC)


def _details(state: ServerState) -> dict[str, str]:
    engine = state.engine.engine
    return {
        "format": "thrice",
        "family": "llama",
        "parameter_size": f"{count_params(engine.cfg).total / 1e6:.1f}M",
        "quantization_level": weight_types(engine.params),
    }
