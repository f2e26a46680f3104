"""The outermost layer of the application: checks the framing, Host, Origin and API key of each request.

It gives each request an id, adds headers to its response, counts it and may log it. An error
becomes the reply here.

A page of another site can send requests to 127.0.0.1 from a person's browser, and by rebinding its name to
127.0.0.1 even read the replies. So the Host must be one of ours, and an Origin, where there is one, that of
our page or a listed one, which gets CORS headers. The path is taken as it was written, without decoding or
folding: none has a second spelling that a check could miss. starlette's TrustedHostMiddleware reads only the
first of two Hosts, and its CORSMiddleware refuses nobody: it alone would let a simple POST through.
"""

import contextlib
import datetime
import hashlib
import hmac
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stages.serve.errors import CLIENT_CLOSED_REQUEST, ApiError, error_reply
from stages.serve.page import LIBRARIES

PAGE_PATH = "/"
# Answered without a key, for which the page itself asks.
KEYLESS_PATHS = (PAGE_PATH, "/live", "/health", *(f"/page/{name}" for name in LIBRARIES))
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]]+)(?::\d{1,5})?")  # a name, and perhaps a port
LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})

SECURITY_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
]
ID_HEADERS = (b"x-request-id", b"request-id")  # OpenAI's, and Anthropic's
# To scripts of listed origins.
EXPOSED_HEADERS = ("x-request-id", "request-id", "x-ignored-fields", "retry-after")


