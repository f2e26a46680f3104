"""POST /v1/completions: continues texts or token ids."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

from msgspec import UNSET
from starlette.requests import Request

from engine.inference.request import LogProb
from stages.serve.api.body import read_body
from stages.serve.api.event_stream import QUIET
from stages.serve.api.generation import Generation, Piece, generate
from stages.serve.api.replies import TextChoice, TextLogProbs, TextReply, Usage
from stages.serve.api.requests import MAX_PROMPTS, CompletionRequest
from stages.serve.errors import ApiError
from stages.serve.state import ServerState
from stages.serve.tokenize import token_text

DEFAULT_MAX_TOKENS = 16  # as OpenAI has it


async def completions(http: Request) -> Any:
    """Continues each prompt `n` times; the choices of a prompt follow each other."""
    state: ServerState = http.app.state.server
    state.check_ready()
    body = await read_body(http, CompletionRequest)
    texts, ids = split_prompt(body.prompt)
    count = len(texts) + len(ids)
    if count > MAX_PROMPTS:
        raise ApiError(400, f"prompt holds {count} prompts; at most {MAX_PROMPTS} are taken at once.", param="prompt")
    choices = count * (body.n or 1)

    async def encode() -> list[list[int]]:
        return ids or await state.tokenizer.encode(texts)

    return await generate(
        http, body, TextWriter(state, body, choices), choices, "prompt", encode, body.max_tokens or DEFAULT_MAX_TOKENS,
        body.logprobs, state.stop_token_ids,
    )  # fmt: skip


def split_prompt(prompt: Any) -> tuple[list[str], list[list[int]]]:
    """Returns a prompt in any of its forms as texts or as lists of token ids; one of the two is empty. Raises ApiError."""
    parts = prompt if isinstance(prompt, list) else [prompt]
    if all(isinstance(part, str) for part in parts):
        return parts, []
    if all(isinstance(part, int) for part in parts):
        return [], [parts]
    if all(isinstance(part, list) for part in parts):
        return [], parts
    raise ApiError(400, "prompt must hold only texts, only token ids, or only lists of token ids.", param="prompt")


class TextWriter:
    """Writes a generation of `choices` completions as text completions in OpenAI's form."""

    def __init__(self, state: ServerState, body: CompletionRequest, choices: int) -> None:
        self._tokenizer = state.tokenizer.tokenizer
        self._top_logprobs = body.logprobs
        self._wants_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._offsets = [0] * choices
        self._streams = [self._tokenizer.stream() for _ in range(choices)]
        self._head = state.reply_head("cmpl")

    def reply(self, choices: Sequence[Piece], usage: Usage) -> TextReply:
        return TextReply(**self._head, choices=[self._choice(piece) for piece in choices], usage=usage)

    async def chunks(self, generation: Generation) -> AsyncIterator[TextReply | None]:
        async for piece in generation.pieces(QUIET):
            if piece is None:
                yield None
            elif piece.text or piece.logprobs or piece.finish_reason:
                usage = None if self._wants_usage else UNSET
                yield TextReply(**self._head, choices=[self._choice(piece)], usage=usage)
        if self._wants_usage:
            yield self.reply([], generation.usage)

    def _choice(self, piece: Piece) -> TextChoice:
        return TextChoice(piece.choice, piece.text, piece.finish_reason, self._logprobs(piece.choice, piece.logprobs))

    def _logprobs(self, index: int, logprobs: list[LogProb]) -> TextLogProbs | None:
        if self._top_logprobs is None:
            return None
        offsets = []
        for each in logprobs:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(self._streams[index].push(each.token))  # a part of a character stands where that will
        name = lambda token: token_text(self._tokenizer, token)[0]
        top = [{name(token): nats for token, nats in each.top} for each in logprobs] if self._top_logprobs else None
        return TextLogProbs([name(each.token) for each in logprobs], [each.logprob for each in logprobs], top, offsets)
