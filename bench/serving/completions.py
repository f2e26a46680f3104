"""Makes requests for completions, and reads responses: text, token counts, time to first token, log-probabilities."""

import dataclasses
import math
import random
from typing import Any

from bench.cli import Json
from bench.serving.http_client import Client, Response


def completion_request(prompt: str | list[int], max_tokens: int, **fields: Any) -> Json:
    """Returns the body of a /v1/completions, streamed and greedy unless `fields` say otherwise."""
    body = {"model": "default", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True} | fields
    return ({"stream_options": {"include_usage": True}} if body["stream"] else {}) | body


async def send(client: Client, body: Json, **options: Any) -> Response:
    """Posts a completion request to its path; returns the response."""
    return await client.post("/v1/chat/completions" if "messages" in body else "/v1/completions", body, **options)


async def complete(client: Client, body: Json, **options: Any) -> "Completion":
    """Posts a completion request; returns the completion."""
    return read_completion(await send(client, body, **options))


@dataclasses.dataclass(frozen=True)
class Completion:
    """One completion. Seconds count from the request: `ttft` to the first token, `latency` to the last."""

    status: int
    text: str
    completion_tokens: int
    prompt_tokens: int
    finish_reason: str | None
    ttft: float
    latency: float
    logprobs: tuple[float, ...] = ()
    error: str | None = None

    @property
    def finished(self) -> bool:
        return self.status == 200 and self.error is None and self.finish_reason in ("stop", "length")

    @property
    def inter_token_latency(self) -> float:
        """Mean seconds from one token to the next; NaN with fewer than two."""
        tokens = self.completion_tokens
        return (self.latency - self.ttft) / (tokens - 1) if tokens > 1 else math.nan


def read_completion(response: Response) -> Completion:
    """Parses the response to a completion or a chat, streamed or whole."""
    if response.error or response.status != 200:
        why = response.error or _error_message(response)
        return Completion(response.status, "", 0, 0, None, math.nan, response.seconds, error=why)
    is_stream = response.headers.get("content-type", "").startswith("text/event-stream")
    events = response.events() if is_stream else [(response.ended_at, response.json())]
    full_text, logprobs = "", list[float]()
    usage, finish_reason, error = {"completion_tokens": 0, "prompt_tokens": 0}, None, None
    first = last = math.nan
    for moment, event in events:
        error = event["error"]["message"] if "error" in event else error
        usage = event.get("usage") or usage
        for choice in event.get("choices", ()):
            message = choice.get("delta", choice.get("message", {}))
            text = choice.get("text") or message.get("content")
            values = choice.get("logprobs") or {}
            logprobs += [entry["logprob"] for entry in values.get("content") or ()] or values.get("token_logprobs") or ()
            finish_reason = choice.get("finish_reason") or finish_reason
            if text:
                full_text += text
                first, last = (moment if math.isnan(first) else first), moment
    return Completion(
        200, full_text, usage["completion_tokens"], usage["prompt_tokens"], finish_reason, first - response.sent_at,
        last - response.sent_at, tuple(logprobs), error,
    )  # fmt: skip


def _error_message(response: Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.body[:200].decode("utf-8", "replace") or f"status {response.status}"


def random_text(rng: random.Random, words: int) -> str:
    """Returns short common words, about a token each. Two such texts hardly begin alike."""
    return " ".join(rng.choices(COMMON_WORDS.split(), k=words))


COMMON_WORDS = (
    "the of and to in is that for it as was with be by on not he but at are this have from or had an they which you were all "
    "her would their"
)
