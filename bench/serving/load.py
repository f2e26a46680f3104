"""Load on a server: so many streams at once, or requests at random times whatever the server does; and what came of each.

A closed loop asks again when it was answered, so it measures what a server can do. An open loop sends when it is time
(Poisson arrivals) and counts a request's wait from then, so it measures what people see, a full server's queue included.
"""

import asyncio
import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

from bench.serving.http_client import Answer, Client
from engine.counting.hardware import clock


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of them do not exceed (nearest rank); NaN of none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


@dataclasses.dataclass(frozen=True)
class Told:
    """What a completion came to. Seconds from the asking: `first` to the first token, `whole` to the last."""

    status: int
    text: str
    tokens: int
    prompt_tokens: int
    finished: str | None
    first: float
    whole: float
    logprobs: tuple[float, ...] = ()
    error: str | None = None

    @property
    def good(self) -> bool:
        """Whether it was answered to its end."""
        return self.status == 200 and self.error is None and self.finished in ("stop", "length")

    @property
    def a_token(self) -> float:
        """Seconds a token after the first; NaN when there is none."""
        return (self.whole - self.first) / (self.tokens - 1) if self.tokens > 1 else math.nan


def told(answer: Answer) -> Told:
    """Reads a completion, streamed or not, chat or plain."""
    if answer.broken or answer.status != 200:
        return Told(answer.status, "", 0, 0, None, math.nan, answer.seconds, error=answer.broken or _reason(answer))
    if not answer.headers.get("content-type", "").startswith("text/event-stream"):
        whole = answer.json()
        choice = whole["choices"][0]
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        usage = whole["usage"]
        return Told(
            200, text or "", usage["completion_tokens"], usage["prompt_tokens"], choice["finish_reason"], answer.seconds,
            answer.seconds, tuple(_logprobs(choice)),
        )  # fmt: skip
    text, logprobs, usage, finished, error = [], [], {"completion_tokens": 0, "prompt_tokens": 0}, None, None
    first = last = math.nan
    for moment, event in answer.events():
        error = event["error"]["message"] if "error" in event else error
        usage = event.get("usage") or usage
        for choice in event.get("choices", ()):
            piece = choice["text"] if "text" in choice else choice["delta"].get("content")
            logprobs += _logprobs(choice)
            finished = choice.get("finish_reason") or finished
            if piece:
                text.append(piece)
                first, last = (moment if math.isnan(first) else first), moment
    return Told(
        200, "".join(text), usage["completion_tokens"], usage["prompt_tokens"], finished, first - answer.asked,
        last - answer.asked, tuple(logprobs), error,
    )  # fmt: skip


def _reason(answer: Answer) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return answer.body[:200].decode("utf-8", "replace") or f"status {answer.status}"


def _logprobs(choice: dict[str, Any]) -> list[float]:
    found = choice.get("logprobs") or {}
    if "content" in found:
        return [entry["logprob"] for entry in found["content"] or ()]
    return list(found.get("token_logprobs") or ())


def completion(prompt: str | list[int], tokens: int, **options: Any) -> dict[str, Any]:
    """The body of a streamed, greedy /v1/completions of up to `tokens` tokens, unless `options` say otherwise."""
    body = {"model": "default", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    body |= {"stream_options": {"include_usage": True}} | options
    return body if body["stream"] else {name: value for name, value in body.items() if name != "stream_options"}


def chat(text: str, tokens: int, **options: Any) -> dict[str, Any]:
    """The same as a /v1/chat/completions of one message."""
    body = completion("", tokens, **options)
    del body["prompt"]
    body["max_completion_tokens"] = body.pop("max_tokens")
    return body | {"messages": [{"role": "user", "content": text}]}


async def post(client: Client, body: dict[str, Any], **options: Any) -> Answer:
    """Asks for a completion at the path its body is for."""
    return await client.post("/v1/chat/completions" if "messages" in body else "/v1/completions", body, **options)


async def closed_loop(client: Client, bodies: Sequence[dict[str, Any]], streams: int) -> tuple[list[Answer], float]:
    """All bodies, `streams` at a time -> their answers in order, and the seconds all took."""
    answers: list[Answer | None] = [None] * len(bodies)
    places = iter(range(len(bodies)))

    async def stream() -> None:
        for place in places:
            answers[place] = await post(client, bodies[place])

    begin = clock()
    await asyncio.gather(*(stream() for _ in range(streams)))
    return [answer for answer in answers if answer], clock() - begin


async def open_loop(
    client: Client, draw: Callable[[random.Random], dict[str, Any]], rate: float, seconds: float, seed: int = 0
) -> list[Answer]:
    """Poisson arrivals at `rate` a second for `seconds`, each of what `draw` gives -> all answers, once all are there."""
    rng, begin, at = random.Random(seed), clock(), 0.0
    sent = []
    while (at := at + rng.expovariate(rate)) < seconds:
        body = draw(rng)
        await asyncio.sleep(max(0.0, begin + at - clock()))
        sent.append(asyncio.create_task(post(client, body, asked=begin + at)))
    return list(await asyncio.gather(*sent))


def words(rng: random.Random, count: int) -> str:
    """A text of `count` short common words, about as many tokens: no two prompts are likely to begin alike."""
    return " ".join(rng.choice(COMMON) for _ in range(count))


COMMON = (
    "the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on", "not", "he", "his",
    "but", "at", "are", "this", "have", "from", "or", "had", "an", "they", "which", "one", "you", "were", "all", "her",
    "she", "there", "would", "their", "we", "him", "been", "has", "when", "who", "will", "no", "more", "if", "out", "so",
    "up", "said", "what", "its", "about", "than", "into", "them", "can", "only", "other", "time", "new", "some", "could",
    "these", "two", "may", "first", "then", "do", "any", "like", "my", "now", "over", "such", "our", "man", "me", "even",
    "most", "made", "after", "also", "did", "many", "before", "must", "well", "back", "through", "years", "much", "where",
    "your", "way", "down", "should", "because", "long", "each", "just", "state", "people", "those", "too", "little",
    "good", "world", "make", "very", "year", "still", "see", "own", "work", "men", "day", "get", "here", "old", "life",
)  # fmt: skip
