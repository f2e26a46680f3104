"""Generation: the completions of one HTTP request, from prompts over events to what the Writer of a dialect makes of them.

A handler, called by `answer_reserved`, makes Prompts, and returns what `generate` returns, or a Generation of requests of its
own: the response.
"""

import asyncio
import contextlib
import dataclasses
import functools
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import msgspec
from starlette.datastructures import Headers
from starlette.requests import Request as HttpRequest
from starlette.types import ASGIApp, Receive, Scope, Send

from engine.errors import InvalidField
from engine.inference.constraints import Constraint, ForcedTokens
from engine.inference.request import SEEDS, Event, LogProb, Request, SamplingParams, check_request
from engine.text.detokenizer import CompletionText
from engine.text.documents import Passage
from stages.serve.admission import Sender
from stages.serve.api.requests import INLINE_BYTES, Call, content_length, json_reply
from stages.serve.errors import ApiError, ClientGone, api_error
from stages.serve.tokenizer_pool import context_overflow
from stages.serve.tools import NO_TOOLS, CallParser, Grammar, ToolCall, ToolUse, Turn, join_calls

MAX_COMPLETIONS = 128  # prompts times n: later requests wait for them all
KEEP_ALIVE_SECONDS = 10.0  # of silence before a comment is sent: proxies close idle connections
WAIT_SECONDS = 0.5  # between looks at what a request waits for
SEND_SECONDS = 60.0  # for a client to read what it was sent
MAX_NAMED_VARIABLES = 16  # of a chat template, in a header
SAMPLING_FIELDS = [field.name for field in dataclasses.fields(SamplingParams)]

Reason = Literal["stop", "length", "tool_calls"]


class Prompts(NamedTuple):
    """The tokens of one request's prompts, of which `passages` of documents are a part.

    Each of `stop_token_ids` ends a completion. `strips_space`: whether a completion begins with a space that is none of it.
    `tools`: those that a completion may call. `ignored`: names of the body's fields that change no prompt.
    """

    tokens: Sequence[Sequence[int]]
    stop_token_ids: frozenset[int]
    strips_space: bool = False
    tools: ToolUse = NO_TOOLS
    passages: Sequence[Passage] = ()
    ignored: Sequence[str] = ()


class Piece(NamedTuple):
    """New text of choice number `choice`, its log-probabilities, and why the choice ended, or None.

    `stop`: the stop string that ended it. `calls` of tools, or their next parts, are none of the text. `embedding`: of the
    prompt, if that is asked for.
    """

    choice: int
    text: str
    logprobs: Sequence[LogProb]
    finish_reason: Reason | None
    stop: str | None = None
    calls: Sequence[ToolCall] = ()
    embedding: Any = None


class Usage(NamedTuple):
    """Tokens of the prompts, of the completions, and those of the prompts that the prefix cache held.

    `first_seconds`: from the request's arrival to the first token, 0 before it; `seconds`: until now. `passages`: see Prompts.
    """

    prompt: int
    completion: int
    cached: int
    first_seconds: float
    seconds: float
    passages: Sequence[Passage] = ()


type Answer[T] = ASGIApp  # that responds with a T, or a stream
Reply = Callable[[list[Piece], Usage], msgspec.Struct]  # of the pieces of whole completions


@dataclasses.dataclass(eq=False)
class Choice:
    """One completion. `first_token`: when it came, by time.monotonic. `cached`: tokens of the prompt from the prefix cache,
    None before the first event.

    `end`: stop, length, error, or abort when the client left or another one failed. `strips_space`: whether the space that may
    begin it is left out.
    """

    index: int
    request: Request
    completion: CompletionText
    strips_space: bool
    parser: CallParser | None
    first_token: float = 0.0
    cached: int | None = None
    end: str = "abort"

    @property
    def scored_tokens(self) -> Sequence[int]:
        """The given tokens whose log-probabilities are asked for: they are none of a completion's."""
        constraint = self.request.constraint
        return constraint.tokens if isinstance(constraint, ForcedTokens) else ()


