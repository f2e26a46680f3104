"""Serves a run's page while it goes on, on this machine alone: the page at /, its events at /events.

The events are a stream (server-sent events,
https://html.spec.whatwg.org/multipage/server-sent-events.html) that begins with what happened so
far, or after the event that the browser had last. A thread for each browser sends it what is kept
here at the browser's own speed, so that the run waits for none.

By rebinding its name to 127.0.0.1 a page of another site could read the replies, so the Host must
be ours; one that does not read them could keep the run at work, so the events are for our page
alone.
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
import time
from http.server import BaseHTTPRequestHandler
from typing import Any, NamedTuple

from engine.errors import UserError
from stages.runs.watch.page import page_html

HOST = re.compile(r"(127\.0\.0\.1|localhost)(:\d+)?", re.IGNORECASE)
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}
MOST_OF_KIND = {"frame": 60}  # events that a browser gets that comes later
MOST_OF_OTHER_KINDS = 2000
PAUSE = 1.0  # seconds between writes to a browser, whose drawing takes time from the run
PATIENCE = 20.0  # seconds for a browser to send its request, or to read what it is sent


class SentEvent(NamedTuple):
    """An event as browsers get it."""

    number: int  # from 1
    kind: str
    message: bytes


class Watch(socketserver.ThreadingTCPServer):
    """A sink of a run's events that shows them at `url`, as a context. Of a kind that is too many
    it drops every second.

    `port`: 0 takes a free one. Raises UserError for one that cannot be had.
    """

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, port: int) -> None:
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except OSError as error:
            message = f"Port {port} of 127.0.0.1 cannot be listened on: {error.strerror}. Give another with --watch."
            raise UserError(message) from None
        self.url = "http://{}:{}".format(*self.server_address)
        self.run = secrets.token_hex(4)  # a browser may have had its last event from an earlier run
        self.events: list[SentEvent] = []
        self.counts: collections.Counter[str] = collections.Counter()
        self.has_ended = False
        self.streams: set[socket.socket] = set()
        threading.Thread(target=self.serve_forever, name="watch", daemon=True).start()

    def __exit__(self, *_: object) -> None:
        """Ends once the browsers have every event, or after two seconds."""
        self.shutdown()
        self.has_ended = True
        for stream in [*self.streams]:
            with contextlib.suppress(OSError):
                stream.shutdown(socket.SHUT_RD)  # ends its pause
        late = time.monotonic() + 2
        while self.streams and time.monotonic() < late:
            time.sleep(0.01)
        self.server_close()

    def is_watched(self) -> bool:
        return bool(self.streams)

    def __call__(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        number = 1
        if self.events:
            number = self.events[-1].number + 1
        text = json.dumps(event, separators=(",", ":"), allow_nan=False)
        message = f"id: {self.run}-{number}\ndata: {text}\n\n".encode()
        self.events.append(SentEvent(number, kind, message))
        self.counts[kind] += 1
        if self.counts[kind] > MOST_OF_KIND.get(kind, MOST_OF_OTHER_KINDS):
            self._drop_every_second(kind)

    def _drop_every_second(self, kind: str) -> None:
        """Drops every second event of the kind, the first and the last never."""
        numbers = [sent.number for sent in self.events if sent.kind == kind]
        dropped_numbers = {*numbers[1:-1:2]}
        # A list of its own: browsers' threads read the other one.
        self.events = [sent for sent in self.events if sent.number not in dropped_numbers]
        self.counts[kind] -= len(dropped_numbers)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # the browser went away
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    server: Watch
    timeout = PATIENCE

    def do_GET(self) -> None:
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or not HOST.fullmatch(hosts[0]):
            self._reply(403, "text/plain", f"The run is watched at {self.server.url}, and by no other name.")
        elif self.path == "/":
            self._reply(200, "text/html", page_html({"lives": {}, "live": True}))
        elif self.path != "/events":
            self._reply(404, "text/plain", f"The page is at {self.server.url}.")
        elif self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            self._reply(403, "text/plain", "Pages of another site may not watch the run.")
        else:
            self._reply(200, "text/event-stream")
            self.server.streams.add(self.connection)
            try:
                self._stream()
            finally:
                self.server.streams.discard(self.connection)

    def _reply(self, status: int, kind: str, body: str = "") -> None:
        self.send_response(status)
        for name, value in {"Content-Type": f"{kind}; charset=utf-8", **HEADERS}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body.encode())

    def _stream(self) -> None:
        """Sends events until the run ends or the browser goes away."""
        sent = self._last_received()
        has_ended = False
        while not has_ended:
            has_ended = self.server.has_ended  # before the events: none comes after the end
            sent = self._send_after(sent)
            if self._goes_away():
                return

    def _last_received(self) -> int:
        """Returns the number of the event that the browser had last, 0 where it had none of this
        run."""
        last_id = self.headers.get("Last-Event-ID", "")
        match = re.fullmatch(rf"{self.server.run}-(\d{{1,15}})", last_id)
        if match is None:
            return 0
        return int(match[1])

    def _send_after(self, sent: int) -> int:
        """Sends the events after number `sent`. Returns the last one's number."""
        events = self.server.events
        first = bisect.bisect_right(events, sent, key=lambda event: event.number)
        self.connection.settimeout(PATIENCE)
        for event in events[first:]:
            self.wfile.write(event.message)
            sent = event.number
        return sent

    def _goes_away(self) -> bool:
        """Pauses. Returns whether the browser went away meanwhile, before the run's end."""
        self.connection.settimeout(PAUSE)
        try:
            self.connection.recv(1)  # returns when the browser goes away, and at the end
        except TimeoutError:
            return False
        return not self.server.has_ended

    def log_message(self, format: str, *args: Any) -> None:
        return
