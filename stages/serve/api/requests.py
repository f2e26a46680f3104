"""ApiCall: a request whose body is read within bounds of size and time; field types that dialects share.

An unknown field is refused by name unless it is null, which asks for nothing; and so is a value
that cannot be granted, for an answer that silently lacks it is worse than none. Fields that change
no answer (IGNORED) are accepted, and named in the reply's header X-Ignored-Fields; so are unknown
options of Ollama's.
"""

import asyncio
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from engine.errors import InvalidField
from engine.inference.request import RANGES
from stages.serve.admission import Place
from stages.serve.errors import ApiError, ClientGone
from stages.serve.state import ServedModel, ServerState

MAX_BYTES = 4 * 2**20
INLINE_BYTES = 65_536  # more are decoded in a thread
BODY_SECONDS = 20.0  # for a body to come

MAX_PROMPTS = 64
MAX_STOPS = 16
MAX_IDS = 2**18  # more than any context holds
MAX_NULL_FIELDS = 32  # unknown fields that are removed from a body: the body is checked once more for each


# In the OpenAPI document, which has the size of the vocabulary.
TOKEN_ID = {"$ref": "#/components/schemas/TokenId"}


def in_range(name: str) -> Meta:
    bounds = RANGES[name]
    return Meta(ge=bounds.least, le=bounds.most)


MaxTokens = Annotated[int, in_range("max_tokens")]
LogProbs = Annotated[int, in_range("logprobs")]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1, extra_json_schema=TOKEN_ID)]
TokenIds = Annotated[list[TokenId], Meta(max_length=MAX_IDS)]
Texts = str | Annotated[list[str | TokenId | TokenIds], Meta(min_length=1, max_length=MAX_IDS)]
StopText = Annotated[str, Meta(min_length=1, max_length=256)]
StopTexts = Annotated[list[StopText], Meta(max_length=MAX_STOPS)]
Stops = StopText | StopTexts
EmptyList = Annotated[list[None], Meta(max_length=0)]
JsonObject = dict[str, Any] | None
Item = TypeVar("Item")
MessageList = Annotated[list[Item], Meta(min_length=1, max_length=4096)]
Parts = Annotated[list[Item], Meta(min_length=1, max_length=256)]
Several = Annotated[list[Item], Meta(max_length=128)]  # tools, or calls of them
Temperature = Annotated[float, in_range("temperature")] | None
TopP = Annotated[float, in_range("top_p")] | None
TopK = Annotated[int, in_range("top_k")] | None
MinP = Annotated[float, in_range("min_p")] | None
Penalty = Annotated[float, Meta(ge=-2, le=2)] | None  # as OpenAI has it; the engine takes more
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None


class StrictFields(msgspec.Struct, forbid_unknown_fields=True):
    """Fields of a body; one that is not among them is refused."""


class TextPart(StrictFields):
    """A part of a message.

    Only text is supported; `cache_control` changes nothing, for the prefix cache holds every
    prompt.
    """

    type: Literal["text"]
    text: str
    cache_control: JsonObject = None
    citations: EmptyList | None = None


TextParts = str | Annotated[list[TextPart], Meta(max_length=256)]


def join_text(parts: Any) -> str:
    """Returns the text of a message: a string, parts with a `text` each, or None."""
    if isinstance(parts, str):
        return parts
    return "".join(part.text for part in parts or ())


# Types of tools that OpenAI and Anthropic describe or run themselves, without their dates; and fields of such.
OWN_TOOLS = (
    "bash",
    "code_execution",
    "code_interpreter",
    "computer",
    "container",
    "file_search",
    "image_generation",
    "mcp",
    "mcp_servers",
    "mcp_toolset",
    "memory",
    "text_editor",
    "tool_search_tool_bm25",
    "tool_search_tool_regex",
    "web_fetch",
    "web_search",
    "web_search_preview",
)

