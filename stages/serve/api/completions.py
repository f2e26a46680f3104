"""Handles POST /v1/chat/completions and /v1/completions: from prompts to the pieces of text of a reply."""

import asyncio
import contextlib
import dataclasses
import functools
import os
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from engine.errors import InvalidField
from engine.inference.request import SEEDS, Event, LogProb, Request, check_request
from engine.text.tokenizer import CompletionText
from stages.serve.admission import Sender
from stages.serve.api import replies
from stages.serve.api.requests import (
    INLINE_BYTES,
    MAX_COMPLETIONS,
    MAX_PROMPTS,
    ChatRequest,
    CompletionFields,
    CompletionRequest,
    Message,
    TokenizeRequest,
    content_length,
    read_body,
)
from stages.serve.errors import ApiError, ClientGone, internal_error
from stages.serve.state import ServerState
from stages.serve.tokenizer_pool import context_overflow, token_text

KEEP_ALIVE_SECONDS = 10.0  # of silence before a comment is sent: proxies close idle connections
WAIT_SECONDS = 0.5  # between looks at what a request waits for
SEND_SECONDS = 60.0  # for a client to read what it was sent
DEFAULT_MAX_TOKENS = 16  # of /v1/completions, as OpenAI has it

STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"),
]  # fmt: skip


class Piece(NamedTuple):
    """New text of choice number `choice`, its log-probabilities, and why the choice ended, or None."""

    choice: int
    text: str
    logprobs: Sequence[LogProb]
    finish_reason: replies.Reason | None


@dataclasses.dataclass(eq=False)
class Choice:
    """One completion. `first_token`: when it came, by time.monotonic. `cached`: tokens of the prompt from the prefix cache.

    `end`: stop, length, error, or abort when the client left.
    """

    index: int
    request: Request
    completion: CompletionText
    first_token: float = 0.0
    cached: int = 0
    end: str = "abort"


