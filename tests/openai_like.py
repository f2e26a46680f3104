"""A stand-in for the server: HTTP/1.1 over asyncio, its responses made by a function of the request. A chat; metrics."""

import asyncio
import contextlib
import json
import re
from collections import Counter

from bench.serving.client import completion_request, read_completion, send


@contextlib.asynccontextmanager
async def fake_server(respond, *, delay=0.0):
    """The port of a server that answers `respond(method, path, headers, body) -> (status, JSON or
    text of events)`.
    """

    async def serve(reader, writer):
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                first, *lines = head.split("\r\n")
                method, path, _ = first.split(" ")
                headers = {
                    name.lower(): value.strip()
                    for name, _, value in (line.partition(":") for line in lines if line)
                }
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                await asyncio.sleep(delay)
                status, content = respond(method, path, headers, body)
                is_stream = isinstance(content, str)
                kind = "text/event-stream" if is_stream else "application/json"
                data = (content if is_stream else json.dumps(content)).encode()
                head = f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {len(data)}\r\n\r\n"
                writer.write(head.encode() + data)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


def fake_completion(text, body, logprobs=None):
    """A completion or a chat of one token a letter, whole or as the events of a stream, as `body`
    asks.
    """
    usage = {"prompt_tokens": 3, "completion_tokens": len(text), "total_tokens": 3 + len(text)}
    chat = "messages" in body

    def choice(piece, complete, finish_reason):
        message = {"content": piece} if piece else {}  # the last event of a chat has an empty delta
        content = {"message" if complete else "delta": message} if chat else {"text": piece}
        values = logprobs or [-0.5] * len(text)
        listed = {"content": [{"logprob": value} for value in values]} if chat else {"token_logprobs": values}
        reported = listed if finish_reason and body.get("logprobs") else None
        return content | {"index": 0, "finish_reason": finish_reason, "logprobs": reported}

    if not body.get("stream"):
        return 200, {"choices": [choice(text, True, "length")], "usage": usage}
    pieces = [choice(letter, False, None) for letter in text] + [choice("", False, "length")]
    events = [json.dumps({"choices": [piece]}) for piece in pieces] + [
        json.dumps({"choices": [], "usage": usage}),
        "[DONE]",
    ]
    return 200, "".join(f"data: {event}\n\n" for event in events)


def chat_request(text, max_tokens, **fields):
    """The body of a /v1/chat/completions of one message."""
    body = completion_request(text, max_tokens, **fields)
    messages = [{"role": "user", "content": body.pop("prompt")}]
    return body | {"messages": messages, "max_completion_tokens": body.pop("max_tokens")}


async def read_metrics(client):
    """{name: value} of /metrics, summed over labels; of histograms only sums and counts."""
    return parse_metrics((await client.get("/metrics")).body.decode())


def parse_metrics(text):
    values = Counter()
    for name, labels, value in re.findall(r"^([a-zA-Z_:][\w:]*)(\{.*\})? (\S+)", text, re.M):
        if 'le="' not in labels:
            values[name] += float(value)
    return values


async def complete(client, body, **options):
    return read_completion(await send(client, body, **options))