# Why this server does not grant a field, or a value.
UNSUPPORTED = {
    **dict.fromkeys(
        ("functions", "function_call"),
        "Functions are called tools now: send tools and tool_choice",
    ),
    **dict.fromkeys(("modalities", "audio"), "Answers are text"),
    "suffix": "Text is only continued at its end here: leave it out",
    "best_of": "Every completion made is returned here; use n",
    "include_obfuscation": "Nothing is added to chunks to hide how long their texts are",
    "web_search_options": "There is no search here",
    **dict.fromkeys(
        OWN_TOOLS,
        "This server runs no tools, and knows none: describe each as a function, which the client runs",
    ),
    **dict.fromkeys(
        ("store", "previous_response_id", "conversation", "background", "context", "thread"),
        "This server remembers nothing: send the whole conversation each time",
    ),
    **dict.fromkeys(
        ("images", "image", "image_url", "input_image", "base64", "url", "file"), "The model reads text alone"
    ),
    "citations": "An answer quotes no documents here",
    "inference_geo": "A request is answered on this server's own machine",
    "speed": "There is one speed here, the fastest",
    "input_examples": "Put examples of a tool's input into its description",
    "allowed_callers": "Tools are called by the model alone",
    "defer_loading": "The model is told of all tools at once",
    **dict.fromkeys(
        ("truncation", "context_management"), "Nothing is left out of a conversation here: shorten it"
    ),
    "enable_response_messages": "The reply has the answer alone: /tokenize tells the tokens of a conversation",
    "fallbacks": "Each request is answered by the model that it names, or by none",
    "search_result": "Send it as a document, with a source of type content",
    **dict.fromkeys(("think", "thinking"), "No thinking is asked of the model here: leave it out"),
    "prompt_logprobs": "Use echo with logprobs, or /v1/score",
    "truncate_prompt_tokens": "Nothing is left out of a prompt here: shorten it",
    "allowed_token_ids": "Use logit_bias, or structured_outputs",
    "logprob_token_ids": "The most probable tokens have log-probabilities, or given answers by /v1/score",
    **dict.fromkeys(
        ("whitespace_pattern", "guided_whitespace_pattern"),
        "JSON is written on one line here, without free white space",
    ),
    "disable_additional_properties": "Say additionalProperties: false in the schema",
    **dict.fromkeys(
        ("chat_template", "template"),
        "Conversations are written by the template that the server was started with",
    ),
    "lora_path": "Name the adapter as the model",
    "continuous_usage_stats": "Only the last chunk of a stream has token counts",
    **dict.fromkeys(
        ("kv_transfer_params", "ec_transfer_params"), "No server takes over another's cache here"
    ),
}


class ModelRequest(StrictFields):
    """A request that names a model."""

    model: str = "default"


class AnswerRequest(ModelRequest):
    """A request for something of a model's, with fields of several dialects that change nothing (IGNORED)."""

    # Who asks, what the request is filed under, how it is billed, cached or sped up; how much a
    # reasoning model should say.
    user: str | None = None
    metadata: JsonObject = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prediction: JsonObject = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    reasoning: JsonObject = None
    cache_control: JsonObject = None
    keep_alive: float | str | None = None
    # vLLM's and SGLang's: what the client calls the request, and in what pieces a stream comes.
    request_id: str | None = None
    rid: str | list[str] | None = None
    session_id: str | None = None
    stream_interval: int | None = None
    guided_decoding_backend: str | None = None

    @property
    def ignored(self) -> list[str]:
        """The names of the fields that are given and change no answer."""
        return given_names(self, IGNORED)

    @property
    def choices(self) -> int:
        """How many completions are asked for, or scores or embeddings."""
        return 1


IGNORED = AnswerRequest.__struct_fields__[1:]


def given_names(fields: Any, names: Iterable[str]) -> list[str]:
    """Returns which of these fields are given, and not null."""
    return [name for name in names if getattr(fields, name) is not None]


def stop_texts(stop: str | Sequence[str] | None) -> Sequence[str]:
    """Returns the strings that end a completion, of which a body has one, several, or none."""
    if isinstance(stop, str):
        return [stop]
    return stop or ()


def prompt_texts(field: str, value: Any, most: int) -> list[str] | list[list[int]]:
    """Returns the prompts in a field of the body, at most so many, all of one kind. Raises InvalidField."""
    texts = value if isinstance(value, list) else [value]
    kinds = {*map(type, texts)}
    if len(kinds) > 1:
        raise InvalidField(
            field, f"{field} must hold only texts, only token ids, or only lists of token ids."
        )
    if kinds == {int}:
        texts = [texts]
    if len(texts) > most:
        raise InvalidField(field, f"{field} holds {len(texts)} prompts; at most {most} are taken at once.")
    return texts


class GenerationRequest(AnswerRequest):
    """A request for completions, whole or streamed."""

    stream: bool | None = None


def explain(reason: str) -> Meta:
    """Has a field say why it takes no other value: in the OpenAPI document, and in the error for another."""
    return Meta(description=reason)