class Generation:
    """The completions of one HTTP request in the engine, in its reserved place. `watch_disconnect` must be entered, once.

    They get slots one by one, in the order of priorities. `repeats`: how many requests in a row share a prompt, whose tokens
    count once. `arrived`: by time.monotonic.
    """

    def __init__(
        self, state: ServerState, requests: Sequence[Request], priority: int, stops: Sequence[str], repeats: int, arrived: float
    ) -> None:
        self._state, self._priority, self._repeats, self._arrived = state, priority, repeats, arrived
        self._events: asyncio.Queue[tuple[Choice, Event] | None] = asyncio.Queue()
        completion = lambda: CompletionText(state.tokenizer.tokenizer.stream(), stops)
        self._choices = [Choice(index, request, completion()) for index, request in enumerate(requests)]
        self._unfinished = {
            choice: state.engine.submit(choice.request, priority, functools.partial(self._receive, choice))
            for choice in self._choices
        }

    def _receive(self, choice: Choice, event: Event) -> None:
        self._events.put_nowait((choice, event))

    async def pieces(self, says_wait: bool = True) -> AsyncIterator[Piece | str]:
        """Yields the pieces of all completions as they come. If `says_wait`, in between: what the request waits for, whenever
        that changes and after KEEP_ALIVE_SECONDS of silence.

        Raises ClientGone when the client has left, ApiError when the engine has failed.
        """
        engine, wait, last = self._state.engine, "waiting", time.monotonic()
        is_first = True
        while self._unfinished:
            try:
                seconds = WAIT_SECONDS if is_first or not engine.has_long_programs else KEEP_ALIVE_SECONDS
                item = await asyncio.wait_for(self._events.get(), seconds if says_wait else None)
            except TimeoutError:
                before, wait = wait, self._wait()
                if wait != before or time.monotonic() - last >= KEEP_ALIVE_SECONDS:
                    last = time.monotonic()
                    yield wait
                continue
            if item is None:
                raise ClientGone
            is_first, wait, last = False, "waiting", time.monotonic()
            if item[0] in self._unfinished:
                yield self._piece(*item)

    def _wait(self) -> str:
        """Returns what the request waits for: programs, others before it, or its turn in the engine."""
        engine = self._state.engine.engine
        if self._priority in engine.held_priorities:
            return "waiting for the programs for long texts"
        position = engine.queue_position(self._priority)
        return f"place {position} in the queue" if position else "waiting"

    async def collect(self) -> list[Piece]:
        """Returns one piece for each completion, with all of it. Raises as `pieces`."""
        parts: list[list[Piece]] = [[] for _ in self._choices]
        async for piece in self.pieces(says_wait=False):
            if isinstance(piece, Piece):
                parts[piece.choice].append(piece)
        return [
            Piece(index, "".join(part.text for part in own), [each for part in own for each in part.logprobs], own[-1][-1])
            for index, own in enumerate(parts)
        ]

    @contextlib.asynccontextmanager
    async def watch_disconnect(self, receive: Receive) -> AsyncIterator[None]:
        """Within the block, `pieces` notices a client that leaves. Its end cancels what is unfinished and frees the place."""

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                continue
            self._events.put_nowait(None)

        watching = asyncio.create_task(watch())
        try:
            yield
        finally:
            watching.cancel()
            for handle in self._unfinished.values():
                handle.cancel()
            self._unfinished.clear()
            for choice in self._choices:
                self._state.metrics.count_end(choice.end)
            self._state.admission.release()

    @property
    def usage(self) -> replies.Usage:
        prompts = self._choices[:: self._repeats]
        prompt = sum(len(choice.request.prompt) for choice in prompts)
        written = sum(choice.completion.tokens for choice in self._choices)
        return replies.Usage(prompt, written, prompt + written, replies.CachedTokens(sum(choice.cached for choice in prompts)))

    def log_fields(self) -> dict[str, int | float | str | None]:
        """Returns what the access log says of the completions."""
        usage, first = self.usage, min((choice.first_token for choice in self._choices if choice.first_token), default=None)
        return {
            "prompt_tokens": usage.prompt_tokens, "cached_tokens": usage.prompt_tokens_details.cached_tokens,
            "completion_tokens": usage.completion_tokens, "finish": "+".join(choice.end for choice in self._choices),
            "first_token_seconds": first and round(first - self._arrived, 4),
        }  # fmt: skip

    def _piece(self, choice: Choice, event: Event) -> Piece:
        completion, now, metrics = choice.completion, time.monotonic(), self._state.metrics
        before = completion.tokens
        text = completion.push(event.tokens)
        if event.tokens and not choice.first_token:
            choice.first_token = now
            metrics.ttft.observe(now - self._arrived)
        choice.cached = event.cached_tokens
        if event.finish_reason == "error":
            choice.end = "error"
            del self._unfinished[choice]
            if self._state.engine.error:
                raise ApiError(503, "The engine has failed and answers nothing any more; the server has to be started again.")
            raise ApiError(500, "The model gave no finite logits to sample a token from: its weights are damaged or overflow.")
        if event.finish_reason:
            text += completion.close()
        reason: replies.Reason | None = "stop" if completion.stopped is not None else event.finish_reason
        if reason:
            choice.end = reason
            handle = self._unfinished.pop(choice)
            if not event.finish_reason:
                handle.cancel()
            seconds, prompt = now - self._arrived, len(choice.request.prompt)
            metrics.count_completion(prompt, choice.cached, completion.tokens, seconds, now - choice.first_token)
            if not self._unfinished:
                self._state.admission.record(seconds)
        return Piece(choice.index, text, event.logprobs[: completion.tokens - before], reason)


