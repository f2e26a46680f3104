"""EventStream: a generation as server-sent events, which ends at once when the client leaves or no longer reads."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send

from stages.serve.errors import ApiError, ClientGone, internal_error

QUIET = 10.0  # seconds without news after which a comment is sent, so that no proxy takes the connection for dead
UNREAD = 60.0  # seconds a client may leave what it was sent unread

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"),
]  # fmt: skip


class EventStream:
    """A response: sends the `chunks` (a comment for None), then `[DONE]`, and calls `close` in any case.

    `watch` is to make the chunks raise ClientGone when the client has left.
    """

    def __init__(
        self, chunks: AsyncIterator[Any], watch: Callable[[Receive], Coroutine[Any, Any, None]], close: Callable[[], None]
    ) -> None:
        self._chunks, self._watch, self._close = chunks, watch, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.create_task(self._watch(receive))

        async def write(data: bytes, more: bool = True) -> None:
            async with asyncio.timeout(UNREAD):
                await send({"type": "http.response.body", "body": data, "more_body": more})

        try:
            await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
            try:
                async for chunk in self._chunks:
                    await write(b": waiting\n\n" if chunk is None else _data(msgspec.json.encode(chunk)))
            except ApiError as error:
                await write(_data(error.body))
            except (ClientGone, OSError, TimeoutError):
                raise
            except Exception as error:
                await write(_data(internal_error(error).body))
            await write(b"data: [DONE]\n\n", more=False)
        except (ClientGone, OSError, TimeoutError):
            pass  # nobody reads it
        finally:
            watch.cancel()
            self._close()


def _data(json: bytes) -> bytes:
    return b"data: " + json + b"\n\n"
