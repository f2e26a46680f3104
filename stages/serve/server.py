"""Binds the socket and sets up uvicorn: hangs up on clients that send nothing, refuses non-HTTP in JSON."""

import asyncio
import contextlib
import errno
import ipaddress
import logging
import re
import resource
import socket
import sys
from collections.abc import Iterator
from http import HTTPStatus

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from engine.errors import UserError
from stages.serve.errors import ApiError

HEAD_SECONDS = 20.0  # for a request line and headers, and for a client that sent no HTTP to hang up
MAX_HEAD_BYTES = 32_768
BACKLOG = 1024


def is_local(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(host: str, port: int) -> socket.socket:
    """Returns a socket bound to the address, which `listen` opens to clients. Raises UserError."""
    try:
        numbers = "127.0.0.1" if host == "localhost" else host
        family, _, _, _, address = socket.getaddrinfo(numbers, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise UserError(f"There is no address {host!r} to listen on: {error}.") from None
    # asyncio turns Nagle's delay off where it reads that this is TCP; else a reply's body waits 40
    # ms behind its head.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    with _explained(sock, host, port):
        sock.bind(address)
    return sock


def listen(sock: socket.socket) -> None:
    """Lets clients connect. Raises UserError when another process already listens there."""
    host, port = sock.getsockname()[:2]
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))  # each connection is an open file
    with _explained(sock, host, port):
        sock.listen(BACKLOG)


@contextlib.contextmanager
def _explained(sock: socket.socket, host: str, port: int) -> Iterator[None]:
    """Closes the socket where the block raises OSError, and raises UserError, which says what to do."""
    try:
        yield
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            message = f"Port {port} of {host} is in use. End what uses it, or give another with --port."
        elif error.errno in (errno.EACCES, errno.EPERM):
            message = f"This user may not listen on port {port}. Give one of 1024 or above with --port."
        else:
            message = f"{host} port {port} cannot be listened on: {error.strerror or error}."
        raise UserError(message) from None


def make_server(app: ASGIApp) -> uvicorn.Server:
    """Returns uvicorn for the application; signals are left to the command."""
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            http=HttpProtocol,
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_config=None,
            log_level="critical",
            access_log=False,
            server_header=False,
            timeout_keep_alive=60,
            backlog=BACKLOG,
            proxy_headers=False,
            timeout_graceful_shutdown=5,
        )
    )
    server.capture_signals = contextlib.nullcontext  # type: ignore[assignment,method-assign]
    # asyncio warns of each client that hangs up while text is written to it.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    return server


class Connection(h11.Connection):
    """Refuses every head of more than MAX_HEAD_BYTES: h11 itself takes one of any size that comes at once."""

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        if self.their_state is h11.IDLE:
            received = self.trailing_data[0]
            if len(received) > MAX_HEAD_BYTES and not re.search(rb"\n\r?\n", received[:MAX_HEAD_BYTES]):
                raise h11.RemoteProtocolError("The head is too large.", error_status_hint=431)
        return super().next_event()


class HttpProtocol(H11Protocol):
    """Adds to uvicorn's protocol limits for a request's head, and the refusal of non-HTTP in JSON."""

    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.conn = Connection(h11.SERVER, MAX_HEAD_BYTES)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Passes the data on, and starts the time limit when it begins a later head.

        Drops what a refused client sends.
        """
        if self.conn.our_state is h11.MUST_CLOSE:
            return  # refused
        super().data_received(data)
        if self._waiting is None and (self.cycle is None or self.cycle.response_complete):
            self._wait()  # a head has begun, or a refused body goes on

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()

    def send_400_response(self, msg: str) -> None:
        """Refuses in JSON a head that is too large and what h11 cannot read, such as TLS.

        The client hangs up, within a limit.

        A socket closed while data comes is reset, and a reset discards the refusal that the client
        has not read.
        """
        is_head = self.conn.our_state is h11.IDLE
        if is_head or self.conn.our_state is h11.SEND_RESPONSE:
            self._send_refusal()
        if is_head:
            self.transport.write_eof()
            self._wait()
        else:
            self.transport.close()

    def _send_refusal(self) -> None:
        """Sends why a request is refused, which the error of h11 says that is being handled."""
        status = HTTPStatus.BAD_REQUEST
        message = "This is no HTTP request."
        if getattr(sys.exception(), "error_status_hint", 400) == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE:
            status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            limit = f"may have at most {MAX_HEAD_BYTES:,} bytes"
            message = f"The head of a request, its first line and headers, {limit}."
        body = ApiError(status, message, code="bad_request").body
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("connection", "close"),
        ]
        response = h11.Response(status_code=status, headers=headers, reason=status.phrase.encode())
        with contextlib.suppress(h11.LocalProtocolError):
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")

    def _wait(self) -> None:
        """Hangs up when HEAD_SECONDS have passed, unless it is called again or stopped."""
        self._stop_waiting()
        self._waiting = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
