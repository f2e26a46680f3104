"""POST /v1/completions: texts or token ids to continue."""

import time
from collections.abc import AsyncIterator
from typing import Any

from msgspec import UNSET
from starlette.requests import Request

from engine.inference.request import LogProb
from stages.serve.api.body import read
from stages.serve.api.event_stream import QUIET
from stages.serve.api.generate import answered
from stages.serve.api.generation import Answer, Piece
from stages.serve.api.reply_schema import TextChoice, TextLogProbs, TextReply, new_id
from stages.serve.api.request_schema import MOST_PROMPTS, CompletionRequest
from stages.serve.errors import Refused
from stages.serve.state import Served
from stages.serve.tokenize import batched_ids, spoken

MOST_TOKENS = 16  # when it is not said how many, as OpenAI has it


async def completions(request: Request) -> Any:
    """Continues each prompt `n` times; the choices of a prompt follow each other."""
    served: Served = request.app.state.served
    arrived = time.monotonic()
    served.check_ready()
    body = await read(request, CompletionRequest)
    served.check_model(body.model)
    ids = batched_ids(body.prompt)
    texts: list[str] = [body.prompt] if isinstance(body.prompt, str) else body.prompt  # type: ignore[assignment]
    count = len(texts if ids is None else ids)
    if count > MOST_PROMPTS:
        raise Refused(400, f"prompt holds {count} prompts; at most {MOST_PROMPTS} are taken at once.", param="prompt")
    many = count * (body.n or 1)

    async def prompts() -> list[list[int]]:
        return await served.prompts.of_texts(texts) if ids is None else ids

    return await answered(
        request, body, _Writer(served, body, many), prompts, many, most=body.max_tokens or MOST_TOKENS, ends=served.ends,
        logprobs=body.logprobs, param="prompt", arrived=arrived,
    )  # fmt: skip


class _Writer:
    """Pieces of completions in OpenAI's words."""

    def __init__(self, served: Served, body: CompletionRequest, count: int) -> None:
        self._tokenizer = served.prompts.tokenizer
        self._logprobs = body.logprobs
        self._usage = bool(body.stream_options and body.stream_options.include_usage)
        self._offsets = [0] * count
        self._streams = [self._tokenizer.stream() for _ in range(count)]
        self.id, self.created = new_id("cmpl")
        self.model, self.fingerprint = served.name, served.fingerprint

    async def reply(self, answer: Answer) -> TextReply:
        count = len(self._offsets)
        texts, drawn = [""] * count, [list[LogProb]() for _ in range(count)]
        reasons: list[Any] = [None] * count
        async for piece in answer.pieces():
            if piece:
                texts[piece.place] += piece.text
                drawn[piece.place] += piece.logprobs
                reasons[piece.place] = piece.reason
        choices = [TextChoice(index, texts[index], reasons[index], self._told(index, drawn[index])) for index in range(count)]
        return self._reply(choices, answer.usage)

    async def chunks(self, answer: Answer) -> AsyncIterator[TextReply | None]:
        async for piece in answer.pieces(QUIET):
            if piece is None:
                yield None
            elif piece.text or piece.logprobs or piece.reason:
                yield self._reply([self._choice(piece)], None if self._usage else UNSET)
        if self._usage:
            yield self._reply([], answer.usage)

    def _choice(self, piece: Piece) -> TextChoice:
        return TextChoice(piece.place, piece.text, piece.reason, self._told(piece.place, piece.logprobs))

    def _reply(self, choices: list[TextChoice], usage: Any) -> TextReply:
        return TextReply(
            id=self.id,
            created=self.created,
            model=self.model,
            system_fingerprint=self.fingerprint,
            choices=choices,
            usage=usage,
        )

    def _told(self, index: int, drawn: list[LogProb]) -> TextLogProbs | None:
        if self._logprobs is None:
            return None
        offsets = []
        for each in drawn:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(self._streams[index].push(each.token))  # a part of a character stands where that will
        name = lambda token: spoken(self._tokenizer, token)[0]
        top = [{name(token): logprob for token, logprob in each.top} for each in drawn] if self._logprobs else None
        return TextLogProbs([name(each.token) for each in drawn], [each.logprob for each in drawn], top, offsets)
