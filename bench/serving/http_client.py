"""A client of HTTP/1.1 that is light enough to sit beside what it measures: bytes are kept as they come and read afterwards.

A client that parsed every token's JSON would take a core of two from the server. This one notes when each piece arrived
and how many bytes there were by then; `Answer` reads the rest once the answer is whole.
"""

import asyncio
import dataclasses
import json
import socket
from bisect import bisect_left
from collections.abc import Mapping
from typing import Any

from engine.counting.hardware import clock

MOST = 1 << 16  # bytes a read
Headers = Mapping[str, str]


class Parser:
    """The bytes of one response in, its body out. `status` and `headers` (names in lower case) once they are known, `done`
    when the response is whole, `rest` what came behind it. Raises ValueError for what is not HTTP/1.1."""

    def __init__(self, method: str = "GET") -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.done = False
        self.rest = b""
        self._method = method
        self._held = b""
        self._left: int | None = None  # bytes of the body or chunk to come; None: until the connection ends
        self._chunked = self._trailer = False

    def feed(self, data: bytes) -> bytes:
        """What is body in the bytes that came. None came: the connection has ended; raises EOFError when that is too soon."""
        if not data:
            if not self.status or self._chunked or self._left:
                raise EOFError("the connection ended inside an answer")
            self.done = True
            return b""
        self._held += data
        if not self.status and not self._head():
            return b""
        body = self._chunks() if self._chunked else self._plain()
        if self.done:
            self.rest, self._held = self._held, b""
        return body

    def _head(self) -> bool:
        head, found, held = self._held.partition(b"\r\n\r\n")
        if not found:
            return False
        first, *lines = head.decode("latin-1").split("\r\n")
        version, _, code = first.partition(" ")
        if not version.startswith("HTTP/1.") or not code[:3].isdigit():
            raise ValueError(f"not HTTP/1.1: {first[:80]!r}")
        if code[:3] == "100":
            self._held = held
            return bool(held) and self._head()
        self.status, self._held = int(code[:3]), held
        for line in lines:
            name, _, value = line.partition(":")
            self.headers[name.strip().lower()] = value.strip()
        self._chunked = "chunked" in self.headers.get("transfer-encoding", "").lower()
        length = self.headers.get("content-length")
        self._left = 0 if self._chunked else int(length) if length is not None else None
        if self._method == "HEAD" or self.status in (204, 304):
            self._chunked, self._left = False, 0
        return True

    def _plain(self) -> bytes:
        if self._left is None:
            body, self._held = self._held, b""
            return body
        body, self._held = self._held[: self._left], self._held[self._left :]
        self._left -= len(body)
        self.done = not self._left
        return body

    def _chunks(self) -> bytes:
        """Each chunk: its size in hex, a line end, so many bytes, a line end; a size of 0, lines and an empty one end it."""
        pieces = []
        while not self.done:
            if self._left and self._left > 0:
                piece, self._held = self._held[: self._left], self._held[self._left :]
                self._left -= len(piece)
                pieces.append(piece)
                if self._left:
                    break
                self._left = -2  # the line end behind the bytes
            if self._left == -2:
                if len(self._held) < 2:
                    break
                self._held, self._left = self._held[2:], 0
            line, found, held = self._held.partition(b"\r\n")
            if not found:
                break
            self._held = held
            if self._trailer:
                self.done = not line
                continue
            self._left = int(line.partition(b";")[0], 16)
            self._trailer = not self._left
        return b"".join(pieces)


@dataclasses.dataclass
class Answer:
    """A response, when it was asked for and when its pieces came: `pieces` are (moment, bytes of body by then)."""

    asked: float
    status: int = 0
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    body: bytes = b""
    pieces: list[tuple[float, int]] = dataclasses.field(default_factory=list)
    ended: float = 0.0
    broken: str | None = None  # why it is not whole

    @property
    def seconds(self) -> float:
        """From the asking to the end."""
        return self.ended - self.asked

    def json(self) -> Any:
        """The body as JSON. Raises ValueError."""
        return json.loads(self.body)

    def events(self) -> list[tuple[float, Any]]:
        """(moment, JSON) of each server-sent event, without the closing [DONE]."""
        found: list[tuple[float, Any]] = []
        start, ends = 0, [size for _, size in self.pieces]
        while True:
            marks = [(at, len(mark)) for mark in (b"\r\n\r\n", b"\n\n") if (at := self.body.find(mark, start)) >= 0]
            if not marks:
                return found
            stop, size = min(marks)
            lines = self.body[start:stop].splitlines()
            data = b"\n".join(line[5:].lstrip() for line in lines if line.startswith(b"data:"))
            start = stop + size
            if data and data != b"[DONE]":
                found.append((self.pieces[min(bisect_left(ends, start), len(ends) - 1)][0], json.loads(data)))


