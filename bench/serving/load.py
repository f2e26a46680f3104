"""Load on a server: closed loops, open loops, and percentiles of what they found.

A closed loop sends the next request when the last is answered, so it measures what a server can do. An open loop sends
when it is time (Poisson arrivals) and counts a request's latency from then, so it measures what people see, a full
server's queue included.
"""

import asyncio
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

from bench.serving.completions import Completion, read_completion, send
from bench.serving.http_client import Client
from engine.counting.hardware import clock


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of them do not exceed (nearest rank); NaN of none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


async def closed_loop(client: Client, bodies: Sequence[dict[str, Any]], streams: int) -> tuple[list[Completion], float]:
    """Sends all bodies, `streams` at a time -> their completions in order, and the seconds all took."""
    responses: list[Any] = [None] * len(bodies)
    places = iter(range(len(bodies)))

    async def stream() -> None:
        for place in places:
            responses[place] = await send(client, bodies[place])

    begin = clock()
    await asyncio.gather(*(stream() for _ in range(streams)))
    seconds = clock() - begin
    return [read_completion(response) for response in responses], seconds


async def open_loop(
    client: Client, draw: Callable[[random.Random], dict[str, Any]], rate: float, seconds: float, seed: int = 0
) -> list[Completion]:
    """Poisson arrivals of what `draw` returns, `rate` a second for `seconds` -> all completions, once all are there."""
    rng, begin, at = random.Random(seed), clock(), 0.0
    requests = []
    while (at := at + rng.expovariate(rate)) < seconds:
        body = draw(rng)
        await asyncio.sleep(max(0.0, begin + at - clock()))
        requests.append(asyncio.create_task(send(client, body, sent_at=begin + at)))
    return [read_completion(response) for response in await asyncio.gather(*requests)]
