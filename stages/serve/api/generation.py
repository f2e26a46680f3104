"""Generation: the completions of one HTTP request, from a Job over events to what a Writer makes of them.

A handler returns what `run` returns, or a Generation of choices of its own: the response.
"""

import asyncio
import contextlib
import dataclasses
import functools
import time
from collections.abc import AsyncIterator, Callable, Sequence

import msgspec
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from engine.inference.constraints import ForcedTokens
from engine.inference.request import Event, Request
from engine.text.detokenizer import CompletionText
from engine.text.documents import Passage
from stages.serve.api.jobs import Job, compile_grammar, make_requests
from stages.serve.api.requests import ApiCall, ignored_header, json_reply
from stages.serve.api.writer import Piece, Reason, Usage, Writer, join_pieces
from stages.serve.bill import Bill, Cost, make_bill
from stages.serve.call_parser import CallParser
from stages.serve.errors import ApiError, ClientGone, api_error
from stages.serve.tools import ToolCall

MAX_COMPLETIONS = 128  # prompts times n: later requests wait for them all
KEEP_ALIVE_SECONDS = 10.0  # of silence before a comment is sent: proxies close idle connections
WAIT_SECONDS = 0.5  # between looks at what a request waits for

Reply = Callable[[list[Piece], Usage], msgspec.Struct]  # of the pieces of whole completions


@dataclasses.dataclass(eq=False)
class Choice:
    """One completion: the engine's request, and what has come of it."""

    index: int
    request: Request
    completion: CompletionText
    # Whether the space that may begin the text is left out.
    strips_space: bool = False
    # Whether the text ends with the stop string, and not before it.
    keeps_stop: bool = False
    # Takes the calls of tools out of the text, if there may be any.
    parser: CallParser | None = None
    # When the first token came, by time.monotonic.
    first_token: float = 0.0
    # Tokens of the prompt from the prefix cache, None before the first event.
    cached: int | None = None
    # Why it ended: stop, length, error, or abort when the client left or another one failed.
    end: str = "abort"
    # Whether a stop token ended it, which was decoded and is none of its tokens.
    ended_by_token: bool = False
    # Its share of the engine's time.
    prompt_seconds: float = 0.0
    completion_seconds: float = 0.0

    @property
    def scored_tokens(self) -> Sequence[int]:
        """The given tokens whose log-probabilities are asked for: they are none of a completion's."""
        constraint = self.request.constraint
        return constraint.tokens if isinstance(constraint, ForcedTokens) else ()

    def push(self, tokens: Sequence[int], *, last: bool) -> str:
        """Returns what new tokens, the `last` or not, add to the text."""
        text = self.completion.push(tokens, last=last)
        if self.keeps_stop and self.completion.stopped is not None:
            text += self.completion.stopped
        if self.strips_space and text:
            text = text.removeprefix(" ")
            self.strips_space = False
        return text


