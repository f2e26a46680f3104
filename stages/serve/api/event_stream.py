"""An answer as server-sent events, which ends at once when the client leaves or no longer reads."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send

from stages.serve.api.generation import Answer
from stages.serve.errors import ErrorReply, Gone, Refused, at_fault

QUIET = 10.0  # seconds without news after which a comment is sent, so that nobody between takes the connection for dead
UNREAD = 60.0  # seconds a client may leave what it was sent unread

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class EventStream:
    """Sends what `chunks` gives, then `[DONE]`; `close` is called in any case."""

    def __init__(self, answer: Answer, chunks: AsyncIterator[Any | None], close: Callable[[], None]) -> None:
        self._answer, self._chunks, self._close = answer, chunks, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.create_task(self._answer.watch(receive))

        async def write(data: bytes, more: bool = True) -> None:
            async with asyncio.timeout(UNREAD):
                await send({"type": "http.response.body", "body": data, "more_body": more})

        try:
            await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
            try:
                async for chunk in self._chunks:
                    await write(b": waiting\n\n" if chunk is None else event(chunk))
            except Refused as refused:
                await write(event(ErrorReply(refused.problem)))
            except (Gone, OSError, TimeoutError):
                raise
            except Exception as error:
                await write(event(ErrorReply(at_fault(error).problem)))
            await write(b"data: [DONE]\n\n", more=False)
        except (Gone, OSError, TimeoutError):
            pass  # nobody reads it
        finally:
            watch.cancel()
            self._close()


def event(value: Any) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


async def whole[T](answer: Answer, receive: Receive, collect: Awaitable[T]) -> T:
    """What `collect` gives, unless the client leaves before: then raises Gone."""
    watch = asyncio.create_task(answer.watch(receive))
    try:
        return await collect
    finally:
        watch.cancel()
