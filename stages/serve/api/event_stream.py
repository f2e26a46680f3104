"""Sends a generation as server-sent events, which end at once when the client leaves or stops reading."""

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


async def send_events(
    chunks: AsyncIterator[Any], attached: Callable[[Receive], AbstractAsyncContextManager[None]], _: Scope, receive: Receive,
    send: Send,
) -> None:  # fmt: skip
    """Sends the chunks (a comment for None), then `[DONE]`, within the context `attached(receive)`."""

    async def write(event: bytes, more: bool = True) -> None:
        async with asyncio.timeout(UNREAD):
            await send({"type": "http.response.body", "body": event + b"\n\n", "more_body": more})

    with contextlib.suppress(ClientGone, OSError):  # nobody reads it; a TimeoutError is an OSError
        async with attached(receive):
            await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
            try:
                async for chunk in chunks:
                    await write(b": waiting" if chunk is None else b"data: " + msgspec.json.encode(chunk))
            except (ClientGone, OSError):
                raise
            except Exception as error:
                await write(b"data: " + (error if isinstance(error, ApiError) else internal_error(error)).body)
            await write(b"data: [DONE]", more=False)