class Generation:
    """The completions of one call in the engine, and the response: an ASGI application, called once.

    They get slots one by one, in the order of priorities. Responds with the `reply`, or with the
    stream of a `writer`, if there is one. `repeats`: how many choices in a row share a prompt,
    whose tokens count once. `passages`: as of PromptTokens. `ignored`: names of the body's fields
    that change no answer.
    """

    def __init__(
        self,
        call: ApiCall,
        choices: Sequence[Choice],
        reply: Reply,
        *,
        writer: Writer | None = None,
        repeats: int = 1,
        passages: Sequence[Passage] = (),
        ignored: Sequence[str] = (),
    ) -> None:
        self._state = call.state
        self._place = call.place
        self._arrived = call.http.state.arrived
        self._choices = choices
        self._reply = reply
        self._writer = writer
        self._repeats = repeats
        self._passages = passages
        self._headers = ignored_header(ignored)
        self._wants_cost = call.wants_cost
        self._events: asyncio.Queue[tuple[Choice, Event] | None] = asyncio.Queue()
        self._unfinished: dict[Choice, Callable[[], None]] = {}  # with what cancels it

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["generation"] = self  # for the log
        if self._writer:
            await self._send_stream(self._writer, receive, send)
        else:
            await self._send_whole(scope, receive, send)

    async def _send_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._submitted(receive):
            pieces = await self._collect()
            response = json_reply(self._reply(pieces, self._usage_at_end()), headers=self._headers)
        await response(scope, receive, send)

    async def _send_stream(self, writer: Writer, receive: Receive, send: Send) -> None:
        headers = {
            "content-type": writer.media,
            "cache-control": "no-cache",
            "x-accel-buffering": "no",
            **self._headers,
        }
        with contextlib.suppress(ClientGone, OSError):  # nobody reads it
            async with self._submitted(receive):
                await send({"type": "http.response.start", "status": 200, "headers": Headers(headers).raw})
                async for event in self._stream(writer):
                    await send({"type": "http.response.body", "body": event, "more_body": True})
                await send({"type": "http.response.body", "body": writer.last, "more_body": False})

    async def _stream(self, writer: Writer) -> AsyncIterator[bytes]:
        """Yields the events of a stream but for the last; comments among them say what it waits for."""
        try:
            sent = time.monotonic()
            for chunk in writer.begin(self.usage):
                yield writer.frame(chunk)
            async for piece in self._pieces():
                if isinstance(piece, str):
                    sent = time.monotonic()
                    yield writer.comment(piece)
                    continue
                for chunk in writer.chunks(piece):
                    sent = time.monotonic()
                    yield writer.frame(chunk)
                if time.monotonic() - sent >= KEEP_ALIVE_SECONDS:  # what may become a call is held back
                    sent = time.monotonic()
                    yield writer.comment("writing")
            for chunk in writer.end(self._usage_at_end()):
                yield writer.frame(chunk)
        except ClientGone:
            raise
        except Exception as error:
            yield writer.error(api_error(error))

    async def _pieces(self) -> AsyncIterator[Piece | str]:
        """Yields the pieces of all completions as they come; in a stream also what the request waits for.

        That is said before the first piece whenever it changes, and after KEEP_ALIVE_SECONDS of
        silence.

        Raises ClientGone when the client has left, ApiError when the engine has failed.
        """
        status = "waiting"
        last_sign = time.monotonic()
        timeout = WAIT_SECONDS if self._writer else None
        while self._unfinished:
            try:
                item = await asyncio.wait_for(self._events.get(), timeout)
            except TimeoutError:
                status_before = status
                status = self._wait_status()
                if status != status_before or time.monotonic() - last_sign >= KEEP_ALIVE_SECONDS:
                    last_sign = time.monotonic()
                    yield status
                continue
            if item is None:
                raise ClientGone
            status = "waiting"
            last_sign = time.monotonic()
            if self._writer:
                timeout = KEEP_ALIVE_SECONDS
            choice, event = item
            if choice in self._unfinished:
                yield self._piece(choice, event)

    def _wait_status(self) -> str:
        """Returns what the request waits for: a slot, its prompt, or the next token."""
        engine = self._state.engine.engine
        position = engine.queue_position(self._place.priority)
        if position:
            return f"place {position} in the queue"
        done, tokens = engine.prefill_progress(self._place.priority)
        if not tokens:
            return "waiting"
        progress = f"reading {done} of {tokens} tokens"
        from_documents = sum(passage.tokens for passage in self._passages)
        if from_documents:
            progress += f", {from_documents} of documents"
        return progress

    async def _collect(self) -> list[Piece]:
        """Returns one piece for each completion. Raises as `_pieces`."""
        parts: list[list[Piece]] = [[] for _ in self._choices]
        async for piece in self._pieces():
            if isinstance(piece, Piece):
                parts[piece.choice].append(piece)
        return list(map(join_pieces, parts))

    @contextlib.asynccontextmanager
    async def _submitted(self, receive: Receive) -> AsyncIterator[None]:
        """Holds the requests in the engine within the block, where `_pieces` notices a client that leaves.

        Its end cancels what is unfinished.
        """

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                continue
            self._events.put_nowait(None)

        watching = asyncio.create_task(watch())
        try:
            for choice in self._choices:  # before anything is awaited: an adapter may be removed meanwhile
                listener = functools.partial(self._take, choice)
                self._unfinished[choice] = self._state.engine.submit(
                    choice.request, self._place.priority, listener
                )
            yield
        finally:
            watching.cancel()
            for cancel in self._unfinished.values():
                cancel()
            self._unfinished.clear()
            for choice in self._choices:
                self._state.metrics.count_end(choice.end)

    def _take(self, choice: Choice, event: Event) -> None:
        """Listens to the engine for a choice, on the event loop."""
        self._events.put_nowait((choice, event))

    @property
    def usage(self) -> Usage:
        """The tokens and seconds until now.

        Scored tokens are none of a completion's. They count as the prompt's where there are no
        completions; else they are the prompt itself, which the completions have.
        """
        completions = [choice for choice in self._choices if not choice.scored_tokens]
        prompts = (completions or self._choices)[:: self._repeats]
        first_tokens = [choice.first_token for choice in self._choices if choice.first_token]
        first = min(first_tokens, default=self._arrived)
        prompt_tokens = sum(len(choice.request.prompt) for choice in prompts)
        if not completions:
            prompt_tokens += sum(len(choice.scored_tokens) for choice in self._choices)
        return Usage(
            prompt=prompt_tokens,
            completion=sum(choice.completion.tokens for choice in completions),
            cached=sum(choice.cached or 0 for choice in prompts),
            first_seconds=first - self._arrived,
            seconds=time.monotonic() - self._arrived,
            passages=self._passages,
        )

    def _usage_at_end(self) -> Usage:
        """Returns the usage of completions that have ended, with what they have cost if that is asked
        for.
        """
        usage = self.usage
        if self._wants_cost:
            return usage._replace(cost=self._bill())
        return usage

    def _bill(self) -> Bill:
        """Returns what all completions together have cost: no tokens that followed a stop string, and of
        a prompt in the prefix cache the seconds to copy it.
        """
        flops = self._state.engine.engine.meter.flops
        prompt = Cost(0, 0.0)
        completion = Cost(0, 0.0)
        for choice in self._choices:
            request = choice.request
            is_adapted = request.adapter is not None
            last = len(request.prompt) - 1  # the position of the token after which it decodes
            if request.embed:
                prompt.flop += flops.embedded(0, last + 1, is_adapted)
            else:
                prompt.flop += flops.prefilled(choice.cached or 0, last, is_adapted)
                decoded = choice.completion.tokens + choice.ended_by_token
                completion.flop += flops.decoded(last, last + decoded, is_adapted)
            prompt.seconds += choice.prompt_seconds
            completion.seconds += choice.completion_seconds
        return make_bill(prompt, completion, self._state.price, self._state.step_flops)

    def log_fields(self) -> dict[str, int | float | str | None]:
        """Returns what a line of the server's log says of it."""
        usage = self.usage
        return {
            "prompt_tokens": usage.prompt,
            "cached_tokens": usage.cached,
            "completion_tokens": usage.completion,
            "finish": "+".join(choice.end for choice in self._choices),
            "first_token_seconds": round(usage.first_seconds, 4) or None,
        }

    def _piece(self, choice: Choice, event: Event) -> Piece:
        """Returns what an event brings, and counts it.

        Raises ApiError for one that is no part of a completion.
        """
        now = time.monotonic()
        completion = choice.completion
        tokens_before = completion.tokens
        text = choice.push(event.tokens, last=event.finish_reason is not None)
        new_tokens = completion.tokens - tokens_before
        choice.prompt_seconds = event.prompt_seconds
        choice.completion_seconds = event.completion_seconds
        choice.ended_by_token = event.stop_token is not None and completion.stopped is None
        if not choice.scored_tokens:
            self._state.metrics.generated.inc(new_tokens)
        self._count_first(choice, event, now)
        if event.finish_reason == "error" or event.finish_reason == "grammar":
            choice.end = "error"
            del self._unfinished[choice]
            raise self._error(event)
        reason: Reason | None = event.finish_reason
        if completion.stopped is not None:
            reason = "stop"
        if reason:
            self._finish(choice, event, reason, now)
        calls: Sequence[ToolCall] = ()
        if choice.parser:
            is_cut = reason == "length" or completion.stopped is not None
            text, calls = choice.parser.push(text, bool(reason), is_cut)
            if reason == "stop" and choice.parser.has_whole_calls:
                reason = "tool_calls"
        return Piece(
            choice=choice.index,
            text=text,
            logprobs=event.logprobs[:new_tokens],
            finish_reason=reason,
            stop=completion.stopped,
            calls=calls,
            embedding=event.embedding,
        )

    def _count_first(self, choice: Choice, event: Event, now: float) -> None:
        """Counts the prompt with the first event, and the time to the first token."""
        metrics = self._state.metrics
        if event.tokens and not choice.first_token:
            choice.first_token = now
            if not choice.scored_tokens:
                metrics.ttft.observe(now - self._arrived)
        if choice.cached is None:
            choice.cached = event.cached_tokens
            tokens = len(choice.request.prompt)
            looked_up = 0
            if not choice.request.embed and self._state.engine.engine.prefix_cache.limit > 0:
                looked_up = tokens
            metrics.count_prompt(tokens, looked_up, choice.cached)

    def _error(self, event: Event) -> ApiError:
        """Returns the error for an event by which a completion fails."""
        if event.finish_reason == "grammar":
            return ApiError(
                400, "The grammar became too complex to be followed any further: give a simpler one."
            )
        if self._state.engine.error:
            return ApiError(
                503, "The engine has failed and answers nothing any more; the server has to be started again."
            )
        return ApiError(
            500,
            "The model gave no finite logits to sample a token from: its weights are damaged or overflow.",
        )

    def _finish(self, choice: Choice, event: Event, reason: Reason, now: float) -> None:
        """Counts a completion that has ended, and cancels it in the engine where a stop string ended it."""
        choice.end = reason
        cancel = self._unfinished.pop(choice)
        if not event.finish_reason:
            cancel()
        seconds = now - self._arrived
        generated = 0 if choice.scored_tokens else choice.completion.tokens
        decoding = now - choice.first_token
        self._state.metrics.count_completion(len(choice.request.prompt), generated, seconds, decoding)
        if not self._unfinished:
            self._state.admission.record(self._place, seconds)


