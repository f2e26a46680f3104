"""An answer under way: the completions of one HTTP request, from the engine's events to pieces of text in order."""

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from starlette.types import Receive

from engine.inference.request import Event, LogProb, Request
from engine.inference.stop_strings import CompletionText
from engine.text.tokenizer import Tokenizer
from stages.serve.admission import Door
from stages.serve.api.reply_schema import CachedTokens, Reason, Usage
from stages.serve.engine import Engine
from stages.serve.errors import Gone, Refused
from stages.serve.metrics import Metrics


class Piece(NamedTuple):
    """What is new of completion number `place`: text, log-probabilities, and why it ended, if it did."""

    place: int
    text: str
    logprobs: list[LogProb]
    reason: Reason | None


class Answer:
    """The requests of one HTTP request in the engine. `close` must be called: it ends what is still under way.

    `repeats`: so many requests in a row have the same prompt, which is counted once. `arrived`: by time.monotonic.
    """

    def __init__(
        self, engine: Engine, metrics: Metrics, door: Door, tokenizer: Tokenizer, requests: Sequence[Request],
        stops: Sequence[str], repeats: int, arrived: float,
    ) -> None:  # fmt: skip
        self._engine, self._metrics, self._door, self._arrived = engine, metrics, door, arrived
        self._news: asyncio.Queue[tuple[int, Event] | None] = asyncio.Queue()
        self._completions = [CompletionText(tokenizer.stream(), stops) for _ in requests]
        self._first: list[float | None] = [None] * len(requests)
        self._cached = [0] * len(requests)
        self._prompts = [len(request.prompt) for request in requests]
        self._repeats = repeats
        self._open = set(range(len(requests)))
        self._tickets = [engine.submit(request, functools.partial(self._hear, index)) for index, request in enumerate(requests)]

    def _hear(self, index: int, event: Event) -> None:
        """An event of one of the completions, on the event loop."""
        self._news.put_nowait((index, event))

    async def pieces(self, patience: float | None = None) -> AsyncIterator[Piece | None]:
        """All pieces of all completions as they come; None after `patience` seconds without one.

        Raises Gone when the client has left (see `watch`), Refused when the engine has failed.
        """
        while self._open:
            try:
                async with asyncio.timeout(patience):
                    news = await self._news.get()
            except TimeoutError:
                yield None
                continue
            if news is None:
                raise Gone
            index, event = news
            if index in self._open:
                yield self._piece(index, event)

    async def watch(self, receive: Receive) -> None:
        """Returns when the client has left, having made `pieces` raise."""
        while (await receive())["type"] != "http.disconnect":
            continue
        self._news.put_nowait(None)

    def close(self) -> None:
        """Ends what is not finished."""
        for index in self._open:
            self._engine.cancel(self._tickets[index])
            self._metrics.finished("abort")
        self._open.clear()

    @property
    def usage(self) -> Usage:
        prompt = sum(self._prompts[:: self._repeats])
        written = sum(completion.tokens for completion in self._completions)
        cached = sum(self._cached[:: self._repeats])
        return Usage(prompt, written, prompt + written, CachedTokens(cached))

    def _piece(self, index: int, event: Event) -> Piece:
        completion, now = self._completions[index], time.monotonic()
        before = completion.tokens
        text = completion.push(event.tokens)
        if event.tokens and self._first[index] is None:
            self._first[index] = now
            self._metrics.first_token.observe(now - self._arrived)
        self._cached[index] = event.cached_tokens
        if event.finish_reason == "error":
            self._open.discard(index)
            self._metrics.finished("error")
            raise Refused(*_broken(self._engine))
        if event.finish_reason and completion.stopped is None:
            text += completion.close()
        reason: Reason | None = "stop" if completion.stopped is not None else event.finish_reason
        if reason:
            self._open.discard(index)
            if not event.finish_reason:
                self._engine.cancel(self._tickets[index])
            self._count(index, reason, now)
        return Piece(index, text, event.logprobs[: completion.tokens - before], reason)

    def _count(self, index: int, reason: Reason, now: float) -> None:
        metrics, first, written = self._metrics, self._first[index], self._completions[index].tokens
        metrics.finished(reason)
        metrics.prompt_tokens.inc(self._prompts[index])
        metrics.generation_tokens.inc(written)
        metrics.queried.inc(self._prompts[index])
        metrics.hit.inc(self._cached[index])
        metrics.prompt_size.observe(self._prompts[index])
        metrics.answer_size.observe(written)
        metrics.whole.observe(now - self._arrived)
        if first is not None and written > 1:
            metrics.per_token.observe((now - first) / (written - 1))
        self._door.note(now - self._arrived)


def _broken(engine: Engine) -> tuple[int, str]:
    if engine.failed:
        return 503, "The engine has failed and answers nothing any more; the server has to be started again."
    return 500, "The model gave no numbers to draw a token from: its weights are damaged or overflow."
