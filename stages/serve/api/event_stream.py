"""EventStream: a generation as server-sent events. It ends at once when the client leaves or stops reading."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send

from stages.serve.errors import ApiError, ClientGone, internal_error

QUIET = 10.0  # seconds without news before a comment is sent, so that no proxy takes the connection for dead
UNREAD = 60.0  # seconds for a client to read what it was sent

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"),
]  # fmt: skip


class EventStream:
    """A response: within the context `attached(receive)` sends the chunks (a comment for None), then `[DONE]`."""

    def __init__(self, chunks: AsyncIterator[Any], attached: Callable[[Receive], AbstractAsyncContextManager[None]]) -> None:
        self._chunks, self._attached = chunks, attached

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write(data: bytes, more: bool = True) -> None:
            async with asyncio.timeout(UNREAD):
                await send({"type": "http.response.body", "body": data, "more_body": more})

        with contextlib.suppress(ClientGone, OSError):  # nobody reads it; a TimeoutError is an OSError
            async with self._attached(receive):
                await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
                try:
                    async for chunk in self._chunks:
                        await write(b": waiting\n\n" if chunk is None else _data(msgspec.json.encode(chunk)))
                except (ClientGone, OSError):
                    raise
                except Exception as error:
                    await write(_data((error if isinstance(error, ApiError) else internal_error(error)).body))
                await write(b"data: [DONE]\n\n", more=False)


def _data(json: bytes) -> bytes:
    return b"data: " + json + b"\n\n"