class Generation:
    """The completions of one call in the engine, in its reserved place, and the response: an ASGI application, called once.

    They get slots one by one, in the order of priorities. `repeats`: how many requests in a row share a prompt, whose tokens
    count once. `keeps_stop`: the text ends with the stop string, and not before it. Responds with the `reply`, or, if it is
    asked for, the stream of a `writer`. `make_parser`: makes the parser of the calls in one completion.
    """

    def __init__(
        self,
        call: Call,
        prompts: Prompts,
        requests: Sequence[Request],
        reply: Reply,
        repeats: int = 1,
        stops: Sequence[str] = (),
        writer: "Writer | None" = None,
        keeps_stop: bool = False,
        make_parser: Callable[[], CallParser] | None = None,
    ) -> None:
        self._state = state = call.state
        self._keeps_stop = keeps_stop
        self._priority, self._arrived = call.priority, call.http.state.arrived
        self._repeats, self._passages = repeats, prompts.passages
        self._reply, self._writer = reply, writer if getattr(call.body, "stream", False) else None
        self._headers = ignored_header([*call.body.ignored, *prompts.ignored])
        call.http.state.generation = self
        self._events: asyncio.Queue[tuple[Choice, Event] | None] = asyncio.Queue()
        self._unfinished: dict[Choice, Callable[[], None]] = {}  # with what cancels it
        for index, request in enumerate(requests):
            is_scored = isinstance(request.constraint, ForcedTokens)
            completion = CompletionText(state.tokenizer.tokenizer.stream(), () if is_scored else stops)
            parser = make_parser() if make_parser else None
            choice = Choice(index, request, completion, prompts.strips_space, parser)
            receive = lambda event, choice=choice: self._events.put_nowait((choice, event))
            self._unfinished[choice] = state.engine.submit(request, self._priority, receive)
        self._choices = [*self._unfinished]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._writer:
            async with self._watch_disconnect(receive):
                response = json_reply(self._reply(await self._collect(), self.usage), headers=self._headers)
            return await response(scope, receive, send)

        async def write(event: bytes, more: bool = True) -> None:
            async with asyncio.timeout(SEND_SECONDS):
                await send({"type": "http.response.body", "body": event, "more_body": more})

        headers = {"content-type": self._writer.media, "cache-control": "no-cache", "x-accel-buffering": "no", **self._headers}
        with contextlib.suppress(ClientGone, OSError):  # nobody reads it; a TimeoutError is an OSError
            async with self._watch_disconnect(receive):
                await send({"type": "http.response.start", "status": 200, "headers": Headers(headers).raw})
                async for event in self._stream(self._writer):
                    await write(event)
                await write(self._writer.last, more=False)
        return None

    async def _stream(self, writer: "Writer") -> AsyncIterator[bytes]:
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
            for chunk in writer.end(self.usage):
                yield writer.frame(chunk)
        except ClientGone:
            raise
        except Exception as error:
            yield writer.error(api_error(error))

    async def _pieces(self) -> AsyncIterator[Piece | str]:
        """Yields the pieces of all completions as they come, in a stream in between what the request waits for: before the
        first piece whenever that changes, and after KEEP_ALIVE_SECONDS of silence.

        Raises ClientGone when the client has left, ApiError when the engine has failed.
        """
        wait, last, seconds = "waiting", time.monotonic(), WAIT_SECONDS
        while self._unfinished:
            try:
                item = await asyncio.wait_for(self._events.get(), seconds if self._writer else None)
            except TimeoutError:
                before, wait = wait, self._wait()
                if wait != before or time.monotonic() - last >= KEEP_ALIVE_SECONDS:
                    last = time.monotonic()
                    yield wait
                continue
            if item is None:
                raise ClientGone
            wait, last, seconds = "waiting", time.monotonic(), KEEP_ALIVE_SECONDS
            if item[0] in self._unfinished:
                yield self._piece(*item)

    def _wait(self) -> str:
        """Returns what the request waits for: a slot, its prompt, or the next token."""
        engine = self._state.engine.engine
        position = engine.queue_position(self._priority)
        if position:
            return f"place {position} in the queue"
        done, tokens = engine.prefill_progress(self._priority)
        if not tokens:
            return "waiting"
        from_documents = sum(passage.tokens for passage in self._passages)
        return f"reading {done} of {tokens} tokens" + (f", {from_documents} of documents" if from_documents else "")

    async def _collect(self) -> list[Piece]:
        """Returns one piece for each completion. Raises as `_pieces`."""
        parts: list[list[Piece]] = [[] for _ in self._choices]
        async for piece in self._pieces():
            if isinstance(piece, Piece):
                parts[piece.choice].append(piece)
        together = lambda own: own[-1]._replace(
            text="".join(part.text for part in own),
            logprobs=[each for part in own for each in part.logprobs],
            calls=join_calls(call for part in own for call in part.calls),
        )
        return list(map(together, parts))

    @contextlib.asynccontextmanager
    async def _watch_disconnect(self, receive: Receive) -> AsyncIterator[None]:
        """Within the block, `_pieces` notices a client that leaves. Its end cancels what is unfinished and frees the place."""

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                continue
            self._events.put_nowait(None)

        watching = asyncio.create_task(watch())
        try:
            yield
        finally:
            watching.cancel()
            for cancel in self._unfinished.values():
                cancel()
            self._unfinished.clear()
            for choice in self._choices:
                self._state.metrics.count_end(choice.end)
            self._state.admission.release()

    @property
    def usage(self) -> Usage:
        completions = [choice for choice in self._choices if not choice.scored_tokens]
        scored = [] if completions else self._choices  # else they are of the completions' prompts
        prompts = (completions or scored)[:: self._repeats]
        first = min((choice.first_token for choice in self._choices if choice.first_token), default=self._arrived)
        return Usage(
            sum(len(choice.request.prompt) for choice in prompts) + sum(len(choice.scored_tokens) for choice in scored),
            sum(choice.completion.tokens for choice in completions),
            sum(choice.cached or 0 for choice in prompts),
            first - self._arrived,
            time.monotonic() - self._arrived,
            self._passages,
        )

    def log_fields(self) -> dict[str, int | float | str | None]:
        usage = self.usage
        return {
            "prompt_tokens": usage.prompt,
            "cached_tokens": usage.cached,
            "completion_tokens": usage.completion,
            "finish": "+".join(choice.end for choice in self._choices),
            "first_token_seconds": round(usage.first_seconds, 4) or None,
        }

    def _piece(self, choice: Choice, event: Event) -> Piece:
        completion, now, metrics = choice.completion, time.monotonic(), self._state.metrics
        before = completion.tokens
        text = completion.push(event.tokens, last=event.finish_reason is not None)
        if self._keeps_stop and completion.stopped is not None:
            text += completion.stopped
        is_scored = bool(choice.scored_tokens)
        metrics.generated.inc(0 if is_scored else completion.tokens - before)
        if event.tokens and not choice.first_token:
            choice.first_token = now
            if not is_scored:
                metrics.ttft.observe(now - self._arrived)
        if choice.cached is None:
            choice.cached, prompt = event.cached_tokens, len(choice.request.prompt)
            looks_up = not choice.request.embed and self._state.engine.engine.prefix_cache.limit > 0
            metrics.count_prompt(prompt, prompt * looks_up, choice.cached)
        if event.finish_reason == "error" or event.finish_reason == "grammar":
            choice.end = "error"
            del self._unfinished[choice]
            if event.finish_reason == "grammar":
                raise ApiError(400, "The grammar became too complex to be followed any further: give a simpler one.")
            if self._state.engine.error:
                raise ApiError(503, "The engine has failed and answers nothing any more; the server has to be started again.")
            raise ApiError(500, "The model gave no finite logits to sample a token from: its weights are damaged or overflow.")
        reason: Reason | None = "stop" if completion.stopped is not None else event.finish_reason
        if reason:
            choice.end = reason
            cancel = self._unfinished.pop(choice)
            if not event.finish_reason:
                cancel()
            seconds = now - self._arrived
            generated = 0 if is_scored else completion.tokens
            metrics.count_completion(len(choice.request.prompt), generated, seconds, now - choice.first_token)
            if not self._unfinished:
                self._state.admission.record(seconds)
        if choice.strips_space and text:
            text, choice.strips_space = text.removeprefix(" "), False
        calls: Sequence[ToolCall] = ()
        if choice.parser:
            is_cut = reason == "length" or completion.stopped is not None
            text, calls = choice.parser.push(text, bool(reason), is_cut)
            reason = "tool_calls" if reason == "stop" and choice.parser.has_whole_calls else reason
        logprobs = event.logprobs[: completion.tokens - before]
        return Piece(choice.index, text, logprobs, reason, completion.stopped, calls, event.embedding)