class Client:
    """Connections to one server, kept and used again. `key`: the API key that goes with every request."""

    def __init__(self, port: int, host: str = "127.0.0.1", key: str | None = None) -> None:
        self.host, self.port, self.key = host, port, key
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(
        self, method: str, path: str, body: Any = None, *, headers: Headers | None = None, seconds: float = 120.0,
        asked: float | None = None,
    ) -> Answer:  # fmt: skip
        """The whole answer. `body`: bytes as they are, anything else as JSON. `asked` is when it should have been sent.

        An answer that breaks off, or takes longer than `seconds`, says so in `broken`; nothing is raised for it.
        """
        answer = Answer(clock() if asked is None else asked)
        try:
            async with asyncio.timeout(seconds):
                await self._ask(answer, method, path, body, headers or {})
        except (OSError, EOFError, ValueError) as error:  # a TimeoutError is an OSError
            answer.broken = f"{type(error).__name__}: {error}".removesuffix(": ")
        answer.ended = clock()
        return answer

    async def _ask(self, answer: Answer, method: str, path: str, body: Any, headers: Headers) -> None:
        kept = bool(self._idle)
        reader, writer = self._idle.pop() if kept else await connect(self.host, self.port)
        parser, body_parts, size = Parser(method), [], 0
        try:
            writer.write(self.written(method, path, body, headers))
            while not parser.done:
                came = await reader.read(MOST)
                if kept and not came and not parser.status:  # the server had closed it meanwhile: it never saw the request
                    reader, writer = await connect(self.host, self.port)
                    writer.write(self.written(method, path, body, headers))
                    kept = False
                    continue
                part = parser.feed(came)
                if part:
                    size += len(part)
                    body_parts.append(part)
                    answer.pieces.append((clock(), size))
                answer.status, answer.headers = parser.status, parser.headers
        except BaseException:
            writer.transport.abort()
            raise
        finally:
            answer.body = b"".join(body_parts)
        if parser.headers.get("connection", "").lower() == "close" or parser.rest:
            writer.close()
        else:
            self._idle.append((reader, writer))

    def written(self, method: str, path: str, body: Any, headers: Headers) -> bytes:
        """The request as bytes."""
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        fields = {"host": f"{self.host}:{self.port}"}
        if self.key:
            fields["authorization"] = f"Bearer {self.key}"
        if body is not None:
            fields |= {"content-type": "application/json", "content-length": str(len(data))}
        fields |= {name.lower(): value for name, value in headers.items()}
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        return f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode("latin-1") + data

    async def get(self, path: str, **options: Any) -> Answer:
        return await self.ask("GET", path, **options)

    async def post(self, path: str, body: Any, **options: Any) -> Answer:
        return await self.ask("POST", path, body, **options)

    def close(self) -> None:
        """Closes the connections that are kept."""
        while self._idle:
            self._idle.pop()[1].close()


async def connect(host: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection that sends what it is given at once."""
    reader, writer = await asyncio.open_connection(host, port)
    writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return reader, writer


async def raw(host: str, port: int, data: bytes, method: str = "GET", seconds: float = 10.0) -> Answer:
    """The answer to bytes that no client would send, on a connection of their own."""
    answer, parser = Answer(clock()), Parser(method)
    try:
        async with asyncio.timeout(seconds):
            reader, writer = await connect(host, port)
            writer.write(data)
            while not parser.done:
                answer.body += parser.feed(await reader.read(MOST))
                answer.status, answer.headers = parser.status, parser.headers
            writer.transport.abort()
    except (OSError, EOFError, ValueError) as error:
        answer.broken = f"{type(error).__name__}: {error}".removesuffix(": ")
    answer.ended = clock()
    return answer