class Guard:
    """ASGI middleware: refuses a foreign Host or Origin, and a missing key except on KEYLESS_PATHS.

    Sets in the request's state `arrived`, by time.monotonic, `path`, as it was written below
    `root_path`, and `namespace`, that of its key, or empty without keys.

    `keys`: a request needs one of them, if there are any. `hosts`: names of the server, any when
    None. `origins`: those of other pages that may call it; their preflights are answered, without a
    key. `log`: off, short or json, a line on stdout after a response, without text or keys.
    `count(status)` is called for each response. `root_path`: the path below which a proxy shows the
    server, such as /llm. Requests may come with it, or without where the proxy takes it off.
    `open_metrics`: /metrics needs no key either.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Sequence[str],
        hosts: frozenset[str] | None,
        origins: frozenset[str],
        log: str = "off",
        count: Callable[[int], None] | None = None,
        root_path: str = "",
        open_metrics: bool = False,
    ) -> None:
        self._app = app
        self._keyless_paths = KEYLESS_PATHS
        if open_metrics:
            self._keyless_paths += ("/metrics",)
        self._hosts = hosts
        self._origins = origins
        self._log = log
        self._count = count
        self._root_path = root_path
        self._keys = [_hash(key.encode()) for key in keys]
        self._checked: ASGIApp = self._answer
        if origins:
            self._checked = CORSMiddleware(
                self._answer,
                allow_origins=origins,
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["*"],
                expose_headers=EXPOSED_HEADERS,
                allow_private_network=True,
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # there are no web sockets
            return
        state = scope.setdefault("state", {})
        status = CLIENT_CLOSED_REQUEST
        request_id = f"req_{os.urandom(12).hex()}"
        path = self._below_root(scope.get("raw_path", scope["path"].encode()).decode("latin-1"))
        state |= {"arrived": time.monotonic(), "path": path}

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._count:
                    self._count(status)
                id_headers = [(name, request_id.encode()) for name in ID_HEADERS]
                message["headers"] = [*message.get("headers", ()), *SECURITY_HEADERS, *id_headers]
            await send(message)

        try:
            self._check_sender(scope, Headers(scope=scope), path)
            await self._checked(scope, receive, send_with_headers)
        except ApiError as error:
            await error.reply(path)(scope, receive, send_with_headers)
        finally:
            if self._log != "off":
                self._write_log(scope, request_id, status)

    def _write_log(self, scope: Scope, request_id: str, status: int) -> None:
        state = scope["state"]
        seconds = time.monotonic() - state["arrived"]
        arrived_at = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=seconds)
        entry = {
            "time": arrived_at.isoformat(timespec="milliseconds"),
            "id": request_id,
            "client": (scope["client"] or ("-",))[0],
            "method": scope["method"],
            "path": state["path"][:200],
            "status": status,
            "seconds": round(seconds, 4),
        }
        if "generation" in state:
            entry |= state["generation"].log_fields()
        line = json.dumps(entry) if self._log == "json" else _short(entry)
        with contextlib.suppress(OSError, ValueError):  # nobody reads the log any more
            print(line, flush=True)

    def _below_root(self, path: str) -> str:
        if self._root_path and f"{path}/".startswith(f"{self._root_path}/"):
            return path.removeprefix(self._root_path) or "/"
        return path

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request with a key, or one that needs none; any other, or one that fails, by an error."""
        state = scope["state"]
        try:
            state["namespace"] = ""
            if self._keys and state["path"] not in self._keyless_paths:
                state["namespace"] = self._check_key(Headers(scope=scope))
            await self._app(scope, receive, send)
        except Exception as error:
            await error_reply(error, state["path"])(scope, receive, send)

    def _check_sender(self, scope: Scope, headers: Headers, path: str) -> None:
        """Raises ApiError for a body of two lengths, a Host that is not ours, or a page not allowed."""
        if "transfer-encoding" in headers and "content-length" in headers:  # request smuggling: RFC 9112, 6.3
            message = "Send Content-Length or Transfer-Encoding, not both."
            raise ApiError(400, message, code="bad_request", headers={"Connection": "close"})
        host = self._check_host(headers)
        own_origin = f"{scope.get('scheme', 'http')}://{host}"
        for origin in headers.getlist("origin"):
            if origin.lower() not in (own_origin, *self._origins):
                reason = "Pages of another origin may not use this server"
                message = f"{reason}; --allow-origin lets those of one in."
                raise ApiError(403, message, code="bad_origin")
        is_foreign = any(
            site.lower() in ("cross-site", "same-site") for site in headers.getlist("sec-fetch-site")
        )
        is_link = (
            path == PAGE_PATH
            and headers.getlist("sec-fetch-mode") == ["navigate"]
            and scope["method"] == "GET"
        )
        if is_foreign and "origin" not in headers and not is_link:
            raise ApiError(403, "Pages of another site may not use this server.", code="bad_origin")

    def _check_host(self, headers: Headers) -> str:
        """Returns the Host that the request names, in small letters. Raises ApiError if it is not ours."""
        hosts = headers.getlist("host")
        if len(hosts) != 1:
            raise ApiError(400, "The request must name one Host.", code="bad_host")
        host = hosts[0].lower()
        name = HOST.fullmatch(host)
        if self._hosts is not None and not (name and name[1].rstrip(".") in self._hosts):
            message = "This server has no such Host name; --allow-host gives it one."
            raise ApiError(403, message, code="bad_host")
        return host

    def _check_key(self, headers: Headers) -> str:
        """Returns the namespace of a valid key: its hash in hex.

        Compares with every key, each in constant time, so that timing gives none away. Raises
        ApiError (401) for a wrong or missing one.
        """
        sent = [*headers.getlist("authorization"), *(f"Bearer {key}" for key in headers.getlist("x-api-key"))]
        key = b""
        if len(sent) == 1:
            scheme, _, value = sent[0].partition(" ")
            if scheme.lower() == "bearer":
                key = value.strip().encode("latin-1")
        key_hash = _hash(key)
        matches = [hmac.compare_digest(key_hash, known) for known in self._keys]
        if not any(matches):
            message = "The API key is wrong."
            if not key:
                count = "One" if sent else "An"
                message = f"{count} API key is needed: send `Authorization: Bearer KEY`, or `x-api-key: KEY`."
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return key_hash.hex()


def _short(entry: dict[str, Any]) -> str:
    """Returns a line of the values of an entry, from the seventh on with their names."""
    values = [str(value) for value in entry.values()]
    pairs = [f"{name}={value}" for name, value in entry.items()]
    return " ".join(values[:6] + pairs[6:])


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(b"thrice:" + key).digest()
