"""Types of the bodies of replies, in OpenAI's form."""

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from stages.serve.state import Status

Reason = Literal["stop", "length"]


class ReplyFields(msgspec.Struct, kw_only=True):
    """The fields of all replies and chunks with completions."""

    id: str
    created: int
    model: str
    system_fingerprint: str


class CachedTokens(msgspec.Struct):
    """Tokens of the prompt that the prefix cache held."""

    cached_tokens: int


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


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
    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct):
    index: int
    message: ReplyMessage
    finish_reason: Reason
    logprobs: ChatLogProbs | None = None


class ChatReply(ReplyFields, kw_only=True):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage


class Delta(msgspec.Struct):
    """The new part of the assistant's message."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct):
    index: int
    delta: Delta
    finish_reason: Reason | None = None
    logprobs: ChatLogProbs | None = None


class ChatChunk(ReplyFields, kw_only=True):
    """One `data:` of a stream."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET


class CompletionLogProbs(msgspec.Struct):
    """Lists of one length: tokens, log-probabilities, the most probable in their place, and the offsets in the text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
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
    usage: Usage | UnsetType | None = UNSET


class DefaultSampling(msgspec.Struct):
    """The sampling of a request that leaves these fields out. They have the same name and meaning in SamplingParams."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float


class ModelCard(msgspec.Struct, kw_only=True):
    """The served model. `max_model_len`: tokens of prompt and completion together; `price_per_hour`: dollars."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "thrice"
    root: str
    max_model_len: int
    price_per_hour: float | None = None
    default_sampling: DefaultSampling


class ModelList(msgspec.Struct):
    data: list[ModelCard]
    object: Literal["list"] = "list"


class TokenizeReply(msgspec.Struct):
    """The reply of POST /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]


class DetokenizeReply(msgspec.Struct):
    """The reply of POST /detokenize."""

    prompt: str


class Health(msgspec.Struct):
    """The reply of GET /health: whether requests are answered, or why not.

    `long_texts_ready`: whether the programs for texts over 512 tokens are there too; such a text waits for them.
    """

    status: Status
    long_texts_ready: bool
    running: int
    waiting: int
    compiles_after_ready: int
    seconds_since_tick: float


class Live(msgspec.Struct):
    """The reply of GET /live: the process runs."""

    status: Literal["ok"] = "ok"


class Attestation(msgspec.Struct, kw_only=True):
    """One SHA-256 over all weights, at load and now."""

    object: Literal["attestation"] = "attestation"
    algorithm: Literal["sha256"] = "sha256"
    digest: str
    digest_at_load: str
    unchanged: bool
    loaded_at: int
    checked_at: int
