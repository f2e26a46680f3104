"""POST /v1/chat/completions: answers a conversation."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

from msgspec import UNSET
from starlette.requests import Request

from engine.inference.request import LogProb
from engine.text.tokenizer import Tokenizer
from stages.serve.api import replies
from stages.serve.api.body import read_body
from stages.serve.api.event_stream import QUIET
from stages.serve.api.generation import Generation, Piece, generate
from stages.serve.api.requests import ChatRequest, Message
from stages.serve.errors import ApiError
from stages.serve.state import ServerState
from stages.serve.tokenize import token_text


async def chat_completions(http: Request) -> Any:
    state: ServerState = http.app.state.server
    state.check_ready()
    body = await read_body(http, ChatRequest)
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs is given without logprobs being true.", param="top_logprobs")
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise ApiError(
            400, "max_completion_tokens is given beside max_tokens, its older name; one says it.", param="max_completion_tokens"
        )

    async def encode() -> list[list[int]]:
        return [await state.tokenizer.encode_chat(template_messages(body.messages))]

    return await generate(
        http, body, ChatWriter(state, body), body.n or 1, "messages", encode, body.max_completion_tokens or body.max_tokens,
        (body.top_logprobs or 0) if body.logprobs else None, state.stop_token_ids | state.tokenizer.chat_ends,
    )  # fmt: skip


def template_messages(messages: list[Message]) -> list[dict[str, str]]:
    """Returns roles and texts as a chat template takes them; it knows a developer as the system."""
    return [
        {"role": "system" if message.role == "developer" else message.role, "content": message.text} for message in messages
    ]


class ChatWriter:
    """Writes a generation as chat completions in OpenAI's form."""

    def __init__(self, state: ServerState, body: ChatRequest) -> None:
        self._tokenizer, self._strips_space = state.tokenizer.tokenizer, state.tokenizer.strips_space
        self._wants_logprobs, self._n = bool(body.logprobs), body.n or 1
        self._wants_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._head = state.reply_head("chatcmpl")

    def reply(self, choices: Sequence[Piece], usage: replies.Usage) -> replies.ChatReply:
        written = [
            replies.ChatChoice(index, replies.ReplyMessage(self._stripped(text)), reason, self._logprobs(logprobs))  # type: ignore[arg-type]
            for index, text, logprobs, reason in choices
        ]
        return replies.ChatReply(**self._head, choices=written, usage=usage)

    async def chunks(self, generation: Generation) -> AsyncIterator[replies.ChatChunk | None]:
        begun: set[int] = set()  # choices that have text
        for index in range(self._n):
            yield self._chunk(replies.ChatChunkChoice(index, replies.Delta("assistant", "")))
        async for piece in generation.pieces(QUIET):
            if piece is None:
                yield None
                continue
            text = piece.text if piece.choice in begun else self._stripped(piece.text)
            if piece.text:
                begun.add(piece.choice)
            if text or piece.logprobs:
                delta = replies.Delta(content=text) if text else replies.Delta()
                yield self._chunk(replies.ChatChunkChoice(piece.choice, delta, None, self._logprobs(piece.logprobs)))
            if piece.finish_reason:
                yield self._chunk(replies.ChatChunkChoice(piece.choice, replies.Delta(), piece.finish_reason))
        if self._wants_usage:
            yield self._chunk(usage=generation.usage)

    def _chunk(self, *choices: replies.ChatChunkChoice, usage: replies.Usage | None = None) -> replies.ChatChunk:
        return replies.ChatChunk(**self._head, choices=list(choices), usage=usage if self._wants_usage else UNSET)

    def _stripped(self, text: str) -> str:
        """Returns the beginning of a text without the space that follows the name a plain template ends with."""
        return text.removeprefix(" ") if self._strips_space else text

    def _logprobs(self, logprobs: list[LogProb]) -> replies.ChatLogProbs | None:
        return (
            replies.ChatLogProbs([token_logprob(self._tokenizer, each) for each in logprobs]) if self._wants_logprobs else None
        )


def token_logprob(tokenizer: Tokenizer, logprob: LogProb) -> replies.TokenLogProb:
    """Returns a token's log-probability, and those of the most probable tokens in its place, in OpenAI's form."""
    text, value = token_text(tokenizer, logprob.token)
    top = []
    for token, nats in logprob.top:
        top_text, top_bytes = token_text(tokenizer, token)
        top.append(replies.TopLogProb(top_text, nats, list(top_bytes)))
    return replies.TokenLogProb(text, logprob.logprob, list(value), top)
