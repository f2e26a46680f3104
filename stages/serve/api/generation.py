"""Generation: the completions of one HTTP request, from its prompts to the pieces of text that its reply is written from."""

import asyncio
import functools
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, NamedTuple, Protocol

import starlette.requests
from starlette.types import Receive

from engine.errors import InvalidField
from engine.inference.request import Event, LogProb, Request, check
from engine.inference.sampling_params import SEEDS, SamplingParams
from engine.inference.stop_strings import CompletionText
from stages.serve.api.event_stream import EventStream
from stages.serve.api.replies import CachedTokens, Reason, Usage
from stages.serve.api.requests import CompletionFields
from stages.serve.errors import ApiError, ClientGone, json_reply
from stages.serve.state import ServerState
from stages.serve.tokenize import context_overflow

# Fields of a body that the engine knows by the same name and of the same meaning; null is its default.
SAMPLING = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")


class Piece(NamedTuple):
    """New text of choice number `choice`, its log-probabilities, and why the choice ended, if it did."""

    choice: int
    text: str
    logprobs: list[LogProb]
    finish_reason: Reason | None


class Generation:
    """The completions that one HTTP request has in the engine, in places that are reserved. `close` must be called.

    `repeats`: so many requests in a row have the same prompt, which is counted once. `arrived`: by time.monotonic.
    """

    def __init__(
        self, state: ServerState, requests: Sequence[Request], stops: Sequence[str], repeats: int, arrived: float
    ) -> None:
        self._state, self._repeats, self._arrived = state, repeats, arrived
        self._events: asyncio.Queue[tuple[int, Event] | None] = asyncio.Queue()
        self._completions = [CompletionText(state.tokenizer.tokenizer.stream(), stops) for _ in requests]
        self._first: list[float] = [0.0] * len(requests)  # when the first token came
        self._cached = [0] * len(requests)
        self._prompts = [len(request.prompt) for request in requests]
        self._open = set(range(len(requests)))
        listeners = [functools.partial(self._on_event, index) for index in self._open]
        self._cancels = [state.engine.submit(request, listener) for request, listener in zip(requests, listeners)]

    def _on_event(self, index: int, event: Event) -> None:
        self._events.put_nowait((index, event))

    async def pieces(self, patience: float | None = None) -> AsyncIterator[Piece | None]:
        """Yields the pieces of all completions as they come; None after `patience` seconds without one.

        Raises ClientGone when the client has left (see `watch`), ApiError when the engine has failed.
        """
        while self._open:
            try:
                async with asyncio.timeout(patience):
                    item = await self._events.get()
            except TimeoutError:
                yield None
                continue
            if item is None:
                raise ClientGone
            index, event = item
            if index in self._open:
                yield self._piece(index, event)

    async def whole(self, receive: Receive) -> list[Piece]:
        """Returns one piece for each completion, with all of it. Raises as `pieces` does."""
        count = len(self._completions)
        texts, logprobs = [[""] for _ in range(count)], [list[LogProb]() for _ in range(count)]
        reasons: list[Reason | None] = [None] * count
        watch = asyncio.create_task(self.watch(receive))
        try:
            async for piece in self.pieces():
                if piece:
                    texts[piece.choice].append(piece.text)
                    logprobs[piece.choice] += piece.logprobs
                    reasons[piece.choice] = piece.finish_reason
        finally:
            watch.cancel()
        return [Piece(index, "".join(texts[index]), logprobs[index], reasons[index]) for index in range(count)]

    async def watch(self, receive: Receive) -> None:
        """Returns when the client has left, having made `pieces` raise."""
        while (await receive())["type"] != "http.disconnect":
            continue
        self._events.put_nowait(None)

    def close(self) -> None:
        """Cancels what is not finished, and gives the reserved places back, once."""
        for index in self._open:
            self._cancels[index]()
            self._state.metrics.ended("abort")
        self._open.clear()
        self._state.admission.release(len(self._cancels))
        self._cancels = []

    @property
    def usage(self) -> Usage:
        prompt = sum(self._prompts[:: self._repeats])
        written = sum(completion.tokens for completion in self._completions)
        return Usage(prompt, written, prompt + written, CachedTokens(sum(self._cached[:: self._repeats])))

    def _piece(self, index: int, event: Event) -> Piece:
        completion, now, metrics = self._completions[index], time.monotonic(), self._state.metrics
        before = completion.tokens
        text = completion.push(event.tokens)
        if event.tokens and not self._first[index]:
            self._first[index] = now
            metrics.first_token.observe(now - self._arrived)
        self._cached[index] = event.cached_tokens
        if event.finish_reason == "error":
            self._open.discard(index)
            metrics.ended("error")
            raise self._engine_error()
        if event.finish_reason and completion.stopped is None:
            text += completion.close()
        reason: Reason | None = "stop" if completion.stopped is not None else event.finish_reason
        if reason:
            self._open.discard(index)
            if not event.finish_reason:
                self._cancels[index]()
            metrics.ended(reason)
            metrics.completed(
                self._prompts[index], event.cached_tokens, completion.tokens, now - self._arrived, now - self._first[index]
            )
            self._state.admission.record(now - self._arrived)
        return Piece(index, text, event.logprobs[: completion.tokens - before], reason)

    def _engine_error(self) -> ApiError:
        if self._state.engine.failed:
            return ApiError(503, "The engine has failed and answers nothing any more; the server has to be started again.")
        return ApiError(500, "The model gave no numbers to draw a token from: its weights are damaged or overflow.")


