"""Responds to a request for completions: a dialect's Writer turns the pieces of a generation into one JSON body or a stream."""

import asyncio
import contextlib
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from stages.serve.api.generation import Generation, Piece, Usage
from stages.serve.api.requests import ModelRequest
from stages.serve.errors import ApiError, ClientGone, internal_error

SEND_SECONDS = 60.0  # for a client to read what it was sent


class Writer:
    """Writes the pieces of a generation in one dialect, as a reply of one Struct or as the chunks of a stream.

    A stream is what `begin`, `chunks`, for each piece, and `end` return, each chunk as `frame` has it, and then `last`: by
    default server-sent events as OpenAI has them. `comment` is a line that clients pass over.
    """

    media = "text/event-stream; charset=utf-8"
    last = b"data: [DONE]\n\n"

    def reply(self, pieces: list[Piece], usage: Usage) -> msgspec.Struct:
        raise NotImplementedError

    def begin(self, usage: Usage) -> Iterable[Any]:
        return ()

    def chunks(self, piece: Piece) -> Iterable[Any]:
        raise NotImplementedError

    def end(self, usage: Usage) -> Iterable[Any]:
        return ()

    def frame(self, chunk: Any) -> bytes:
        return b"data: " + msgspec.json.encode(chunk) + b"\n\n"

    def error(self, error: ApiError) -> bytes:
        return b"data: " + error.body + b"\n\n"

    def comment(self, text: str) -> bytes:
        return f": {text}\n\n".encode()


class EventWriter(Writer):
    """Writes server-sent events that have their chunk's type as a name."""

    last = b""

    def frame(self, chunk: Any) -> bytes:
        return b"event: " + chunk["type"].encode() + b"\n" + super().frame(chunk)

    def error(self, error: ApiError) -> bytes:
        return b"event: error\n" + super().error(error)


def respond(body: ModelRequest, writer: Writer, generation: Generation) -> ASGIApp:
    headers = {"X-Ignored-Fields": ", ".join(body.ignored)} if body.ignored else {}
    return functools.partial(_send_stream if getattr(body, "stream", False) else _send_reply, writer, generation, headers)


async def _send_reply(
    writer: Writer, generation: Generation, headers: Mapping[str, str], scope: Scope, receive: Receive, send: Send
) -> None:
    async with generation.watch_disconnect(receive):
        reply = json_reply(writer.reply(await generation.collect(), generation.usage), headers=headers)
    await reply(scope, receive, send)


async def _send_stream(
    writer: Writer, generation: Generation, headers: Mapping[str, str], _: Scope, receive: Receive, send: Send
) -> None:
    """Responds with a stream, in which comments say what it waits for. Ends when the client reads no more."""

    async def write(event: bytes, more: bool = True) -> None:
        async with asyncio.timeout(SEND_SECONDS):
            await send({"type": "http.response.body", "body": event, "more_body": more})

    async def write_chunks(chunks: Iterable[Any]) -> None:
        for chunk in chunks:
            await write(writer.frame(chunk))

    headers = {"content-type": writer.media, "cache-control": "no-cache", "x-accel-buffering": "no", **headers}
    encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    with contextlib.suppress(ClientGone, OSError):  # nobody reads it; a TimeoutError is an OSError
        async with generation.watch_disconnect(receive):
            await send({"type": "http.response.start", "status": 200, "headers": encoded})
            try:
                await write_chunks(writer.begin(generation.usage))
                async for piece in generation.pieces():
                    if isinstance(piece, str):
                        await write(writer.comment(piece))
                    else:
                        await write_chunks(writer.chunks(piece))
                await write_chunks(writer.end(generation.usage))
            except (ClientGone, OSError):
                raise
            except Exception as error:
                await write(writer.error(error if isinstance(error, ApiError) else internal_error(error)))
            await write(writer.last, more=False)


def json_reply(value: msgspec.Struct, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers, media_type="application/json")
