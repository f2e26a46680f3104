"""POST /v1/score: how probable each of several given answers to a prompt is."""

import math
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from stages.serve.api.completions import Messages, ReplyUsage, reply_usage
from stages.serve.api.generation import (
    MAX_COMPLETIONS,
    Answer,
    Generation,
    Piece,
    Usage,
    chat_prompts,
    make_scored,
    text_prompts,
)
from stages.serve.api.requests import MAX_IDS, AnswerRequest, Call, TokenId
from stages.serve.errors import ApiError

Text = Annotated[str, Meta(min_length=1)] | Annotated[list[TokenId], Meta(min_length=1, max_length=MAX_IDS)]


class ScoreRequest(AnswerRequest, kw_only=True):
    """POST /v1/score. Each candidate goes on with the prompt, or is the assistant's answer to the messages."""

    candidates: Annotated[list[Text], Meta(min_length=1, max_length=MAX_COMPLETIONS)]
    prompt: Text | None = None
    messages: Messages | None = None

    @property
    def choices(self) -> int:
        return len(self.candidates)


class Score(msgspec.Struct, kw_only=True):
    """A candidate's log-probability, nats, the sum of its tokens'; `share`: its probability among the candidates."""

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


async def score(call: Call[ScoreRequest]) -> Answer[ScoreReply]:
    """How probable given answers are.

    The prefix cache holds the prompt for all but the first.
    """
    body, tokenizer = call.body, call.state.tokenizer
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "Either prompt or messages is to be given.", param="prompt")
    turns = [each.turn for each in body.messages or ()]
    prompts = await (chat_prompts(call, turns) if turns else text_prompts(call, 1))
    space = " " if body.messages and tokenizer.strips_space else ""
    texts = [space + each for each in body.candidates if isinstance(each, str)]
    encoded = iter(await tokenizer.encode(texts, continued=True) if texts else ())
    tokens = (next(encoded) if isinstance(each, str) else each for each in body.candidates)
    requests = [make_scored(call, prompts.tokens[0], candidate, "candidates") for candidate in tokens]

    def reply(pieces: list[Piece], usage: Usage) -> ScoreReply:
        each = [[logprob.logprob for logprob in piece.logprobs] for piece in pieces]
        sums = list(map(math.fsum, each))
        weights = [math.exp(logprob - max(sums)) for logprob in sums]
        data = [
            Score(index=index, logprob=logprob, share=weight / sum(weights), token_logprobs=own)
            for index, (logprob, weight, own) in enumerate(zip(sums, weights, each))
        ]
        name, fingerprint, _ = call.model
        return ScoreReply(model=name, system_fingerprint=fingerprint, data=data, usage=reply_usage(usage))

    return Generation(call, prompts, requests, reply, len(requests))
