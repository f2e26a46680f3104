"""S5 and S11: overload is refused, not suffered, and short requests are not starved by a long prompt."""

import asyncio
import math
import random
from typing import Any

import pytest
from figures import at_least, at_most, milliseconds
from openai_like import read_metrics

from bench.serving.client import Client, complete, completion_request, random_text, send
from bench.serving.measure import open_loop, percentile
from bench.serving.server import Server
from engine.counting.hardware import clock
from engine.inference.config import CHUNK

pytestmark = pytest.mark.anyio

OVERLOAD = 10  # times what the server can do
MEAN_TOKENS = 48  # of a request: were all alike, they would end together


@pytest.mark.promises("S5", "overload is refused, not suffered")
async def test_overload_is_refused(server, slots, quick, rng, expect):
    """Ten times what the server can do, arriving whether it answers or not; before and after, as much as it can take."""
    seconds = 6.0 if quick else 16.0
    before = await _peak_throughput(server, slots, seconds / 2, rng)
    rate = OVERLOAD * before / MEAN_TOKENS
    counting = asyncio.create_task(_generated_per_second(server, 1, seconds - 1.5))
    responses = await open_loop(server.client, _medium_request, rate, seconds, rng)
    throughput = await counting
    peak = (before + await _peak_throughput(server, slots, seconds / 2, rng)) / 2
    refused = [response for response in responses if response.status == 429]
    accepted = sum(response.status == 200 for response in responses)
    errors = sum(response.status >= 500 for response in responses)
    expect(
        milliseconds("429 p99", percentile([response.seconds for response in refused], 0.99), 100),
        at_most("without Retry-After", sum("retry-after" not in response.headers for response in refused), 0),
        at_least("accepted throughput / peak", throughput / peak, 0.95),
        at_most("5xx", errors, 0),
        at_most("unanswered", len(responses) - len(refused) - accepted - errors, 0),
        over=f"{len(responses)} requests at {rate:.0f}/s, {accepted} accepted; peak {peak:.0f} tokens/s",
    )


async def _peak_throughput(server: Server, slots: int, seconds: float, rng: random.Random) -> float:
    """Tokens a second while every slot and a short queue are always full, after a moment to fill them."""
    end = clock() + seconds + 1

    async def stream() -> None:
        while clock() < end:
            await send(server.client, _medium_request(rng))

    streams = [asyncio.create_task(stream()) for _ in range(slots + 4)]
    throughput = await _generated_per_second(server, 1, seconds - 0.5)
    await asyncio.gather(*streams)
    return throughput


async def _generated_per_second(server: Server, delay: float, seconds: float) -> float:
    """Tokens a second that the server generates after `delay`, by its own counter."""
    await asyncio.sleep(delay)
    begin, first = clock(), (await read_metrics(server.client))["vllm:generation_tokens_total"]
    await asyncio.sleep(seconds)
    last = (await read_metrics(server.client))["vllm:generation_tokens_total"]
    return (last - first) / (clock() - begin)


def _medium_request(rng: random.Random) -> dict[str, Any]:
    tokens = rng.randint(MEAN_TOKENS // 2, MEAN_TOKENS * 3 // 2)
    return completion_request(random_text(rng, 10), tokens, ignore_eos=True, stream=False)


@pytest.mark.promises("S11", "short requests are not starved by a long prompt")
async def test_a_short_request_beside_long_prompts(server, client, quick, rng, expect):
    """Short requests one after another, alone and while a prompt as long as fits is being read beside them all the time."""
    count = 12 if quick else 60
    length = (await server.model())["max_model_len"] - 40
    begin = clock()
    prompt_tokens = (await complete(client, _long_request(length, rng))).prompt_tokens
    chunks = math.ceil(prompt_tokens / CHUNK)
    chunk = (clock() - begin) / chunks
    alone = percentile(await _ttfts(client, count, rng), 0.5)
    stop = asyncio.Event()

    async def read_long_prompts() -> int:
        finished = 0
        while not stop.is_set():
            finished += (await complete(client, _long_request(length, rng))).finished
        return finished

    beside = asyncio.create_task(read_long_prompts())
    await asyncio.sleep(0.3)
    short = await _ttfts(client, count, rng)
    stop.set()
    expect(
        milliseconds("short TTFT p99", percentile(short, 0.99), 1e3 * (2 * chunk + 2 * alone)),
        at_least("long prompts that were answered", await beside, 1),
        over=f"{count} short requests beside prompts of {prompt_tokens:,} tokens (all that fit); a chunk takes "
        f"{1e3 * chunk:.0f} ms, TTFT alone is {1e3 * alone:.0f} ms",
    )


async def _ttfts(client: Client, count: int, rng: random.Random) -> list[float]:
    """Seconds to the first token of short requests, one after another."""
    return [(await complete(client, completion_request(random_text(rng, 8), 4, ignore_eos=True))).ttft for _ in range(count)]


def _long_request(length: int, rng: random.Random) -> dict[str, Any]:
    return completion_request([rng.randrange(1000, 2000) for _ in range(length)], 2, ignore_eos=True)