class Writer(Protocol):
    """Writes a generation in OpenAI's form: as one reply, or as chunks of which None says that there is nothing new."""

    def reply(self, choices: list[Piece], usage: Usage) -> Any: ...

    def chunks(self, generation: Generation) -> AsyncIterator[Any]: ...


async def generate(
    http: starlette.requests.Request, body: CompletionFields, writer: Writer, choices: int, prompt_field: str,
    encode: Callable[[], Awaitable[list[list[int]]]], max_tokens: int | None, logprobs: int | None, ends: frozenset[int],
) -> Any:  # fmt: skip
    """Returns the response to a request for `choices` completions of the prompts that `encode` gives.

    They have at most `max_tokens` (all that fit when None), and one of `ends` ends them. Places are reserved before the
    prompts become tokens; whatever happens, they are given back and nothing is left in the engine. Raises ApiError, about
    `prompt_field` for a prompt that does not fit, and ClientGone when the client leaves.
    """
    state: ServerState = http.app.state.server
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options is given without stream being true.", param="stream_options")
    state.admission.reserve(choices)
    try:
        prompts, requests = await encode(), list[Request]()
        seed = int.from_bytes(os.urandom(4)) if body.seed is None else body.seed
        options = {name: value for name in SAMPLING if (value := getattr(body, name)) is not None}
        options |= {
            "top_k": max(0, body.top_k or 0), "logprobs": logprobs,  # -1 is another way to say all
            "logit_bias": {int(token): value for token, value in (body.logit_bias or {}).items() if value},
            "stop_token_ids": frozenset(body.stop_token_ids or ()) | (frozenset() if body.ignore_eos else ends),
        }  # fmt: skip
        for prompt in prompts:
            room = state.engine.capacity - len(prompt)
            if room < (max_tokens or 1):
                raise context_overflow(len(prompt), max_tokens, state.engine.capacity, prompt_field)
            for _ in range(body.n or 1):  # each draws by a seed of its own
                params = SamplingParams(max_tokens=max_tokens or room, seed=(seed + len(requests)) % SEEDS, **options)
                requests.append(Request(tuple(prompt), params, http.state.namespace))
                check(requests[-1], state.engine.cfg.vocab, state.engine.capacity)
        generation = Generation(state, requests, body.stops, body.n or 1, http.state.arrived)
    except BaseException as error:
        state.admission.release(choices)
        if isinstance(error, InvalidField):
            raise ApiError(400, str(error), param=error.field) from None
        raise
    if body.stream:
        return EventStream(writer.chunks(generation), generation.watch, generation.close)
    try:
        return json_reply(writer.reply(await generation.whole(http.receive), generation.usage))
    finally:
        generation.close()
