"""Routes that read texts and write none: POST /v1/score, /v1/embeddings, /tokenize and /detokenize."""

import base64
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import UNSET, Meta, UnsetType
from starlette.types import ASGIApp

from engine.errors import InvalidField
from engine.inference.request import Request, SamplingParams
from engine.text.detokenizer import CompletionText
from stages.serve.api.chat import Messages, Tools, chat_prompt
from stages.serve.api.choices import ReplyUsage, reply_usage
from stages.serve.api.fields import (
    MAX_IDS,
    AnswerRequest,
    ModelRequest,
    Texts,
    TokenId,
    TokenIds,
    prompt_texts,
)
from stages.serve.api.generation import MAX_COMPLETIONS, Choice, Generation, Piece, Usage
from stages.serve.api.jobs import ChatPrompt, TextPrompts, check_ids, make_request, make_scored
from stages.serve.api.requests import ApiCall
from stages.serve.tokenizer_pool import context_overflow
from stages.serve.tools import tool_use

TextOrTokens = (
    Annotated[str, Meta(min_length=1)] | Annotated[list[TokenId], Meta(min_length=1, max_length=MAX_IDS)]
)


class ScoreRequest(AnswerRequest, kw_only=True):
    """POST /v1/score. Each candidate goes on with the prompt, or is the answer to the messages."""

    candidates: Annotated[list[TextOrTokens], Meta(min_length=1, max_length=MAX_COMPLETIONS)]
    prompt: TextOrTokens | None = None
    messages: Messages | None = None

    @property
    def choices(self) -> int:
        return len(self.candidates)

    @property
    def context(self) -> ChatPrompt | TextPrompts:
        """The conversation, or the text, that a candidate goes on with. Raises InvalidField."""
        if (self.prompt is None) == (self.messages is None):
            raise InvalidField("prompt", "Either prompt or messages is to be given.")
        if self.messages is not None:
            return ChatPrompt("messages", [message.turn for message in self.messages])
        return TextPrompts("prompt", prompt_texts("prompt", self.prompt, 1))


class Score(msgspec.Struct, kw_only=True):
    """A candidate's log-probability, nats, the sum of its tokens'.

    `share`: its probability among the candidates.
    """

    index: int
    logprob: float
    share: float
    token_logprobs: list[float]


class ScoreReply(msgspec.Struct, kw_only=True):
    object: Literal["list"] = "list"
    model: str
    system_fingerprint: str
    data: list[Score]
    usage: ReplyUsage


async def score(call: ApiCall[ScoreRequest]) -> ASGIApp:
    """How probable given answers are.

    The prefix cache holds the prompt for all but the first.
    """
    body = call.body
    context = body.context
    prompts = await context.encode(call.state)
    candidates = await _candidate_tokens(call)
    requests = []
    for tokens in candidates:
        requests.append(
            make_scored(call, prompts.tokens[0], tokens, prompt_field=context.field, field="candidates")
        )
    # Not the call in the reply, which would keep it and its bytes until all is collected.
    name = call.model.name
    fingerprint = call.model.fingerprint

    def reply(pieces: list[Piece], usage: Usage) -> ScoreReply:
        data = _scores(pieces)
        return ScoreReply(model=name, system_fingerprint=fingerprint, data=data, usage=reply_usage(usage))

    return Generation(
        call,
        _choices(call, requests),
        reply,
        repeats=len(requests),
        passages=prompts.passages,
        ignored=body.ignored,
    )


async def _candidate_tokens(call: ApiCall[ScoreRequest]) -> list[Sequence[int]]:
    """Returns the tokens of the candidates, as they go on with the prompt. Raises InvalidField."""
    body = call.body
    tokenizer = call.state.tokenizer
    space = " " if body.messages and tokenizer.strips_space else ""
    texts = [space + each for each in body.candidates if isinstance(each, str)]
    tokens_of_texts: Iterator[list[int]] = iter(())
    if texts:
        tokens_of_texts = iter(await tokenizer.encode(texts, continued=True))
    candidates: list[Sequence[int]] = []
    for each in body.candidates:
        candidates.append(next(tokens_of_texts) if isinstance(each, str) else each)
    return candidates


def _scores(pieces: list[Piece]) -> list[Score]:
    """Returns the scores of all candidates, a piece each."""
    token_logprobs = [[each.logprob for each in piece.logprobs] for piece in pieces]
    sums = list(map(math.fsum, token_logprobs))
    weights = [math.exp(logprob - max(sums)) for logprob in sums]  # no overflow: the largest is 1
    total = sum(weights)
    scores = []
    for index, logprob in enumerate(sums):
        share = weights[index] / total
        score = Score(index=index, logprob=logprob, share=share, token_logprobs=token_logprobs[index])
        scores.append(score)
    return scores


def _choices(call: ApiCall, requests: Sequence[Request]) -> list[Choice]:
    """Returns the choices of requests that are not asked for a text."""
    tokenizer = call.state.tokenizer.tokenizer
    return [
        Choice(index, request, CompletionText(tokenizer.stream())) for index, request in enumerate(requests)
    ]


class EmbeddingsRequest(AnswerRequest, kw_only=True):
    """POST /v1/embeddings. `input`: a text, several, a list of token ids, or several such lists.

    `dimensions`: how many of an embedding's first numbers are wanted; they are scaled to length 1
    again.
    """

    input: Texts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1)] | None = None

    @property
    def choices(self) -> int:
        return len(prompt_texts("input", self.input, MAX_COMPLETIONS))


