"""Sends requests by an asyncio client light enough to run beside the server it measures; reads completions.

It reads what this server sends: heads, and bodies with a length or in chunks. JSON is parsed once a
response is whole: parsing every token's as it came took a core of two from the server. With h11 a
short request takes 1.4 times as much CPU (medians of rounds in turns, 200 requests a second on a
busy machine), and with httpx, which cannot send the malformed requests of the promises' tests, 1.8
times as much as with h11.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import math
import random
from bisect import bisect_left
from collections.abc import Mapping
from typing import Any

from bench.machine import Json
from engine.counting.hardware import clock

HOST = "127.0.0.1"
Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclasses.dataclass
class Response:
    """A response; `arrivals` are (moment, bytes of the body by then)."""

    sent_at: float
    status: int = 0
    headers: dict[str, str] = dataclasses.field(default_factory=dict)  # names in lower case
    body: bytearray = dataclasses.field(default_factory=bytearray)
    arrivals: list[tuple[float, int]] = dataclasses.field(default_factory=list)
    ended_at: float = 0.0
    error: str | None = None  # why it is not whole

    @property
    def seconds(self) -> float:
        return self.ended_at - self.sent_at

    def add(self, data: bytes) -> None:
        """Adds what has arrived of the body, at this moment."""
        self.body += data
        self.arrivals.append((clock(), len(self.body)))

    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[tuple[float, Any]]:
        """Returns (moment, JSON) of each whole server-sent event, without comments and the closing
        [DONE].
        """
        events = []
        end = 0
        sizes = [size for _, size in self.arrivals]
        for block in self.body.split(b"\n\n")[:-1]:
            end += len(block) + 2
            if block.startswith(b"data: {"):
                events.append((self.arrivals[bisect_left(sizes, end)][0], json.loads(block[6:])))
        return events


class Client:
    """Persistent connections to one server on this machine."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._idle: list[Stream] = []

    async def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        headers: Mapping[str, str] | None = None,
        timeout: float = 120.0,
        sent_at: float | None = None,
    ) -> Response:
        """Returns the whole response. `body`: bytes as they are, anything else as JSON. `sent_at`:
        when it should be sent.

        One that breaks off, or takes longer than `timeout` seconds, says so in `error`; nothing is
        raised.
        """
        data = self.encode(method, path, body, headers or {})
        return await self.exchange(Response(clock() if sent_at is None else sent_at), data, timeout)

    async def get(self, path: str, **options: Any) -> Response:
        return await self.request("GET", path, **options)

    async def post(self, path: str, body: Any, **options: Any) -> Response:
        return await self.request("POST", path, body, **options)

    def encode(self, method: str, path: str, body: Any, headers: Mapping[str, str]) -> bytes:
        data = b""
        fields = {"host": f"{HOST}:{self.port}"}
        if body is not None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            fields |= {"content-type": "application/json", "content-length": str(len(data))}
        fields |= {name.lower(): value for name, value in headers.items()}
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
        return "\r\n".join(lines).encode("latin-1") + data

    def close(self) -> None:
        while self._idle:
            self._idle.pop()[1].close()

    async def exchange(self, response: Response, data: bytes, timeout: float) -> Response:
        """Sends the bytes of a request; returns the response, with `error` unless it is whole."""
        try:
            async with asyncio.timeout(timeout):
                await self._receive(response, data)
        except (OSError, EOFError, ValueError, LookupError) as error:
            # a TimeoutError is an OSError
            response.error = f"{type(error).__name__}: {error}".removesuffix(": ")
        response.ended_at = clock()
        return response

    async def _receive(self, response: Response, data: bytes) -> None:
        """Sends the bytes of a request and reads its response, on a connection that waits or a new
        one. It waits for the next request afterwards, unless the server closes it.
        """
        stream, head = await self._send_and_read_head(data)
        reader, writer = stream
        try:
            first, *lines = head[:-4].decode("latin-1").split("\r\n")
            response.status = int(first.removeprefix("HTTP/1.1 ")[:3])
            for line in lines:
                name, value = line.split(":", 1)
                response.headers[name.lower()] = value.strip()
            if not data.startswith(b"HEAD "):
                await self._receive_body(response, reader)
        except BaseException:
            writer.transport.abort()
            raise
        if response.headers.get("connection") == "close":
            writer.close()
        else:
            self._idle.append(stream)

    async def _send_and_read_head(self, data: bytes) -> tuple[Stream, bytes]:
        """Returns the connection on which the request was sent, and the response's head. The server may
        have closed one that waited; then the request is sent again on a new one.
        """
        if self._idle:
            stream = self._idle.pop()
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                return stream, await _exchange_head(stream, data)
        stream = await asyncio.open_connection(HOST, self.port)
        return stream, await _exchange_head(stream, data)

    async def _receive_body(self, response: Response, reader: asyncio.StreamReader) -> None:
        if "transfer-encoding" not in response.headers:
            size = int(response.headers["content-length"])
            if size:
                response.add(await reader.readexactly(size))
            return
        size = int(await reader.readuntil(), 16)
        while size:
            response.add(await reader.readexactly(size))
            await reader.readexactly(2)
            size = int(await reader.readuntil(), 16)
        await reader.readexactly(2)


