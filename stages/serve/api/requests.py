"""ApiCall: a request whose body is read within bounds of size and time."""

import asyncio
import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from stages.serve.admission import Place
from stages.serve.api.decode import decode_body
from stages.serve.errors import ApiError, ClientGone
from stages.serve.state import ServedModel, ServerState

MAX_BYTES = 4 * 2**20
INLINE_BYTES = 65_536  # more are decoded in a thread
BODY_SECONDS = 20.0  # for a body to come
COST_HEADER = "x-usage-cost"  # `1` asks for a Bill


class ApiCall[Body]:
    """One request on its way: the server's state, the HTTP request, its body, and the model that it names.

    `place`: that which it reserved. `content`: the bytes of its body, which count while its text
    becomes tokens.
    """

    body: Body
    model: ServedModel
    place: Place

    def __init__(self, state: ServerState, http: Request) -> None:
        self.state = state
        self.http = http
        self.content = bytearray()

    @property
    def wants_cost(self) -> bool:
        """Whether the reply's usage is to say what the request has cost: its header COST_HEADER."""
        return self.http.headers.get(COST_HEADER, "").strip().lower() in ("1", "true")

    def uncount_bytes(self) -> None:
        """No longer counts the bytes of the body."""
        self.state.admission.remove_bytes(len(self.content))

    async def read(self, kind: type[Body]) -> None:
        """Reads the JSON body as `kind`. Raises ApiError, which names the field at fault, and ClientGone."""
        _check_headers(self.http)
        await self._receive()
        body: Any
        if len(self.content) <= INLINE_BYTES:
            body = decode_body(self.content, kind)
        else:
            body = await asyncio.to_thread(decode_body, self.content, kind)
        self.body = body
        self.model = self.state.find_model(body.model)

    async def _receive(self) -> None:
        """Receives the body into `content`, and counts its bytes. Raises ApiError and ClientGone."""
        try:
            async with asyncio.timeout(BODY_SECONDS):
                more = True
                while more:
                    part = await self.http.receive()
                    if part["type"] == "http.disconnect":
                        raise ClientGone
                    data = part.get("body", b"")
                    more = part.get("more_body", False)
                    if len(self.content) + len(data) > MAX_BYTES:  # counted: Content-Length is only a promise
                        raise _too_large()
                    self.state.admission.add_bytes(len(data))
                    self.content += data
        except TimeoutError:
            message = f"The body did not come within {BODY_SECONDS:.0f} s."
            raise ApiError(408, message, headers={"Connection": "close"}) from None


def _check_headers(http: Request) -> None:
    """Raises ApiError for a body that is not JSON in UTF-8, is compressed, or is too large."""
    # Ollama asks for no type, and its clients send any: curl's -d that of a form, litellm's proxy
    # `application/octet-stream`, fetch `text/plain`. A page of another site can send some of them
    # too, but not without its Origin, which the guard refuses.
    takes_any = http.scope["state"]["path"].startswith("/api/")
    kind, _, parameters = http.headers.get("content-type", "").partition(";")
    is_json = takes_any or kind.strip().lower() == "application/json"
    charset = re.search(r"charset\s*=\s*\"?([^\s;\"]+)", parameters.lower())
    if not is_json or (charset and charset[1] not in ("utf-8", "utf8", "us-ascii")):
        raise ApiError(
            415, "The body must be JSON in UTF-8, sent with the header `Content-Type: application/json`."
        )
    if http.headers.get("content-encoding", "").strip().lower() not in ("", "identity"):
        raise ApiError(415, "The body must not be compressed: send it without a Content-Encoding.")
    if content_length(http) > MAX_BYTES:
        raise _too_large()


def content_length(http: Request) -> int:
    """Returns the announced bytes of the body, 0 without; h11 has seen that it is a number."""
    return int(http.headers.get("content-length", 0))


def _too_large() -> ApiError:
    return ApiError(413, f"The body may have at most {MAX_BYTES:,} bytes.")


def json_reply(
    value: msgspec.Struct, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    return Response(msgspec.json.encode(value), status, headers, media_type="application/json")


def ignored_header(names: Sequence[str]) -> dict[str, str]:
    """Returns the header that names the fields of a body that change no answer; no header without names."""
    if not names:
        return {}
    return {"X-Ignored-Fields": ", ".join(names)}
