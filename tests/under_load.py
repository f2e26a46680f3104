"""S1: repeats requests under a load that changes, and counts the outputs that differ."""

import asyncio
import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from bench.serving.client import Client, Completion, complete, completion_request, random_text


async def repeat_under_load(
    client: Client, requests: Sequence[dict[str, Any]], slots: int, repetitions: int, rng: random.Random
) -> tuple[int, int, int]:
    """Sends `requests` over and over, in random order, among others that come, go and hang up at random, then alone.

    Returns the most distinct outputs of one request, the outputs beyond the first of each when log-probabilities count
    too, and how many were not answered.
    """
    completions: dict[int, list[Completion]] = defaultdict(list)
    order = [place % len(requests) for place in range(repetitions)]
    rng.shuffle(order)
    places, stop = iter(order), asyncio.Event()

    async def repeat() -> None:
        for place in places:
            completions[place].append(await complete(client, requests[place]))
            if rng.random() < 0.1:  # now and then few are left, so that a request is also alone
                await asyncio.sleep(rng.random() * 0.3)

    async def disturb() -> None:
        while not stop.is_set():
            fields: dict[str, Any] = {"temperature": rng.choice((0, 1)), "seed": rng.randrange(2**32)}
            body = completion_request(random_text(rng, rng.randint(3, 40)), rng.randint(1, 24), **fields)
            await complete(client, body, timeout=0.05 if rng.random() < 0.2 else 30.0)
            await asyncio.sleep(rng.expovariate(4))

    neighbours = [asyncio.create_task(disturb()) for _ in range(slots)]
    await asyncio.gather(*(repeat() for _ in range(slots)))
    stop.set()
    await asyncio.gather(*neighbours)
    for place, body in enumerate(requests):
        completions[place].append(await complete(client, body))
    texts = [{(each.text, each.finish_reason) for each in group} for group in completions.values()]
    bits = [
        {(each.text, each.finish_reason, *(value.hex() for value in each.logprobs)) for each in group}
        for group in completions.values()
    ]
    unanswered = sum(not each.finished for group in completions.values() for each in group)
    return max(map(len, texts)), sum(len(outputs) - 1 for outputs in bits), unanswered
