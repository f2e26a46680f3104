"""EventStream: a generation as server-sent events, which ends at once when the client leaves or no longer reads."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import Any, Protocol

import msgspec
from starlette.types import Receive, Scope, Send

from stages.serve.errors import ApiError, ClientGone, internal_error

QUIET = 10.0  # seconds without news after which a comment is sent, so that no proxy takes the connection for dead
UNREAD = 60.0  # seconds a client may leave what it was sent unread

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Watched(Protocol):
    """A generation, as far as a stream needs it: `watch` makes its chunks raise ClientGone when the client has left."""

    def watch(self, receive: Receive) -> Awaitable[None]: ...

    def close(self) -> None: ...


class EventStream:
    """A response: sends the `chunks` (a comment for None), then `[DONE]`, and closes the generation in any case."""

    def __init__(self, generation: Watched, chunks: AsyncIterator[Any | None]) -> None:
        self._generation, self._chunks = generation, chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.ensure_future(self._generation.watch(receive))

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
            self._generation.close()


def _data(json: bytes) -> bytes:
    return b"data: " + json + b"\n\n"
