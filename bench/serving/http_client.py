"""An HTTP/1.1 client that is light enough to sit beside the server it measures.

h11 reads the protocol. What the bytes mean is read once a response is whole: a client that parsed every token's JSON as it
came would take a core of two from the server. With 8 streams of events this one takes 26 us of CPU an event, 1.5 times
what a parser written for it took and 1% of a core at 400 tokens/s.
"""

import asyncio
import dataclasses
import json
import socket
from bisect import bisect_left
from collections.abc import Mapping
from typing import Any

import h11

from engine.counting.hardware import clock

READ_BYTES = 1 << 16
Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclasses.dataclass
class Response:
    """A response and its timeline: `arrivals` are (moment, bytes of the body received by then)."""

    sent_at: float
    status: int = 0
    headers: dict[str, str] = dataclasses.field(default_factory=dict)  # names in lower case
    body: bytearray = dataclasses.field(default_factory=bytearray)
    arrivals: list[tuple[float, int]] = dataclasses.field(default_factory=list)
    ended_at: float = 0.0
    error: str | None = None  # why it is not whole

    @property
    def seconds(self) -> float:
        """The time from sending the request to the end of the response."""
        return self.ended_at - self.sent_at

    def json(self) -> Any:
        """The body as JSON. Raises ValueError."""
        return json.loads(self.body)

    def events(self) -> list[tuple[float, Any]]:
        """(moment, JSON) of each server-sent event, without the closing [DONE]."""
        events: list[tuple[float, Any]] = []
        start, sizes = 0, [size for _, size in self.arrivals]
        while True:
            marks = [(at, len(mark)) for mark in (b"\r\n\r\n", b"\n\n") if (at := self.body.find(mark, start)) >= 0]
            if not marks:
                return events
            stop, size = min(marks)
            lines = self.body[start:stop].splitlines()
            data = b"\n".join(line[5:].lstrip() for line in lines if line.startswith(b"data:"))
            start = stop + size
            if data and data != b"[DONE]":
                moment = self.arrivals[min(bisect_left(sizes, start), len(sizes) - 1)][0]
                events.append((moment, json.loads(data)))


class Client:
    """Persistent connections to one server. `key`: the API key that goes with every request."""

    def __init__(self, port: int, host: str = "127.0.0.1", key: str | None = None) -> None:
        self.host, self.port, self.key = host, port, key
        self._idle: list[Stream] = []

    async def request(
        self, method: str, path: str, body: Any = None, *, headers: Mapping[str, str] | None = None, timeout: float = 120.0,
        sent_at: float | None = None,
    ) -> Response:  # fmt: skip
        """The whole response. `body`: bytes as they are, anything else as JSON. `sent_at`: when it should have been sent.

        A response that breaks off, or takes longer than `timeout` seconds, says so in `error`; nothing is raised for it.
        """
        protocol, data = self.encode(method, path, body, headers or {})
        return await _timed(
            Response(clock() if sent_at is None else sent_at), lambda response: self._send(response, protocol, data), timeout
        )

    async def get(self, path: str, **options: Any) -> Response:
        return await self.request("GET", path, **options)

    async def post(self, path: str, body: Any, **options: Any) -> Response:
        return await self.request("POST", path, body, **options)

    def encode(self, method: str, path: str, body: Any, headers: Mapping[str, str]) -> tuple[h11.Connection, bytes]:
        """The state of a connection that has sent this request, and the request's bytes."""
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        fields = {"host": f"{self.host}:{self.port}"}
        if self.key:
            fields["authorization"] = f"Bearer {self.key}"
        if body is not None:
            fields |= {"content-type": "application/json", "content-length": str(len(data))}
        fields |= {name.lower(): value for name, value in headers.items()}
        protocol = h11.Connection(h11.CLIENT)
        request = h11.Request(
            method=method, target=path, headers=[(name.encode(), value.encode("latin-1")) for name, value in fields.items()]
        )
        parts = [protocol.send(event) for event in (request, h11.Data(data=data), h11.EndOfMessage())]
        return protocol, b"".join(part for part in parts if part)

    def close(self) -> None:
        """Closes the idle connections."""
        while self._idle:
            self._idle.pop()[1].close()

    async def _send(self, response: Response, protocol: h11.Connection, data: bytes) -> None:
        reused = bool(self._idle)
        reader, writer = self._idle.pop() if reused else await connect(self.host, self.port)
        try:
            writer.write(data)
            received = await reader.read(READ_BYTES)
            if reused and not received:  # closed by the server while it was idle: it never saw the request
                reader, writer = await connect(self.host, self.port)
                writer.write(data)
                received = await reader.read(READ_BYTES)
            await _receive(response, protocol, reader, received)
        except BaseException:
            writer.transport.abort()
            raise
        if protocol.their_state is h11.DONE and not protocol.trailing_data[0]:
            self._idle.append((reader, writer))
        else:
            writer.close()


async def connect(host: str, port: int) -> Stream:
    """A connection that sends without delay (TCP_NODELAY)."""
    reader, writer = await asyncio.open_connection(host, port)
    writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return reader, writer


async def send_raw(host: str, port: int, data: bytes, method: str = "GET", timeout: float = 10.0) -> Response:
    """The response to bytes that no client would send, on a connection of their own."""
    protocol = h11.Connection(h11.CLIENT)
    protocol.send(h11.Request(method=method, target="/", headers=[("host", host)]))
    protocol.send(h11.EndOfMessage())

    async def exchange(response: Response) -> None:
        reader, writer = await connect(host, port)
        try:
            writer.write(data)
            await _receive(response, protocol, reader, await reader.read(READ_BYTES))
        finally:
            writer.transport.abort()

    return await _timed(Response(clock()), exchange, timeout)


async def _timed(response: Response, exchange: Any, timeout: float) -> Response:
    """The response once `exchange` has filled it in, or once that failed or took too long."""
    try:
        async with asyncio.timeout(timeout):
            await exchange(response)
    except (OSError, h11.ProtocolError) as error:  # a TimeoutError is an OSError
        response.error = f"{type(error).__name__}: {error}".removesuffix(": ")
    response.ended_at = clock()
    return response


async def _receive(response: Response, protocol: h11.Connection, reader: asyncio.StreamReader, received: bytes) -> None:
    """Reads the response to its end. Raises h11.RemoteProtocolError for what is not HTTP or ends too soon."""
    protocol.receive_data(received)
    while True:
        event = protocol.next_event()
        if event is h11.NEED_DATA:
            protocol.receive_data(await reader.read(READ_BYTES))
        elif isinstance(event, h11.Data):
            response.body += event.data
            response.arrivals.append((clock(), len(response.body)))
        elif isinstance(event, h11.Response):
            response.status = event.status_code
            response.headers = {name.decode(): value.decode("latin-1") for name, value in event.headers}
        elif isinstance(event, h11.EndOfMessage):
            return