class UsualFields(GenerationRequest):
    """Fields of vLLM and SGLang that their routers and clients send at usual values, which are accepted.

    Another value is refused by name, with the reason. A `bool` is accepted either way, and changes
    no answer.
    """

    # vLLM's.
    skip_special_tokens: Annotated[Literal[True] | None, explain("No text shows control tokens here")] = None
    spaces_between_special_tokens: bool | None = None  # there are none in a text
    use_beam_search: Annotated[
        Literal[False] | None, explain("Completions are sampled here, not searched for: use n")
    ] = None
    length_penalty: Annotated[
        Literal[1] | None, explain("It belongs to beam search, which there is none of here")
    ] = None
    bad_words: Annotated[EmptyList | None, explain("Use logit_bias, or structured_outputs")] = None
    priority: Annotated[
        Literal[0] | None, explain("Requests have their turn in the order in which they came")
    ] = None
    include_reasoning: Annotated[Literal[True] | None, explain("Reasoning is part of the answer here")] = None
    thinking_token_budget: Annotated[
        Literal[-1] | None, explain("Use max_tokens: reasoning is part of the answer here")
    ] = None
    return_token_ids: Annotated[
        Literal[False] | None, explain("Send the text to /tokenize, or ask for logprobs")
    ] = None
    routed_experts_prompt_start: Annotated[
        Literal[0] | None, explain("No routing to experts is returned")
    ] = None
    return_token_offsets: bool | None = None  # read by vLLM's routes that render a prompt, and by no other
    return_mm_kwargs: bool | None = None  # likewise
    # SGLang's.
    # Reasoning stays in the answer, as in SGLang without a parser of it.
    separate_reasoning: bool | None = None
    stream_reasoning: bool | None = None  # likewise
    return_hidden_states: Annotated[
        Literal[False] | None, explain("Hidden states are only returned as embeddings")
    ] = None
    return_routed_experts: Annotated[
        Literal[False] | None,
        explain("No routing to experts is returned"),
    ] = None
    routed_experts_start_len: Annotated[
        Literal[0] | None,
        explain("No routing to experts is returned"),
    ] = None
    return_cached_tokens_details: Annotated[
        Literal[False] | None, explain("There is one cache, counted in usage")
    ] = None
    return_prompt_token_ids: Annotated[Literal[False] | None, explain("Send the prompt to /tokenize")] = None
    return_meta_info: Annotated[Literal[False] | None, explain("Ask for logprobs, or read usage")] = None


for _name, _hint in get_type_hints(UsualFields, include_extras=True).items():
    _notes = [note for note in get_args(_hint) if isinstance(note, Meta)]
    if _notes:
        UNSUPPORTED[_name] = str(_notes[0].description)


class ApiCall[Body]:
    """One request on its way: the server's state, the HTTP request, its body, and the model that it names.

    `place`: that which it reserved. `content`: the bytes of its body, which count while its text
    becomes tokens.
    """

    body: Body
    model: ServedModel
    place: Place

    def __init__(self, state: ServerState, http: Request) -> None:
        self.state = state
        self.http = http
        self.content = bytearray()

    def uncount_bytes(self) -> None:
        """No longer counts the bytes of the body."""
        self.state.admission.remove_bytes(len(self.content))

    async def read(self, kind: type[Body]) -> None:
        """Reads the JSON body as `kind`. Raises ApiError, which names the field at fault, and ClientGone."""
        _check_headers(self.http)
        await self._receive()
        body: Any
        if len(self.content) <= INLINE_BYTES:
            body = _decode(self.content, kind)
        else:
            body = await asyncio.to_thread(_decode, self.content, kind)
        self.body = body
        self.model = self.state.find_model(body.model)

    async def _receive(self) -> None:
        try:
            async with asyncio.timeout(BODY_SECONDS):
                more = True
                while more:
                    part = await self.http.receive()
                    if part["type"] == "http.disconnect":
                        raise ClientGone
                    data = part.get("body", b"")
                    more = part.get("more_body", False)
                    if len(self.content) + len(data) > MAX_BYTES:  # counted: Content-Length is only a promise
                        raise _too_large()
                    self.state.admission.add_bytes(len(data))
                    self.content += data
        except TimeoutError:
            message = f"The body did not come within {BODY_SECONDS:.0f} s."
            raise ApiError(408, message, headers={"Connection": "close"}) from None


def _decode(content: bytearray, kind: Any) -> Any:
    try:
        try:
            return msgspec.json.decode(content, type=kind)
        except msgspec.ValidationError as error:
            if "got `float`" not in str(error) and not UNKNOWN_FIELD.fullmatch(str(error)):
                raise
        return _convert(_integral(msgspec.json.decode(content)), kind)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from None
    except RecursionError:
        message = "The body is nested too deeply."
    except UnicodeDecodeError as error:
        message = f"The body is not UTF-8: {error.reason}."
    except msgspec.DecodeError as error:
        message = f"The body is not JSON: {error}."
        if re.search(rb"\\ud[89a-f]", content, re.I):  # which msgspec takes for text that was cut
            message += " Half of a surrogate pair alone is no text."
    raise ApiError(400, message)


