"""Checks the Host, the Origin and the API key of each request, in this order, before anything else.

A page of another site can send requests to 127.0.0.1 from a person's browser, and by rebinding its name to 127.0.0.1 even
read the replies. So the Host must be one of ours, and an Origin, where there is one, that of our page. Paths are matched as
they were written, without decoding or folding: no path has a second spelling that a check could miss.
"""

import base64
import contextlib
import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stages.serve.errors import ApiError

KEYLESS_PATH = "/live"  # answered without a key
PAGE_PATH = "/"
NO_ROUTE = "There is no such route; /openapi.json lists them all."
PATH = re.compile(r"/|(?:/[A-Za-z0-9_.~:@!$&'()*+,;=-]+)+/?")
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]]+)(?::\d{1,5})?")  # a name, and perhaps a port
LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})

SECURITY_HEADERS = [
    (b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"), (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"), (b"cross-origin-opener-policy", b"same-origin"),
]  # fmt: skip


class Guard:
    """ASGI middleware: refuses a foreign Host or Origin, and except on /live a missing key; adds security, not CORS, headers.

    It leaves the `namespace` of a request's key, and when it `arrived`, in the request's state.

    `keys`: a request needs one of them, if there are any. `hosts`: names of the server, any when None. `origins`: those of
    other pages that may call it. `count(status)` is called for each response.
    """

    def __init__(
        self, app: ASGIApp, keys: Sequence[str], hosts: frozenset[str] | None, origins: frozenset[str],
        count: Callable[[int], None],
    ) -> None:  # fmt: skip
        self._app, self._hosts, self._origins, self._count = app, hosts, origins, count
        self._keys = [_hash(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # there are no web sockets
            return
        arrived = time.monotonic()

        async def send_secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._count(message["status"])
                request_id = b"x-request-id", b"req_" + secrets.token_hex(12).encode()
                message["headers"] = [*message.get("headers", ()), *SECURITY_HEADERS, request_id]
            await send(message)

        try:
            namespace = self._check(scope)
        except ApiError as error:
            await error.reply()(scope, receive, send_secured)
            return
        scope.setdefault("state", {}).update(namespace=namespace, arrived=arrived)
        await self._app(scope, receive, send_secured)

    def _check(self, scope: Scope) -> str:
        """Returns the caller's namespace, a name for their key. Raises ApiError."""
        path = scope.get("raw_path", scope["path"].encode()).decode("latin-1")
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1:
            raise ApiError(400, "The request must name one Host.", code="bad_host")
        host = hosts[0].lower()
        name = HOST.fullmatch(host)
        if self._hosts is not None and not (name and name[1].rstrip(".") in self._hosts):
            raise ApiError(403, "This server has no such Host name; --allow-host gives it one.", code="bad_host")
        allowed = self._origins | {f"{scope.get('scheme', 'http')}://{host}"}
        if any(origin.lower() not in allowed for origin in headers.getlist("origin")):
            raise ApiError(403, "Pages of another origin may not use this server.", code="bad_origin")
        foreign = any(site.lower() in ("cross-site", "same-site") for site in headers.getlist("sec-fetch-site"))
        link = path == PAGE_PATH and headers.getlist("sec-fetch-mode") == ["navigate"] and scope["method"] == "GET"
        if foreign and "origin" not in headers and not link:
            raise ApiError(403, "Pages of another site may not use this server.", code="bad_origin")
        namespace = self._check_key(headers.getlist("authorization"), path) if self._keys and path != KEYLESS_PATH else ""
        if not PATH.fullmatch(path):
            raise ApiError(404, NO_ROUTE, code="not_found")
        return namespace

    def _check_key(self, authorizations: list[str], path: str) -> str:
        """Returns the namespace of a key that is ours. Compares with every key, each in constant time: time tells nothing."""
        scheme, _, value = (authorizations[0] if len(authorizations) == 1 else "").partition(" ")
        key = value.strip().encode("latin-1") if scheme.lower() == "bearer" else b""
        if scheme.lower() == "basic":  # the password, behind any name
            with contextlib.suppress(ValueError):
                key = base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        hashed = _hash(key)
        matches = [hmac.compare_digest(hashed, known) for known in self._keys]
        if not any(matches):
            challenge = 'Basic realm="Thrice", charset="UTF-8"' if path == PAGE_PATH else "Bearer"
            message = "The API key is wrong." if key else "An API key is needed: send `Authorization: Bearer KEY`."
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": challenge})
        return hashed.hex()


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(b"thrice:" + key).digest()
