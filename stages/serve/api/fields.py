"""Types of the fields of bodies that dialects share.

An unknown field is refused by name unless it is null, which asks for nothing; and so is a value
that cannot be granted, for an answer that silently lacks it is worse than none. Fields that change
no answer (IGNORED) are accepted, and named in the reply's header X-Ignored-Fields; so are unknown
options of Ollama's.
"""

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from engine.errors import InvalidField
from engine.inference.request import RANGES

MAX_PROMPTS = 64
MAX_STOPS = 16
MAX_IDS = 2**18  # more than any context holds

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