class Writer:
    """Writes the pieces of a generation in one dialect, as a reply of one Struct or as the chunks of a stream.

    A stream is what `begin`, `chunks`, for each piece, and `end` return, each chunk as `frame` has it, and then `last`: by
    default server-sent events as OpenAI has them. `comment` is a line that clients pass over.
    """

    media = "text/event-stream; charset=utf-8"
    last = b"data: [DONE]\n\n"

    def reply(self, pieces: list[Piece], usage: Usage) -> msgspec.Struct:
        raise NotImplementedError

    def begin(self, usage: Usage) -> Iterable[Any]:
        return ()

    def chunks(self, piece: Piece) -> Iterable[Any]:
        raise NotImplementedError

    def end(self, usage: Usage) -> Iterable[Any]:
        return ()

    def frame(self, chunk: Any) -> bytes:
        return b"data: " + msgspec.json.encode(chunk) + b"\n\n"

    def error(self, error: ApiError) -> bytes:
        return b"data: " + error.body + b"\n\n"

    def comment(self, text: str) -> bytes:
        return f": {text}\n\n".encode()


class EventWriter(Writer):
    """Writes server-sent events that have their chunk's type as a name."""

    last = b""

    def frame(self, chunk: Any) -> bytes:
        return b"event: " + chunk["type"].encode() + b"\n" + super().frame(chunk)

    def error(self, error: ApiError) -> bytes:
        return b"event: error\n" + super().error(error)


