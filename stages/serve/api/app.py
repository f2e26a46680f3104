"""Api: the ROUTES as an ASGI application, between the guard and the handlers."""

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Iterator
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.errors import InvalidField
from stages.serve.admission import Sender
from stages.serve.api.generation import MAX_COMPLETIONS
from stages.serve.api.openapi import openapi_document
from stages.serve.api.requests import INLINE_BYTES, ApiCall, content_length, json_reply
from stages.serve.api.routes import ROUTES, Route
from stages.serve.errors import ApiError, ClientGone
from stages.serve.page import page as make_page
from stages.serve.state import ServerState

SEND_SECONDS = 60.0  # for a client to read what it was sent
PREFIXES = ("/v1/models/", "/v1/adapters/")  # before a model's name
# Why paths are not here that clients of Ollama and Anthropic ask for, with all below them.
ABSENT = {
    **dict.fromkeys(
        ("/api/create", "/api/copy", "/api/delete", "/api/push", "/api/blobs"),
        "Models are only served here: no request makes, copies, sends or deletes one.",
    ),
    "/v1/messages/batches": "There are no batches: send each message by itself, several at once.",
    "/v1/files": "No files are kept: send their text in the messages.",
    **dict.fromkeys(
        ("/v1/agents", "/v1/environments", "/v1/sessions"),
        "No agents run here: an agent of your own sends its messages.",
    ),
}


class Api:
    """The routes as an ASGI application, called with the path as the Guard has it.

    Raises ApiError, and what a handler does.

    `page` and `openapi`: the documents of those routes. `version`: this server's. `client_header`:
    the header, in lower case, that tells clients behind one address apart; "" is none.
    """

    def __init__(
        self, state: ServerState, version: str, root_path: str = "", client_header: str = ""
    ) -> None:
        self._state = state
        self._client_header = client_header
        self.page = make_page()
        self.version = version
        self.openapi = openapi_document(state.engine.cfg.vocab, version, root_path)
        self._routes: dict[str, dict[str, Route]] = {}
        for route in ROUTES:
            methods = self._routes.setdefault(route.path, {})
            methods[route.method] = route
            if route.method == "GET":
                methods["HEAD"] = route

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self
        route = self._find(scope)
        call: ApiCall[Any] = ApiCall(self._state, Request(scope, receive))
        if route.body is None:
            response = _response(await route.handler(call))
            await response(scope, receive, send)
            return
        self._check_open(route, call)
        with contextlib.ExitStack() as until_tokens:
            until_tokens.callback(call.uncount_bytes)
            await call.read(route.body)
            with self._place(route, call):
                response = _response(await route.handler(call))
                until_tokens.close()
                del call.body, call.content  # their text has become tokens; a writer may hold the body on
                await response(scope, receive, _in_time(send))

    def _find(self, scope: Scope) -> Route:
        """Returns the route of a request, and takes a model's name out of its path. Raises ApiError."""
        path = scope["state"]["path"]
        method = scope["method"]
        for prefix in PREFIXES:
            if path.startswith(prefix):
                scope["path_params"] = {"model": path.removeprefix(prefix)}
                path = prefix + "{model}"
        methods = self._routes.get(path)
        if methods is None:
            raise _no_route(path)
        if method not in methods:
            names = ", ".join(methods)
            message = f"{scope['path']} is not asked for with {method}, but with {names}."
            raise ApiError(405, message, code="method_not_allowed", headers={"Allow": names})
        return methods[method]

    def _check_open(self, route: Route, call: ApiCall) -> None:
        """Raises ApiError for a call that can get no place: 503 when not ready, 429 for a large body.

        A small body is read first: it says how many completions are asked for, by which a request
        is told from others.
        """
        if not route.reserves:
            self._state.admission.check_open()
            return
        self._state.check_ready()
        if content_length(call.http) > INLINE_BYTES:
            self._state.admission.check(self._sender(call, 0), time.monotonic(), _tries(call))

    @contextlib.contextmanager
    def _place(self, route: Route, call: ApiCall) -> Iterator[None]:
        """Holds a place for the call, if its route reserves one.

        Raises ApiError without one, and InvalidField.
        """
        if not route.reserves:
            yield
            return
        choices = call.body.choices
        if choices > MAX_COMPLETIONS:
            limit = f"at most {MAX_COMPLETIONS} are made for one request"
            message = f"prompts times n are {choices:,} completions; {limit}."
            raise InvalidField("n", message)
        admission = self._state.admission
        with admission.place(self._sender(call, choices), time.monotonic(), _tries(call)) as place:
            call.place = place
            yield

    def _sender(self, call: ApiCall, choices: int) -> Sender:
        """Returns who sends a request, and its size: its bytes if they are many, else its completions."""
        address, port = call.http.client or ("", 0)
        if self._client_header in call.http.headers:
            # A digest, for a header may be long, and what a client sent is not remembered.
            address = hashlib.sha256(call.http.headers[self._client_header].encode()).hexdigest()
        length = content_length(call.http)
        size = choices
        if length > INLINE_BYTES:
            size = length
        return Sender(port, (address, call.http.state.namespace, size))


def _no_route(path: str) -> ApiError:
    message = f"There is no route {path!r:.80} here; /openapi.json lists them all."
    for absent, why in ABSENT.items():
        if path == absent or path.startswith(f"{absent}/"):
            message += f" {why}"
    return ApiError(404, message, code="not_found")


def _response(reply: msgspec.Struct | ASGIApp) -> ASGIApp:
    return json_reply(reply) if isinstance(reply, msgspec.Struct) else reply


def _in_time(send: Send) -> Send:
    """Returns `send`, which raises ClientGone for a client that reads nothing: it would keep its place."""

    async def send_in_time(message: Message) -> None:
        try:
            async with asyncio.timeout(SEND_SECONDS):
                await send(message)
        except TimeoutError:
            raise ClientGone from None

    return send_in_time


def _tries(call: ApiCall) -> int | None:
    """Returns how often the clients of OpenAI and Anthropic say that they have sent a request before.

    None for others.
    """
    count = call.http.headers.get("x-stainless-retry-count", "")
    if count.isdecimal() and len(count) < 4:
        return int(count)
    return None
