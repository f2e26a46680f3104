"""POST /v1/score: the log-probabilities of given answers."""

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import Meta
from starlette.types import ASGIApp

from engine.errors import InvalidField
from stages.serve.api.chat import Messages
from stages.serve.api.choices import ReplyUsage, reply_usage
from stages.serve.api.fields import MAX_IDS, AnswerRequest, TokenId, prompt_texts
from stages.serve.api.generation import MAX_COMPLETIONS, Generation, choices_of
from stages.serve.api.jobs import ChatPrompt, TextPrompts, make_scored
from stages.serve.api.requests import ApiCall
from stages.serve.api.writer import Piece, Usage

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
        choices_of(call, requests),
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
