"""Checks the framing, the Host, the Origin and the API key of each request, in this order, before anything else.

A page of another site can send requests to 127.0.0.1 from a person's browser, and by rebinding its name to 127.0.0.1 even
read the replies. So the Host must be one of ours, and an Origin, where there is one, that of our page or a listed one, which
gets CORS headers (https://fetch.spec.whatwg.org). Paths are matched as they were written, without decoding or folding: no
path has a second spelling that a check could miss.
"""

import base64
import contextlib
import hashlib
import hmac
import re
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stages.serve.errors import ApiError

KEYLESS_PATHS = ("/live", "/health")  # answered without a key
PAGE_PATH = "/"
NO_ROUTE = "There is no such route; /openapi.json lists them all."
PATH = re.compile(r"/|(?:/[A-Za-z0-9_.~:@!$&'()*+,;=-]+)+/?")
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]]+)(?::\d{1,5})?")  # a name, and perhaps a port
LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})

SECURITY_HEADERS = [
    (b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"), (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"), (b"cross-origin-opener-policy", b"same-origin"),
]  # fmt: skip
EXPOSED_HEADERS = b"x-request-id, x-ignored-fields, retry-after"  # to scripts of listed origins


class Guard:
    """ASGI middleware: refuses a foreign Host or Origin, and a missing key except on KEYLESS_PATHS; adds security headers.

    Sets `namespace`, that of the request's key or empty without keys, in the request's state.

    `keys`: a request needs one of them, if there are any. `hosts`: names of the server, any when None. `origins`: those of
    other pages that may call it; their preflights are answered, without a key.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], hosts: frozenset[str] | None, origins: frozenset[str]) -> None:
        self._app, self._hosts, self._origins = app, hosts, origins
        self._keys = [_hash(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        origin = headers.get("origin", "")
        is_listed = origin.lower() in self._origins
        added = [*SECURITY_HEADERS, *[(b"vary", b"Origin")] * bool(self._origins)]
        if is_listed:
            added += [(b"access-control-allow-origin", origin.encode()), (b"access-control-expose-headers", EXPOSED_HEADERS)]

        async def send_secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *added]
            await send(message)

        path = scope.get("raw_path", scope["path"].encode()).decode("latin-1")
        try:
            self._check_sender(scope, headers, path)
            if is_listed and scope["method"] == "OPTIONS":
                await _preflight_reply(headers)(scope, receive, send_secured)
                return
            needs_key = self._keys and path not in KEYLESS_PATHS
            scope["state"]["namespace"] = self._check_key(headers.getlist("authorization"), path) if needs_key else ""
            if not PATH.fullmatch(path):
                raise ApiError(404, NO_ROUTE, code="not_found")
        except ApiError as error:
            await error.reply()(scope, receive, send_secured)
            return
        await self._app(scope, receive, send_secured)

    def _check_sender(self, scope: Scope, headers: Headers, path: str) -> None:
        """Raises ApiError for a body of two declared lengths, a Host that is not ours, or a page that is not allowed."""
        if "transfer-encoding" in headers and "content-length" in headers:  # request smuggling: RFC 9112, 6.3
            message = "Send Content-Length or Transfer-Encoding, not both."
            raise ApiError(400, message, code="bad_request", headers={"Connection": "close"})
        hosts = headers.getlist("host")
        if len(hosts) != 1:
            raise ApiError(400, "The request must name one Host.", code="bad_host")
        host = hosts[0].lower()
        name = HOST.fullmatch(host)
        if self._hosts is not None and not (name and name[1].rstrip(".") in self._hosts):
            raise ApiError(403, "This server has no such Host name; --allow-host gives it one.", code="bad_host")
        allowed = self._origins | {f"{scope.get('scheme', 'http')}://{host}"}
        if any(origin.lower() not in allowed for origin in headers.getlist("origin")):
            message = "Pages of another origin may not use this server; --allow-origin lets those of one in."
            raise ApiError(403, message, code="bad_origin")
        is_foreign = any(site.lower() in ("cross-site", "same-site") for site in headers.getlist("sec-fetch-site"))
        is_link = path == PAGE_PATH and headers.getlist("sec-fetch-mode") == ["navigate"] and scope["method"] == "GET"
        if is_foreign and "origin" not in headers and not is_link:
            raise ApiError(403, "Pages of another site may not use this server.", code="bad_origin")

    def _check_key(self, authorizations: list[str], path: str) -> str:
        """Returns the namespace of a valid key: its hash in hex. Raises ApiError (401) for a wrong or missing one.

        Compares with every key, each in constant time, so that timing gives none away.
        """
        scheme, _, value = (authorizations[0] if len(authorizations) == 1 else "").partition(" ")
        key = value.strip().encode("latin-1") if scheme.lower() == "bearer" else b""
        if scheme.lower() == "basic":  # the password, after any user name
            with contextlib.suppress(ValueError):
                key = base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        hashed = _hash(key)
        matches = [hmac.compare_digest(hashed, known) for known in self._keys]
        if not any(matches):
            challenge = 'Basic realm="Thrice", charset="UTF-8"' if path == PAGE_PATH else "Bearer"
            message = "The API key is wrong." if key else "An API key is needed: send `Authorization: Bearer KEY`."
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": challenge})
        return hashed.hex()


def _preflight_reply(headers: Headers) -> Response:
    """Returns the reply to a browser that asks, without the key, whether a page of a listed origin may send a request."""
    # Private-Network is Chrome's question whether a page may call a private address, such as this machine's.
    names = headers.get("access-control-request-headers", "content-type")
    allowed = {"Methods": "GET, POST", "Headers": names, "Private-Network": "true"}
    return Response(status_code=204, headers={f"Access-Control-Allow-{name}": value for name, value in allowed.items()})


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(b"thrice:" + key).digest()
