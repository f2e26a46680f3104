"""Serves a run's page while it goes on, on this machine alone, from a thread: the page at /, its events at /events.

The events are a stream (server-sent events, https://html.spec.whatwg.org/multipage/server-sent-events.html). It begins with
what happened so far, or after the event that the browser had last. Each browser is written to by a thread of its own, which
reads what is kept here at its own speed, so that the run waits for none of them.

A page of another site can send requests to 127.0.0.1 from a person's browser, and by rebinding its name to 127.0.0.1 even read
the replies. So the Host must be ours, and an Origin, where there is one, that of our page.
"""

import bisect
import collections
import contextlib
import json
import re
import secrets
import socket
import socketserver
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

from engine.errors import UserError
from stages.runs.watch.page import page_html

HOST = re.compile(r"(127\.0\.0\.1|localhost)(:\d{1,5})?", re.IGNORECASE)
HEADERS = {
    "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin", "Cross-Origin-Opener-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}  # fmt: skip
KEPT = {"frame": 60}  # at most, of an event of the kind
KEPT_OF_OTHERS = 2000
PAUSE = 1.0  # seconds between writes to a browser, whose drawing takes time from the run
PATIENCE = 20.0  # seconds for a browser that does not send its request, or does not read
CLIENTS = 32


class Watch(socketserver.ThreadingTCPServer):
    """A sink of a run's events, and the server that shows them. Of a kind that has become too many it drops every second."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, port: int) -> None:
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except OSError as error:
            message = f"Port {port} of 127.0.0.1 cannot be listened on: {error.strerror}. Give another with --watch."
            raise UserError(message) from None
        self.run = secrets.token_hex(4)  # a browser may have had its last event from an earlier run
        self.events: list[tuple[int, str, bytes]] = []
        self.counts: collections.Counter[str] = collections.Counter()
        self.has_ended = False
        self.clients: set[socket.socket] = set()
        self.streams: set[socket.socket] = set()  # those of them that take events
        self.lock = threading.Condition()

    @property
    def url(self) -> str:
        return "http://{}:{}".format(*self.server_address)

    def is_watched(self) -> bool:
        return bool(self.streams)

    def __call__(self, event: dict[str, Any]) -> None:
        kind, number = event["event"], self.events[-1][0] + 1 if self.events else 1
        text = json.dumps(event, separators=(",", ":"), allow_nan=False)
        with self.lock:
            self.events.append((number, kind, f"id: {self.run}-{number}\ndata: {text}\n\n".encode()))
            self.counts[kind] += 1
            if self.counts[kind] > KEPT.get(kind, KEPT_OF_OTHERS):
                places = [place for place, (_, other, _) in enumerate(self.events) if other == kind]
                dropped = {*places[1:-1:2]}
                self.events = [each for place, each in enumerate(self.events) if place not in dropped]
                self.counts[kind] -= len(dropped)

    def after(self, number: int) -> list[tuple[int, str, bytes]]:
        with self.lock:
            return self.events[bisect.bisect_right(self.events, number, key=lambda each: each[0]) :]

    def end(self) -> None:
        """Ends once the browsers have every event, or after two seconds."""
        self.shutdown()
        with self.lock:
            self.has_ended = True
            for stream in self.streams:
                with contextlib.suppress(OSError):
                    stream.shutdown(socket.SHUT_RD)  # ends its pause
            self.lock.wait_for(lambda: not self.streams, timeout=2)
        self.server_close()

    def verify_request(self, request: Any, client_address: Any) -> bool:
        with self.lock:
            self.clients.add(request)
            return len(self.clients) <= CLIENTS

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        with self.lock:
            self.clients.discard(request)
            self.streams.discard(request)
            self.lock.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # the browser went away
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    server: Watch
    timeout = PATIENCE

    def do_GET(self) -> None:
        if problem := self._problem():
            self._reply(403, "text/plain", problem)
        elif self.path == "/":
            self._reply(200, "text/html", page_html({"lives": {}, "live": True}))
        elif self.path == "/events":
            self._stream()
        else:
            self._reply(404, "text/plain", "There is nothing here: the page is at /.")

    def _problem(self) -> str:
        """Returns why the request's sender may not have what it asks for, or nothing."""
        hosts, origins = self.headers.get_all("Host", []), self.headers.get_all("Origin", [])
        if len(hosts) != 1 or not HOST.fullmatch(hosts[0]):
            return f"The Host of a request must be {self.server.url.removeprefix('http://')}."
        is_foreign = self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin")
        is_link = self.path == "/" and not origins
        if (is_foreign and not is_link) or any(origin.lower() != f"http://{hosts[0].lower()}" for origin in origins):
            return "Pages of another site may not watch this run."
        return ""

    def _reply(self, status: int, kind: str, body: str = "") -> None:
        self.send_response(status)
        for name, value in {"Content-Type": f"{kind}; charset=utf-8", **HEADERS}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body.encode())

    def _stream(self) -> None:
        watch, stream = self.server, self.connection
        self._reply(200, "text/event-stream")
        run, _, last = self.headers.get("Last-Event-ID", "").partition("-")
        sent = int(last) if run == watch.run and last.isdecimal() else 0
        with watch.lock:
            watch.streams.add(stream)
        while True:
            ended = watch.has_ended  # before reading the events, of which none comes later
            stream.settimeout(PATIENCE)
            for number, _, message in watch.after(sent):
                self.wfile.write(message)
                sent = number
            stream.settimeout(PAUSE)
            if ended:
                return
            with contextlib.suppress(TimeoutError):
                stream.recv(1)  # returns where the browser goes away, or where `end` ends the pause
                if not watch.has_ended:
                    return

    def log_message(self, format: str, *args: Any) -> None:
        return


@contextlib.contextmanager
def serving(port: int) -> Iterator[Watch]:
    """Serves the page on 127.0.0.1 at `port`, or at a free one for 0. Raises UserError where it cannot."""
    watch = Watch(port)
    threading.Thread(target=watch.serve_forever, name="watch", daemon=True).start()
    try:
        yield watch
    finally:
        watch.end()
