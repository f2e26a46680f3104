"""POST /v1/completions: continues texts or token ids."""

from typing import Any

from starlette.requests import Request

from stages.serve.api.body import read_body
from stages.serve.api.generation import Piece, Writer, generate
from stages.serve.api.replies import TextChoice, TextLogProbs, TextReply
from stages.serve.api.requests import MAX_PROMPTS, CompletionRequest
from stages.serve.errors import ApiError
from stages.serve.state import ServerState
from stages.serve.tokenize import token_text


async def completions(state: ServerState, http: Request) -> Any:
    """Continues each prompt `n` times; the choices of a prompt follow each other."""
    state.check_ready()
    body = await read_body(state, http, CompletionRequest)
    prompts: Any = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    kinds = {type(prompt) for prompt in prompts}
    if len(kinds) > 1:
        raise ApiError(400, "prompt must hold only texts, only token ids, or only lists of token ids.", param="prompt")
    if kinds == {int}:
        prompts = [prompts]
    if (count := len(prompts)) > MAX_PROMPTS:
        raise ApiError(400, f"prompt holds {count} prompts; at most {MAX_PROMPTS} are taken at once.", param="prompt")

    async def encode() -> list[list[int]]:
        return await state.tokenizer.encode(prompts) if kinds == {str} else prompts

    return await generate(
        state, http, TextWriter(state, body, count * (body.n or 1)), encode,
        max_tokens=body.max_tokens or 16, logprobs=body.logprobs, ends=state.stop_token_ids,  # 16: as OpenAI has it
    )  # fmt: skip


class TextWriter(Writer):
    prompt_field, id_prefix, reply_type, chunk_type = "prompt", "cmpl", TextReply, TextReply

    def __init__(self, state: ServerState, body: CompletionRequest, choices: int) -> None:
        super().__init__(state, body, choices)
        self._top_logprobs = body.logprobs
        self._offsets = [0] * choices
        self._streams = [self.tokenizer.stream() for _ in range(choices)]

    def choice(self, piece: Piece) -> TextChoice:
        return TextChoice(piece.choice, piece.text, piece.finish_reason, self._logprobs(piece))

    def chunk_choices(self, piece: Piece) -> list[TextChoice]:
        return [self.choice(piece)] if piece.text or piece.logprobs or piece.finish_reason else []

    def _logprobs(self, piece: Piece) -> TextLogProbs | None:
        if self._top_logprobs is None:
            return None
        offsets, logprobs = [], piece.logprobs
        for each in logprobs:
            offsets.append(self._offsets[piece.choice])  # a part of a character is where the character will be
            self._offsets[piece.choice] += len(self._streams[piece.choice].push(each.token))
        name = lambda token: token_text(self.tokenizer, token)[0]
        top = [{name(token): nats for token, nats in each.top} for each in logprobs] if self._top_logprobs else None
        return TextLogProbs([name(each.token) for each in logprobs], [each.logprob for each in logprobs], top, offsets)