def choices_of(call: ApiCall, requests: Sequence[Request]) -> list[Choice]:
    """Returns the choices of requests that are not asked for a text."""
    tokenizer = call.state.tokenizer.tokenizer
    return [
        Choice(index, request, CompletionText(tokenizer.stream())) for index, request in enumerate(requests)
    ]


async def run(call: ApiCall, job: Job, writer: Writer) -> Generation:
    """Responds with a job's completions, as the writer has them; those of a prompt follow each other.

    Raises ApiError and InvalidField.
    """
    pool = call.state.tokenizer
    prompts = await job.prompt.encode(call.state)
    constraint = await compile_grammar(call.state, job)
    tools = job.prompt.tools
    choices: list[Choice] = []
    for index, request in enumerate(make_requests(call, job, prompts, constraint)):
        is_scored = isinstance(request.constraint, ForcedTokens)
        completion = CompletionText(pool.tokenizer.stream(), () if is_scored else job.stops)
        choice = Choice(
            index, request, completion, strips_space=prompts.strips_space, keeps_stop=job.keeps_stop
        )
        if tools.tools:
            choice.parser = CallParser(pool.tool_format, tools, is_free=job.grammar is None)
        choices.append(choice)
    return Generation(
        call,
        choices,
        writer.reply,
        writer=writer if job.streams else None,
        repeats=max(job.n, 1),
        passages=prompts.passages,
        ignored=[*job.ignored, *prompts.ignored],
    )
