"""Handles POST /v1/chat/completions and /v1/completions: answers a conversation, and continues texts or token ids."""

from collections.abc import AsyncIterator, Iterator
from typing import Any

from starlette.requests import Request

from engine.inference.request import LogProb
from stages.serve.api import replies
from stages.serve.api.body import read_body
from stages.serve.api.generation import Generation, Piece, Writer, check_ready, generate
from stages.serve.api.requests import MAX_PROMPTS, ChatRequest, CompletionRequest, Message, TokenizeRequest
from stages.serve.errors import ApiError
from stages.serve.state import ServerState
from stages.serve.tokenizer_pool import token_text


async def chat_completions(state: ServerState, http: Request) -> Any:
    """Writes the assistant's next turn, `n` times."""
    check_ready(state, http)
    body = await read_body(state, http, ChatRequest)
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs is given without logprobs being true.", param="top_logprobs")
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        message = "max_completion_tokens is sent beside max_tokens, its older name: send only one of them."
        raise ApiError(400, message, param="max_completion_tokens")

    async def encode() -> list[list[int]]:
        return [await encode_messages(state, body.messages, body)]

    return await generate(
        state, http, ChatWriter(state, body), encode, max_tokens=body.max_completion_tokens or body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        stop_token_ids=state.stop_token_ids | state.tokenizer.eot_ids,
    )  # fmt: skip


async def encode_messages(state: ServerState, messages: list[Message], body: ChatRequest | TokenizeRequest) -> list[int]:
    """Returns the tokens of messages up to the assistant's next turn, or to the end of its last one if that is to go on.

    The role `developer` becomes `system`. Raises ApiError.
    """
    turns = [{"role": "system" if each.role == "developer" else each.role, "content": each.text} for each in messages]
    goes_on = body.continue_final_message is True
    if goes_on == (body.add_generation_prompt is not False):
        message = "add_generation_prompt must be false with continue_final_message true, and true without."
        raise ApiError(400, message, param="add_generation_prompt")
    if not goes_on:
        return await state.tokenizer.encode_chat(turns)
    answer = turns.pop()
    if answer["role"] != "assistant" or not turns:
        message = "continue_final_message goes on with an answer: the last message must be the assistant's, after another."
        raise ApiError(400, message, param="messages")
    return await state.tokenizer.encode_chat(turns, answer["content"])


class ChatWriter(Writer):
    """Writes the replies and chunks of a chat."""

    prompt_field, id_prefix, reply_type, chunk_type = "messages", "chatcmpl", replies.ChatReply, replies.ChatChunk

    def __init__(self, state: ServerState, body: ChatRequest) -> None:
        super().__init__(state, body, body.n or 1)
        self._strips_space = state.tokenizer.strips_space and not body.continue_final_message
        self._wants_logprobs = body.logprobs
        self._begun: set[int] = set()  # choices that have text

    def choice(self, piece: Piece) -> replies.ChatChoice:
        message = replies.ReplyMessage(self._stripped(piece))
        return replies.ChatChoice(piece.choice, message, piece.finish_reason, self._logprobs(piece))  # type: ignore[arg-type]

    def chunk_choices(self, piece: Piece) -> Iterator[replies.ChatChunkChoice]:
        text = self._stripped(piece)
        if text or piece.logprobs:
            delta = replies.Delta(content=text) if text else replies.Delta()
            yield replies.ChatChunkChoice(piece.choice, delta, None, self._logprobs(piece))
        if piece.finish_reason:
            yield replies.ChatChunkChoice(piece.choice, replies.Delta(), piece.finish_reason)

    async def chunks(self, generation: Generation) -> AsyncIterator[Any]:
        for index in range(self.choices):
            yield self.chunk(replies.ChatChunkChoice(index, replies.Delta("assistant", "")))
        async for chunk in super().chunks(generation):
            yield chunk

    def _stripped(self, piece: Piece) -> str:
        """Returns the text, without the space that begins a choice after a plain template."""
        begins = piece.choice not in self._begun
        if piece.text:
            self._begun.add(piece.choice)
        return piece.text.removeprefix(" ") if self._strips_space and begins else piece.text

    def _logprobs(self, piece: Piece) -> replies.ChatLogProbs | None:
        return replies.ChatLogProbs(list(map(self._token_logprob, piece.logprobs))) if self._wants_logprobs else None

    def _token_logprob(self, logprob: LogProb) -> replies.TokenLogProb:
        shown = lambda token, nats: ((text := token_text(self.tokenizer, token))[0], nats, list(text[1]))
        top = [replies.TopLogProb(*shown(token, nats)) for token, nats in logprob.top]
        return replies.TokenLogProb(*shown(logprob.token, logprob.logprob), top)


async def completions(state: ServerState, http: Request) -> Any:
    """Continues each prompt `n` times; the choices of a prompt follow each other."""
    check_ready(state, http)
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
        state, http, CompletionWriter(state, body, count * (body.n or 1)), encode,
        max_tokens=body.max_tokens or 16, logprobs=body.logprobs, stop_token_ids=state.stop_token_ids,  # 16: as OpenAI has it
    )  # fmt: skip


class CompletionWriter(Writer):
    """Writes the replies and chunks of /v1/completions."""

    prompt_field, id_prefix, reply_type, chunk_type = "prompt", "cmpl", replies.CompletionReply, replies.CompletionReply

    def __init__(self, state: ServerState, body: CompletionRequest, choices: int) -> None:
        super().__init__(state, body, choices)
        self._top_logprobs = body.logprobs
        self._offsets = [0] * choices
        self._streams = [self.tokenizer.stream() for _ in range(choices)]

    def choice(self, piece: Piece) -> replies.CompletionChoice:
        return replies.CompletionChoice(piece.choice, piece.text, piece.finish_reason, self._logprobs(piece))

    def chunk_choices(self, piece: Piece) -> list[replies.CompletionChoice]:
        return [self.choice(piece)] if piece.text or piece.logprobs or piece.finish_reason else []

    def _logprobs(self, piece: Piece) -> replies.CompletionLogProbs | None:
        if self._top_logprobs is None:
            return None
        offsets, logprobs = [], piece.logprobs
        for each in logprobs:
            offsets.append(self._offsets[piece.choice])  # part of a character: its offset
            self._offsets[piece.choice] += len(self._streams[piece.choice].push(each.token))
        name = lambda token: token_text(self.tokenizer, token)[0]
        top = [{name(token): nats for token, nats in each.top} for each in logprobs] if self._top_logprobs else None
        return replies.CompletionLogProbs(
            [name(each.token) for each in logprobs], [each.logprob for each in logprobs], top, offsets
        )