class Writer:
    """Writes `choices` completions in OpenAI's form, as one reply or as chunks; each route has its own.

    `choice` writes a whole completion, `chunk_choices` a piece as choices, each of which is sent in its own chunk.
    """

    prompt_field: str
    id_prefix: str
    reply_type: Any
    chunk_type: Any
    choice: Callable[[Piece], Any]
    chunk_choices: Callable[[Piece], Iterable[Any]]

    def __init__(self, state: ServerState, body: CompletionFields, choices: int) -> None:
        self.choices, self.tokenizer = choices, state.tokenizer.tokenizer
        self._wants_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._head = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": state.name,
            "system_fingerprint": state.fingerprint,
        }  # fmt: skip
        ignored = ", ".join(body.ignored)
        self.headers = {"X-Ignored-Fields": ignored} if ignored else {}

    def reply(self, pieces: list[Piece], usage: replies.Usage) -> Any:
        return self.reply_type(**self._head, choices=list(map(self.choice, pieces)), usage=usage)

    def chunk(self, *choices: Any, usage: replies.Usage | None = None) -> Any:
        return self.chunk_type(**self._head, choices=list(choices), usage=usage if self._wants_usage else msgspec.UNSET)

    async def chunks(self, generation: Generation) -> AsyncIterator[Any]:
        """Yields the chunks of a stream, and what it waits for as `Generation.pieces`."""
        async for piece in generation.pieces():
            if isinstance(piece, str):
                yield piece
            else:
                for choice in self.chunk_choices(piece):
                    yield self.chunk(choice)
        if self._wants_usage:
            yield self.chunk(usage=generation.usage)


class ChatWriter(Writer):
    """Writes the replies and chunks of a chat."""

    prompt_field, id_prefix, reply_type, chunk_type = "messages", "chatcmpl", replies.ChatReply, replies.ChatChunk

    def __init__(self, state: ServerState, body: ChatRequest, choices: int) -> None:
        super().__init__(state, body, choices)
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


async def chat_completions(state: ServerState, http: HttpRequest) -> ASGIApp:
    """Writes the assistant's next turn, `n` times."""
    check_ready(state, http)
    async with read_body(state, http, ChatRequest) as body:
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs is given without logprobs being true.", param="top_logprobs")
        if body.max_tokens is not None and body.max_completion_tokens is not None:
            message = "max_completion_tokens is sent beside max_tokens, its older name: send only one of them."
            raise ApiError(400, message, param="max_completion_tokens")

        async def encode() -> list[list[int]]:
            return [await encode_messages(state, body.messages, body)]

        return await generate(
            state, http, body, ChatWriter, encode, choices=body.n or 1,
            max_tokens=body.max_completion_tokens or body.max_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            stop_token_ids=state.stop_token_ids | state.tokenizer.eot_ids,
        )  # fmt: skip


async def completions(state: ServerState, http: HttpRequest) -> ASGIApp:
    """Continues each prompt `n` times; the choices of a prompt follow each other."""
    check_ready(state, http)
    async with read_body(state, http, CompletionRequest) as body:
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
            state, http, body, CompletionWriter, encode, choices=count * (body.n or 1),
            max_tokens=body.max_tokens or DEFAULT_MAX_TOKENS, logprobs=body.logprobs, stop_token_ids=state.stop_token_ids,
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


def check_ready(state: ServerState, http: HttpRequest) -> None:
    """Raises ApiError while no completion can be admitted: 503 when not ready, 429 for a large body when places are taken.

    That of a small one waits until its number of completions is known.
    """
    state.check_ready()
    if content_length(http) > INLINE_BYTES:
        state.admission.check(_sender(http, 0), time.monotonic())


def _sender(http: HttpRequest, choices: int) -> Sender:
    (address, port), length = http.client or ("", 0), content_length(http)
    return Sender(port, (address, http.state.namespace, length if length > INLINE_BYTES else choices))


