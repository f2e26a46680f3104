"""The outermost layer of the application: gives each request an id, counts its response, and may log a line of it.

A line holds no text of a prompt or a completion, and no key.
"""

import contextlib
import datetime
import json
import secrets
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

CLIENT_CLOSED_REQUEST = 499  # nginx's status for a client that left before its response


class AccessLog:
    """ASGI middleware: adds the header X-Request-Id, and prints a line on stdout (`form`: off, short, json) after a response.

    Sets `arrived`, by time.monotonic, in the request's state. `count(status)` is called for each response.
    """

    def __init__(self, app: ASGIApp, form: str, count: Callable[[int], None]) -> None:
        self._app, self._form, self._count = app, form, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # there are no web sockets
            return
        state = scope.setdefault("state", {})
        arrived_at, arrived = datetime.datetime.now(datetime.UTC), time.monotonic()
        request_id, status = f"req_{secrets.token_hex(12)}", CLIENT_CLOSED_REQUEST
        state["arrived"] = arrived

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._count(status)
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            if self._form != "off":
                entry = {
                    "time": arrived_at.isoformat(timespec="milliseconds"), "id": request_id,
                    "client": (scope["client"] or ("-",))[0],
                    "method": scope["method"], "path": scope["raw_path"].decode("latin-1")[:200], "status": status,
                    "seconds": round(time.monotonic() - arrived, 4),
                    **(state["generation"].log_fields() if "generation" in state else {}),
                }  # fmt: skip
                short = " ".join(f"{value}" if n < 6 else f"{field}={value}" for n, (field, value) in enumerate(entry.items()))
                with contextlib.suppress(OSError, ValueError):  # nobody reads the log any more
                    print(json.dumps(entry) if self._form == "json" else short, flush=True)