def ignored_header(names: Sequence[str]) -> dict[str, str]:
    """Returns the header that names the fields of a body that change no answer; no header without names."""
    return {"X-Ignored-Fields": ", ".join(names)} if names else {}


async def text_prompts(call: Call, most: int, special: bool = True) -> Prompts:
    """Returns the prompts of a body, at most so many, of one token or more each; `special` as of TokenizerPool.encode.

    Raises InvalidField.
    """
    texts, field, vocab = call.body.texts(most), call.body.prompt_field, call.state.engine.cfg.vocab
    tokens = await call.state.tokenizer.encode(texts, special) if isinstance(texts[0], str) else texts
    for number, each in enumerate(tokens):
        name = f"{field}[{number}]" if len(tokens) > 1 else field
        if not each:
            raise InvalidField(field, f"{name} has no tokens; give at least one.")
        if max(each) >= vocab:
            raise InvalidField(field, f"{name} holds an id outside the vocabulary of {vocab:,}.")
    return Prompts(tokens, call.state.stop_token_ids)


async def chat_prompts(
    call: Call,
    turns: Sequence[Turn],
    answer: str = "",
    tools: ToolUse = NO_TOOLS,
    variables: Mapping[str, Any] | None = None,
) -> Prompts:
    """Returns the prompt of a conversation. `answer`: the beginning of the assistant's turn, which the completion continues.

    `variables`: what else the template reads. Raises ApiError and InvalidField.
    """
    pool = call.state.tokenizer
    tokens, passages = await pool.encode_chat(turns, answer, variables, tools.tools)
    strips_space = pool.strips_space and not answer
    ignored = unread_variables(pool.template, variables or ())
    return Prompts([tokens], call.state.stop_token_ids | pool.eot_ids, strips_space, tools, passages, ignored)


