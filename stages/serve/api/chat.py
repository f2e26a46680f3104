"""POST /v1/chat/completions."""

import time
from collections.abc import AsyncIterator
from typing import Any

from msgspec import UNSET
from starlette.requests import Request

from engine.inference.request import LogProb
from engine.text.tokenizer import Tokenizer
from stages.serve.api.body import read
from stages.serve.api.event_stream import QUIET
from stages.serve.api.generate import answered
from stages.serve.api.generation import Answer
from stages.serve.api.reply_schema import (
    Answered,
    ChatChoice,
    ChatChunk,
    ChatLogProbs,
    ChatPiece,
    ChatReply,
    Delta,
    TokenLogProb,
    TopLogProb,
    new_id,
)  # fmt: skip
from stages.serve.api.request_schema import ChatRequest, Said
from stages.serve.errors import Refused
from stages.serve.state import Served
from stages.serve.tokenize import spoken


async def chat(request: Request) -> Any:
    """Answers a conversation."""
    served: Served = request.app.state.served
    arrived = time.monotonic()
    served.check_ready()
    body = await read(request, ChatRequest)
    served.check_model(body.model)
    if body.top_logprobs is not None and not body.logprobs:
        raise Refused(400, "top_logprobs is given without logprobs being true.", param="top_logprobs")
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise Refused(
            400, "max_completion_tokens is given beside max_tokens, its older name; one says it.", param="max_completion_tokens"
        )
    messages, end = conversation(body.messages), served.prompts.answers_end

    async def prompts() -> list[list[int]]:
        return [await served.prompts.of_chat(messages)]

    return await answered(
        request, body, _Writer(served, body), prompts, body.n or 1, most=body.max_completion_tokens or body.max_tokens,
        ends=served.ends if end is None else served.ends | {end},
        logprobs=(body.top_logprobs or 0) if body.logprobs else None, param="messages", arrived=arrived,
    )  # fmt: skip


def conversation(messages: list[Said]) -> list[dict[str, str]]:
    """Roles and texts as a template takes them; it knows a developer as the system."""
    return [
        {"role": "system" if message.role == "developer" else message.role, "content": message.text} for message in messages
    ]


class _Writer:
    """Pieces of an answer in OpenAI's words."""

    def __init__(self, served: Served, body: ChatRequest) -> None:
        self._tokenizer = served.prompts.tokenizer
        self._indented = served.prompts.indented
        self._wants = bool(body.logprobs)
        self._usage = bool(body.stream_options and body.stream_options.include_usage)
        self._n = body.n or 1
        self.id, self.created = new_id("chatcmpl")
        self.model, self.fingerprint = served.name, served.fingerprint

    async def reply(self, answer: Answer) -> ChatReply:
        texts, drawn = [""] * self._n, [list[LogProb]() for _ in range(self._n)]
        reasons: list[Any] = [None] * self._n
        async for piece in answer.pieces():
            if piece:
                texts[piece.place] += piece.text
                drawn[piece.place] += piece.logprobs
                reasons[piece.place] = piece.reason
        choices = [
            ChatChoice(index, Answered(self._begun(texts[index], "")), reasons[index], self._told(drawn[index]))
            for index in range(self._n)
        ]
        return ChatReply(
            id=self.id, created=self.created, model=self.model, system_fingerprint=self.fingerprint, choices=choices,
            usage=answer.usage,
        )  # fmt: skip

    async def chunks(self, answer: Answer) -> AsyncIterator[ChatChunk | None]:
        said = [""] * self._n
        for index in range(self._n):
            yield self._chunk([ChatPiece(index, Delta("assistant", ""))])
        async for piece in answer.pieces(QUIET):
            if piece is None:
                yield None
                continue
            text = self._begun(piece.text, said[piece.place])
            said[piece.place] += piece.text
            delta = Delta(content=text) if text else Delta()
            if text or piece.logprobs:
                yield self._chunk([ChatPiece(piece.place, delta, None, self._told(piece.logprobs))])
            if piece.reason:
                yield self._chunk([ChatPiece(piece.place, Delta(), piece.reason)])
        if self._usage:
            yield self._chunk([], answer.usage)

    def _chunk(self, choices: list[ChatPiece], usage: Any = None) -> ChatChunk:
        return ChatChunk(
            id=self.id, created=self.created, model=self.model, system_fingerprint=self.fingerprint, choices=choices,
            usage=usage if self._usage else UNSET,
        )  # fmt: skip

    def _begun(self, text: str, before: str) -> str:
        """A text without the space with which a word follows the name that a plain template ends with."""
        return text[1:] if self._indented and not before and text.startswith(" ") else text

    def _told(self, drawn: list[LogProb]) -> ChatLogProbs | None:
        return ChatLogProbs([told(self._tokenizer, each) for each in drawn]) if self._wants else None


def told(tokenizer: Tokenizer, drawn: LogProb) -> TokenLogProb:
    """A token's log-probability, and those of the most probable ones, in OpenAI's words."""
    name, value = spoken(tokenizer, drawn.token)
    top = []
    for token, logprob in drawn.top:
        other, other_value = spoken(tokenizer, token)
        top.append(TopLogProb(other, logprob, list(other_value)))
    return TokenLogProb(name, drawn.logprob, list(value), top)