async def _exchange_head(stream: Stream, data: bytes) -> bytes:
    reader, writer = stream
    try:
        writer.write(data)
        return await reader.readuntil(b"\r\n\r\n")
    except BaseException:
        writer.transport.abort()
        raise


def completion_request(prompt: str | list[int], max_tokens: int, **fields: Any) -> Json:
    """Returns the body of a /v1/completions, streamed and greedy unless `fields` say otherwise."""
    body: Json = {"model": "default", "prompt": prompt, "max_tokens": max_tokens}
    body |= {"temperature": 0, "stream": True}
    body |= fields
    if body["stream"]:
        body.setdefault("stream_options", {"include_usage": True})
    return body


async def send(client: Client, body: Json, **options: Any) -> Response:
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    return await client.post(path, body, **options)


@dataclasses.dataclass(frozen=True)
class TimedCompletion:
    """What came of one request, and when. Seconds count from the request: `ttft` to the first
    token, `latency` to the last.

    `gaps`: seconds from each event with text to the next, which are the inter-token latencies that
    a reader sees.
    """

    status: int
    text: str
    completion_tokens: int
    prompt_tokens: int
    finish_reason: str | None
    ttft: float
    latency: float
    logprobs: tuple[float, ...] = ()
    gaps: tuple[float, ...] = ()
    error: str | None = None

    @property
    def finished(self) -> bool:
        return self.status == 200 and self.error is None and self.finish_reason in ("stop", "length")

    @property
    def time_per_output_token(self) -> float:
        """Mean seconds from one token to the next; NaN with fewer than two."""
        tokens = self.completion_tokens
        if tokens > 1:
            return (self.latency - self.ttft) / (tokens - 1)
        return math.nan


def read_completion(response: Response) -> TimedCompletion:
    """Parses the response to a completion or a chat, streamed or whole."""
    if response.error or response.status != 200:
        return TimedCompletion(
            status=response.status,
            text="",
            completion_tokens=0,
            prompt_tokens=0,
            finish_reason=None,
            ttft=math.nan,
            latency=response.seconds,
            error=response.error or _error_message(response),
        )
    if response.headers.get("content-type", "").startswith("text/event-stream"):
        events = response.events()
    else:
        events = [(response.ended_at, response.json())]
    full_text = ""
    logprobs = list[float]()
    usage = {"completion_tokens": 0, "prompt_tokens": 0}
    finish_reason = None
    error = None
    moments: list[float] = []  # of the events with text
    for moment, event in events:
        if "error" in event:
            error = event["error"]["message"]
        usage = event.get("usage") or usage
        for choice in event.get("choices", ()):
            message = choice.get("delta", choice.get("message", {}))
            text = choice.get("text") or message.get("content")
            values = choice.get("logprobs") or {}
            of_chat = [entry["logprob"] for entry in values.get("content") or ()]
            logprobs += of_chat or values.get("token_logprobs") or ()
            finish_reason = choice.get("finish_reason") or finish_reason
            if text:
                full_text += text
                moments.append(moment)
    first = moments[0] if moments else math.nan
    last = moments[-1] if moments else math.nan
    return TimedCompletion(
        status=200,
        text=full_text,
        completion_tokens=usage["completion_tokens"],
        prompt_tokens=usage["prompt_tokens"],
        finish_reason=finish_reason,
        ttft=first - response.sent_at,
        latency=last - response.sent_at,
        logprobs=tuple(logprobs),
        gaps=tuple(after - before for before, after in itertools.pairwise(moments)),
        error=error,
    )


def _error_message(response: Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.body[:200].decode("utf-8", "replace") or f"status {response.status}"


def random_text(rng: random.Random, words: int) -> str:
    """Returns short common words, about a token each. Two such texts hardly begin alike."""
    return " ".join(rng.choices(COMMON_WORDS.split(), k=words))


COMMON_WORDS = (
    "the of and to in is that for it as was with be "
    "by on not he but at are this have from or had an they which you were all her would their"
)