def unread_variables(source: str, names: Iterable[str]) -> list[str]:
    """Returns the variables that a chat template does not read, as fields of a body; one field if a header cannot name them."""
    unread = [name for name in names if name not in template_variables(source)]
    if len(unread) > MAX_NAMED_VARIABLES or not all(re.fullmatch(r"\w{1,64}", name, re.ASCII) for name in unread):
        return ["chat_template_kwargs"]
    return [f"chat_template_kwargs.{name}" for name in unread]


@functools.cache
def template_variables(source: str) -> frozenset[str]:
    """Returns the names that a chat template may read from a request: those in its expressions and statements.

    Those that fields of the conversation fill, such as `messages`, are left out.
    """
    code = " ".join(re.findall(r"\{[{%](.*?)[%}]\}", source, re.DOTALL))
    without_texts = re.sub(r"'[^']*'|\"[^\"]*\"", " ", code)
    return frozenset(re.findall(r"(?<![.\w])\w+", without_texts)) - {"messages", "tools", "add_generation_prompt"}


def check_ready(call: Call) -> None:
    """Raises ApiError while no completion can be admitted: 503 when not ready, 429 for a large body when places are taken.

    That of a small one waits until its number of completions is known.
    """
    call.state.check_ready()
    if content_length(call.http) > INLINE_BYTES:
        call.state.admission.check(*_arrival(call.http, 0))


async def answer_reserved(handler: Callable[[Call], Awaitable[ASGIApp]], call: Call) -> ASGIApp:
    """Reserves a place before the prompts become tokens. The Generation that the handler returns frees it, or its error.

    Raises ApiError, InvalidField, and what the handler raises.
    """
    if (choices := call.body.choices) > MAX_COMPLETIONS:
        message = f"prompts times n are {choices:,} completions; at most {MAX_COMPLETIONS} are made for one request."
        raise InvalidField("n", message)
    call.priority = call.state.admission.reserve(*_arrival(call.http, choices))
    try:
        return await handler(call)
    except BaseException:
        call.state.admission.release()
        raise


def _arrival(http: HttpRequest, choices: int) -> tuple[Sender, float, int | None]:
    """Returns who sends a request, now, and how often the clients of OpenAI and Anthropic say that they have sent it before."""
    (address, port), length = http.client or ("", 0), content_length(http)
    count = http.headers.get("x-stainless-retry-count", "")
    sender = Sender(port, (address, http.state.namespace, length if length > INLINE_BYTES else choices))
    return sender, time.monotonic(), int(count) if count.isdecimal() and len(count) < 4 else None


def make_request(
    call: Call,
    prompt: Sequence[int],
    sampling: SamplingParams,
    constraint: Constraint | None = None,
    embed: bool = False,
) -> Request:
    """Returns the engine's request for a prompt. Raises ApiError if the adapter has been removed, and InvalidField as
    `check_request` does, for the body's field that has the prompt."""
    adapter, engine = call.state.adapter_of(call.model), call.state.engine
    namespace = call.http.state.namespace + (getattr(call.body, "cache_salt", None) or "")
    request = Request(tuple(prompt), sampling, namespace, constraint, embed, adapter)
    try:
        check_request(request, engine.cfg.vocab, engine.capacity)
    except InvalidField as error:
        raise InvalidField(call.body.prompt_field if error.field == "prompt" else error.field, str(error)) from None
    return request


