"""POST /v1/score: how probable each of several given answers to a prompt is."""

import math
from typing import Annotated, Literal

import msgspec
from msgspec import Meta
from starlette.requests import Request as HttpRequest
from starlette.types import ASGIApp

from engine.inference.request import Request
from stages.serve.api.completions import Messages, ReplyUsage, reply_usage
from stages.serve.api.generation import MAX_COMPLETIONS, Piece, Usage, begin, chat_prompts, make_scored, text_prompts
from stages.serve.api.requests import MAX_IDS, AnswerRequest, TokenId
from stages.serve.errors import ApiError
from stages.serve.state import ServerState

Text = Annotated[str, Meta(min_length=1)] | Annotated[list[TokenId], Meta(min_length=1, max_length=MAX_IDS)]


class ScoreRequest(AnswerRequest, kw_only=True):
    """POST /v1/score. Each candidate goes on with the prompt, or is the assistant's answer to the messages."""

    candidates: Annotated[list[Text], Meta(min_length=1, max_length=MAX_COMPLETIONS)]
    prompt: Text | None = None
    messages: Messages | None = None


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


async def score(state: ServerState, http: HttpRequest, body: ScoreRequest) -> ASGIApp:
    """Scores each candidate; the prefix cache holds the prompt for all but the first."""
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "Either prompt or messages is to be given.", param="prompt")
    tokenizer, turns = state.tokenizer, [each.turn for each in body.messages or ()]
    prompts = chat_prompts(state, turns) if turns else text_prompts(state, "prompt", body.prompt, 1)

    async def make_requests() -> list[Request]:
        (prompt,) = await prompts.encode()
        texts = [each for each in body.candidates if isinstance(each, str)]
        if body.messages and tokenizer.strips_space:
            texts = [f" {text}" for text in texts]
        encoded = iter(await tokenizer.encode(texts, continued=True) if texts else ())
        requests = []
        for candidate in body.candidates:
            tokens = next(encoded) if isinstance(candidate, str) else candidate
            requests.append(make_scored(state, http, prompt, tokens, "candidates"))
        return requests

    def reply(pieces: list[Piece], usage: Usage) -> ScoreReply:
        each = [[logprob.logprob for logprob in piece.logprobs] for piece in pieces]
        sums = list(map(math.fsum, each))
        weights = [math.exp(logprob - max(sums)) for logprob in sums]
        data = [
            Score(index=index, logprob=logprob, share=weight / sum(weights), token_logprobs=own)
            for index, (logprob, weight, own) in enumerate(zip(sums, weights, each))
        ]
        name, fingerprint, _ = http.state.model
        return ScoreReply(model=name, system_fingerprint=fingerprint, data=data, usage=reply_usage(usage))

    return await begin(state, http, body, prompts, reply, make_requests, len(body.candidates))