class Embedding(msgspec.Struct):
    """`embedding`: numbers, or in base64 the bytes of little-endian float32."""

    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class EmbeddingsReply(msgspec.Struct, kw_only=True):
    object: Literal["list"] = "list"
    model: str
    data: list[Embedding]
    usage: dict[str, int]


async def create_embedding(call: ApiCall[EmbeddingsRequest]) -> ASGIApp:
    """Texts as vectors."""
    body = call.body
    model = call.model.name
    in_base64 = body.encoding_format == "base64"

    def encode(vector: Any) -> list[float] | str:
        return base64.b64encode(vector.tobytes()).decode() if in_base64 else vector.tolist()

    def reply(vectors: list[Any], usage: Usage) -> EmbeddingsReply:
        data = [Embedding(index, encode(vector)) for index, vector in enumerate(vectors)]
        counts = {"prompt_tokens": usage.prompt, "total_tokens": usage.prompt}
        return EmbeddingsReply(model=model, data=data, usage=counts)

    prompts = TextPrompts("input", prompt_texts("input", body.input, MAX_COMPLETIONS))
    return await embed(call, prompts, reply, body.ignored, body.dimensions)


async def embed(
    call: ApiCall,
    prompts: TextPrompts,
    reply: Callable[[list[Any], Usage], msgspec.Struct],
    ignored: Sequence[str],
    dimensions: int | None = None,
    *,
    truncate: bool = False,
) -> Generation:
    """Responds with what `reply` makes of the embeddings of texts: vectors of float32, of length 1.

    `ignored`: names of the body's fields that change nothing. `dimensions`: how many of an
    embedding's first numbers are wanted. With `truncate` the end of a text that is longer than the
    context is left out; without it such a text is refused. Raises ApiError and InvalidField.
    """
    capacity = call.state.engine.capacity
    width = call.state.engine.cfg.width
    if dimensions and dimensions > width:
        raise InvalidField("dimensions", f"An embedding of this model has {width} dimensions, not more.")
    texts = (await prompts.encode(call.state)).tokens
    if truncate:
        texts = [tokens[: capacity - 1] for tokens in texts]
    longest = max(map(len, texts))
    if longest >= capacity:
        raise context_overflow(longest, capacity, prompts.field)
    sampling = SamplingParams(max_tokens=1)
    requests = [make_request(call, prompts.field, tokens, sampling, embed=True) for tokens in texts]

    def unit(embedding: Any) -> Any:
        cut = embedding[:dimensions]
        return (cut / max(np.linalg.norm(cut), np.finfo(np.float32).tiny)).astype("<f4")

    def reply_to(pieces: list[Piece], usage: Usage) -> msgspec.Struct:
        return reply([unit(piece.embedding) for piece in pieces], usage)

    return Generation(call, _choices(call, requests), reply_to, ignored=ignored)


class TokenizeRequest(ModelRequest):
    """POST /tokenize: a text as /v1/completions reads it, or messages as /v1/chat/completions does.

    `add_special_tokens`, true by default, is about a text; those of a conversation are its
    template's.
    """

    prompt: str | UnsetType = UNSET
    messages: Messages | UnsetType = UNSET
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | UnsetType = UNSET
    tools: Tools = None


class TokenizeReply(msgspec.Struct):
    count: int
    max_model_len: int
    tokens: Sequence[int]


class DetokenizeRequest(ModelRequest, kw_only=True):
    tokens: TokenIds


class DetokenizeReply(msgspec.Struct):
    prompt: str


class TokenizerInfo(msgspec.Struct):
    """By this lm-eval finds that it may use the server's tokenizer."""

    eos_token: str
    bos_token: str | None
    chat_template: str


async def tokenizer_info(call: ApiCall) -> TokenizerInfo:
    """The names of special tokens, and the chat template."""
    pool = call.state.tokenizer
    names = pool.tokenizer.special_names
    return TokenizerInfo(names["eos_token"], names.get("bos_token"), pool.template)


async def tokenize(call: ApiCall[TokenizeRequest]) -> TokenizeReply:
    """The tokens of a text, or of a conversation."""
    state = call.state
    body = call.body
    if (body.prompt is UNSET) == (body.messages is UNSET):
        raise InvalidField("prompt", "Either prompt or messages is to be given.")
    if isinstance(body.messages, list):
        if body.add_special_tokens is not UNSET:
            others = "the special tokens of messages are those of the chat template"
            message = f"add_special_tokens is about a prompt; {others}."
            raise InvalidField("add_special_tokens", message)
        prompt = chat_prompt(
            body.messages,
            tool_use([tool.function for tool in body.tools or ()]),
            begins=body.add_generation_prompt,
            goes_on=body.continue_final_message,
        )
        (tokens,) = (await prompt.encode(state)).tokens
    else:
        if body.add_generation_prompt is not None or body.continue_final_message is not None:
            message = "add_generation_prompt and continue_final_message are about messages, not a prompt."
            raise InvalidField("continue_final_message", message)
        (tokens,) = await state.tokenizer.encode(
            [str(body.prompt)], special=body.add_special_tokens is not False
        )
    return TokenizeReply(len(tokens), state.engine.capacity, tokens)


async def detokenize(call: ApiCall[DetokenizeRequest]) -> DetokenizeReply:
    """The text of tokens."""
    tokens = call.body.tokens
    check_ids("tokens", tokens, call.state.engine.cfg.vocab)
    return DetokenizeReply(await call.state.tokenizer.decode(tokens))