async def generate(
    state: ServerState, http: HttpRequest, body: CompletionFields, writer_type: Callable[..., Writer],
    encode: Callable[[], Awaitable[list[list[int]]]], *, choices: int, max_tokens: int | None, logprobs: int | None,
    stop_token_ids: frozenset[int],
) -> ASGIApp:  # fmt: skip
    """Returns what responds to a request for completions of the prompts that `encode` returns.

    They have at most `max_tokens`, and no more than fit (None: as many); each of `stop_token_ids` ends one. A place is reserved
    before the prompts become tokens, and freed whatever happens. Raises ApiError, and ClientGone when the client leaves.
    """
    capacity = state.engine.capacity
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options is given without stream being true.", param="stream_options")
    if choices > MAX_COMPLETIONS:
        message = f"prompts times n are {choices:,} completions; at most {MAX_COMPLETIONS} are made for one request."
        raise ApiError(400, message, param="n")
    priority = state.admission.reserve(_sender(http, choices), time.monotonic())
    try:
        writer = writer_type(state, body, choices)
        prompts, requests = await encode(), list[Request]()
        seed = int.from_bytes(os.urandom(4)) if body.seed is None else body.seed
        fields = replies.DefaultSampling.__struct_fields__
        options: dict[str, Any] = {name: value for name in fields if (value := getattr(body, name)) is not None}
        options |= {
            "logprobs": logprobs,
            "logit_bias": {int(token): value for token, value in (body.logit_bias or {}).items() if value},
            "stop_token_ids": frozenset(body.stop_token_ids or ()) | (frozenset() if body.ignore_eos else stop_token_ids),
        }  # fmt: skip
        for prompt in prompts:
            room = capacity - len(prompt)
            if room < 1:
                raise context_overflow(len(prompt), capacity, writer.prompt_field)
            options |= {"max_tokens": min(max_tokens or room, room), "seed": (seed + len(requests)) % SEEDS}
            rows = dataclasses.replace(state.sampling, **options).per_row(body.n or 1)  # each with its own seed
            requests += [Request(tuple(prompt), row, http.state.namespace) for row in rows]
            check_request(requests[-1], state.engine.cfg.vocab, capacity)
        generation = Generation(state, requests, priority, body.stops, body.n or 1, http.state.arrived)
        http.state.generation = generation
    except BaseException as error:
        state.admission.release()
        if isinstance(error, InvalidField):
            raise ApiError(400, str(error), param=error.field) from None
        raise
    return functools.partial(send_events if body.stream else send_reply, writer, generation)


async def send_reply(writer: Writer, generation: Generation, scope: Scope, receive: Receive, send: Send) -> None:
    """Responds with one JSON body once all completions are there. Raises as `Generation.pieces`."""
    async with generation.watch_disconnect(receive):
        reply = json_reply(writer.reply(await generation.collect(), generation.usage), headers=writer.headers)
    await reply(scope, receive, send)


async def send_events(writer: Writer, generation: Generation, _: Scope, receive: Receive, send: Send) -> None:
    """Responds with server-sent events: chunks (comments say what it waits for), then `[DONE]`.

    Ends when the client reads no more.
    """

    async def write(event: bytes, more: bool = True) -> None:
        async with asyncio.timeout(SEND_SECONDS):
            await send({"type": "http.response.body", "body": event + b"\n\n", "more_body": more})

    with contextlib.suppress(ClientGone, OSError):  # nobody reads it; a TimeoutError is an OSError
        async with generation.watch_disconnect(receive):
            headers = [*STREAM_HEADERS, *((name.lower().encode(), value.encode()) for name, value in writer.headers.items())]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            try:
                async for chunk in writer.chunks(generation):
                    await write(f": {chunk}".encode() if isinstance(chunk, str) else b"data: " + msgspec.json.encode(chunk))
            except (ClientGone, OSError):
                raise
            except Exception as error:
                await write(b"data: " + (error if isinstance(error, ApiError) else internal_error(error)).body)
            await write(b"data: [DONE]", more=False)


def json_reply(value: msgspec.Struct, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Returns the response with a struct as its JSON body."""
    return Response(msgspec.json.encode(value), status, headers, media_type="application/json")