def _convert(value: Any, kind: Any) -> Any:
    """Returns a decoded body as `kind`, without the unknown fields that are null.

    Changes `value`. Clients and routers write as null the fields that nobody set, those of their
    next version too. Raises msgspec.ValidationError.
    """
    for _ in range(MAX_NULL_FIELDS):
        try:
            return msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            if not _remove_null(value, str(error)):
                raise
    return msgspec.convert(value, kind)


# msgspec's sentence: the field, and the path to its object, such as `.messages[1]`.
UNKNOWN_FIELD = re.compile(r"Object contains unknown field `(.*?)`(?: - at `\$(.*?)`)?", re.S)


def _remove_null(value: Any, problem: str) -> bool:
    """Removes the unknown field that msgspec's sentence names, where it is null; returns whether it was so.

    It is removed from all items of a list at once, since the body is checked once more after each
    removal.
    """
    match = UNKNOWN_FIELD.fullmatch(problem)
    if not match:
        return False
    field, path = match.groups()
    objects = [value]
    for name in re.findall(r"\.(\w+)|\[[^\]]*\]", path or ""):
        objects = list(itertools.chain.from_iterable(_inner(each, name) for each in objects))
    found = [each for each in objects if isinstance(each, dict) and each.get(field, "") is None]
    for each in found:
        del each[field]
    return bool(found)


def _inner(value: Any, name: str) -> list[Any]:
    """Returns the field of that name of an object, or without a name all items of a list or an object."""
    if isinstance(value, dict):
        if not name:
            return list(value.values())
        return [value[name]] if name in value else []
    if isinstance(value, list) and not name:
        return value
    return []


def _integral(value: Any) -> Any:
    """Returns the value with 5.0 as 5: in JSON, and to some languages' clients, they are one number."""
    if isinstance(value, dict):
        return {name: _integral(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_integral(inner) for inner in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _check_headers(http: Request) -> None:
    # Ollama asks for no type, and its clients send any: curl's -d that of a form, litellm's proxy
    # `application/octet-stream`, fetch `text/plain`. A page of another site can send some of them
    # too, but not without its Origin, which the guard refuses.
    takes_any = http.scope["state"]["path"].startswith("/api/")
    kind, _, parameters = http.headers.get("content-type", "").partition(";")
    is_json = takes_any or kind.strip().lower() == "application/json"
    charset = re.search(r"charset\s*=\s*\"?([^\s;\"]+)", parameters.lower())
    if not is_json or (charset and charset[1] not in ("utf-8", "utf8", "us-ascii")):
        raise ApiError(
            415, "The body must be JSON in UTF-8, sent with the header `Content-Type: application/json`."
        )
    if http.headers.get("content-encoding", "").strip().lower() not in ("", "identity"):
        raise ApiError(415, "The body must not be compressed: send it without a Content-Encoding.")
    if content_length(http) > MAX_BYTES:
        raise _too_large()


def content_length(http: Request) -> int:
    """Returns the announced bytes of the body, 0 without; h11 has seen that it is a number."""
    return int(http.headers.get("content-length", 0))


def _too_large() -> ApiError:
    return ApiError(413, f"The body may have at most {MAX_BYTES:,} bytes.")


def _invalid(text: str) -> ApiError:
    """Returns the error for msgspec's sentence, as "Expected `int`, got `str` - at `$.n`" of a field n."""
    match = re.search(r" - at (?:`key` in )?`\$(.*?)`$", text)
    problem = text
    where = ""
    if match:
        problem = text[: match.start()]
        where = match[1].lstrip(".")
    field = re.fullmatch(r"Object (?:contains unknown|missing required) field `(.*)`", problem, re.S)
    param = ".".join(filter(None, (where, field and field[1])))
    code = "invalid_value"
    if field:
        code = "unknown_parameter" if "unknown" in problem else "missing_required_parameter"
    named = [*re.findall(r"\w+", param), *re.findall(r"enum value '(\w+?)(?:_\d{8})?'", problem)]
    why = next((f" {UNSUPPORTED[name]}." for name in named if name in UNSUPPORTED), "")
    shown = _short(param)
    message = f"{shown or 'The body'}: {_short(problem, 300)}.{why}"
    return ApiError(400, message, param=shown or None, code=code)


def _short(text: str, length: int = 80) -> str:
    return text if len(text) <= length else text[:length] + "..."


def json_reply(
    value: msgspec.Struct, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    return Response(msgspec.json.encode(value), status, headers, media_type="application/json")
