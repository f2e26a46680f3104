"""What a client is answered, in OpenAI's shapes."""

import time
import uuid
from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

Reason = Literal["stop", "length"]


class CachedTokens(msgspec.Struct):
    """Tokens of the prompt that had been computed before and were not again."""

    cached_tokens: int


class Usage(msgspec.Struct):
    """What an answer took: tokens read, tokens written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class TopLogProb(msgspec.Struct):
    """A token, how probable it was (natural logarithm), and the bytes it stands for."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogProb(TopLogProb):
    """The token that was drawn, and the most probable ones in its place."""

    top_logprobs: list[TopLogProb]


class ChatLogProbs(msgspec.Struct):
    content: list[TokenLogProb]
    refusal: None = None


class Answered(msgspec.Struct):
    """An answer whole."""

    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct):
    index: int
    message: Answered
    finish_reason: Reason
    logprobs: ChatLogProbs | None = None


class ChatReply(msgspec.Struct, kw_only=True):
    """The reply of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(msgspec.Struct):
    """What is new of an answer."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatPiece(msgspec.Struct):
    index: int
    delta: Delta
    finish_reason: Reason | None = None
    logprobs: ChatLogProbs | None = None


class ChatChunk(msgspec.Struct, kw_only=True):
    """One `data:` of a streamed POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatPiece]
    usage: Usage | UnsetType | None = UNSET


class TextLogProbs(msgspec.Struct):
    """Side by side: tokens, their log-probabilities, the most probable in their place, where each begins in the text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class TextChoice(msgspec.Struct):
    index: int
    text: str
    finish_reason: Reason | None
    logprobs: TextLogProbs | None = None


class TextReply(msgspec.Struct, kw_only=True):
    """The reply of POST /v1/completions, and one `data:` of a streamed one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage | UnsetType | None = UNSET


class ModelCard(msgspec.Struct, kw_only=True):
    """A model that is served. `max_model_len`: tokens of prompt and completion together;
    `price_per_hour`: what the machine costs, in dollars, if the server was told."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "thrice"
    root: str
    max_model_len: int
    price_per_hour: float | None = None


class ModelList(msgspec.Struct):
    """The reply of GET /v1/models."""

    data: list[ModelCard]
    object: Literal["list"] = "list"


class Tokens(msgspec.Struct):
    """The reply of POST /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]


class Text(msgspec.Struct):
    """The reply of POST /detokenize."""

    prompt: str


class Health(msgspec.Struct):
    """The reply of GET /health: whether requests are answered, and why not."""

    status: Literal["ok", "warming", "stuck", "failed", "draining"]
    running: int
    waiting: int
    compiles_after_ready: int
    seconds_since_tick: float


class Live(msgspec.Struct):
    """The reply of GET /live: the process answers."""

    status: Literal["ok"] = "ok"


class Attestation(msgspec.Struct, kw_only=True):
    """The reply of GET /v1/attestation: one SHA-256 over all weights, as it was when they were laid out and as it is now."""

    object: Literal["attestation"] = "attestation"
    algorithm: Literal["sha256"] = "sha256"
    digest: str
    digest_at_load: str
    unchanged: bool
    loaded_at: int
    checked_at: int


def new_id(kind: str) -> tuple[str, int]:
    """An id as OpenAI writes them, and the moment in Unix seconds."""
    return f"{kind}-{uuid.uuid4().hex}", int(time.time())