def make_scored(call: Call, prompt: Sequence[int], tokens: Sequence[int], field: str, top: int = 0) -> Request:
    """Returns the request for the log-probabilities of `tokens`, in a field of the body, after a prompt.

    Raises ApiError and InvalidField.
    """
    count, capacity, vocab = len(prompt) + len(tokens), call.state.engine.capacity, call.state.engine.cfg.vocab
    if count > capacity:
        raise context_overflow(count, capacity, field, "prompt and answer have")
    if max(tokens) >= vocab:  # a mask has no bit for it
        raise InvalidField(field, f"{field} holds an id outside the vocabulary of {vocab:,}.")
    # As those of a completion's own tokens are, in the same program.
    sampling = SamplingParams(max_tokens=len(tokens), temperature=0.0, logprobs=top)
    return make_request(call, prompt, sampling, ForcedTokens(tokens))


async def generate(
    call: Call,
    prompts: Prompts,
    writer: Writer,
    *,
    fields: msgspec.Struct | None = None,
    grammars: Sequence[Grammar] = (),
    scores: bool = False,
    keeps_stop: bool = False,
    **overrides: Any,
) -> ASGIApp:
    """Responds with `n` completions of each prompt; those of a prompt follow each other.

    `fields`, by default the body, has `n`, the strings that `stop` a completion, `ignore_eos`, and fields of SamplingParams,
    if it has them; None stands for the default. `overrides` are those of SamplingParams that the dialect has in its own form.
    All keep to the grammar, of which there is one at most. At most `max_tokens` are generated, by default and at most as many
    as fit; with 0 there is no completion. With `scores` the tokens of each prompt but its first come before its completions,
    if there are others; they need `logprobs`. `keeps_stop` as of Generation. Raises ApiError and InvalidField.
    """
    state, body = call.state, call.body
    field = lambda name: overrides[name] if name in overrides else getattr(fields or body, name, None)
    options = {name: value for name in SAMPLING_FIELDS if (value := field(name)) is not None}
    capacity, n, stop = state.engine.capacity, field("n") or 1, field("stop") or ()
    limit, seed = options.get("max_tokens", capacity), options.get("seed", int.from_bytes(os.urandom(4)))
    ends = frozenset(options.get("stop_token_ids", ())) | (frozenset() if field("ignore_eos") else prompts.stop_token_ids)
    if len(grammars) > 1:
        message = f"{grammars[1].field} is sent beside {grammars[0].field}: a completion keeps to only one grammar."
        raise InvalidField(grammars[1].field, message)
    grammar = grammars[0] if grammars else None
    make_parser = None
    if prompts.tools.tools:
        if grammar:  # whose field an error shall name, and not `tools`
            await state.tokenizer.compile(grammar)
        make_parser = functools.partial(CallParser, state.tokenizer.tool_format, prompts.tools, is_free=grammar is None)
        grammar = prompts.tools.grammar(state.tokenizer.tool_format, grammar)
    constraint = await state.tokenizer.compile(grammar) if grammar else None
    requests: list[Request] = []
    for number, prompt in enumerate(prompts.tokens):
        room = capacity - len(prompt)
        if room < bool(limit):
            raise context_overflow(len(prompt), capacity, body.prompt_field)
        if scores and len(prompt) > 1:
            requests.append(make_scored(call, prompt[:1], prompt[1:], body.prompt_field, options["logprobs"]))
        if limit:
            options.update(max_tokens=min(limit, room), seed=(seed + number * n) % SEEDS, stop_token_ids=ends)
            first = make_request(call, prompt, dataclasses.replace(state.sampling, **options), constraint)
            _, *others = first.sampling.per_row(n)  # each with its own seed
            requests += [first, *(dataclasses.replace(first, sampling=row) for row in others)]
    repeats = n if limit else 1
    stops = [stop] if isinstance(stop, str) else stop
    return Generation(call, prompts, requests, writer.reply, repeats, stops, writer, keeps_stop, make_parser)
