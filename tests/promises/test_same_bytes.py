"""S1: the same request gives the same bytes and log-probabilities, whatever the load."""

import asyncio
import json
import random
from collections import defaultdict
from typing import Any

import pytest
from figures import at_most, exactly
from openai_like import chat_request, fake_completion, fake_server

from bench.serving.completions import Completion, complete, completion_request, random_text
from bench.serving.http_client import Client

pytestmark = pytest.mark.anyio

REQUESTS = (
    completion_request("The capital of France is", 10, logprobs=2),
    completion_request("Once upon a time there was a", 16, logprobs=1, temperature=1, seed=7),
    completion_request("one two three one two three one two", 20, logprobs=1, stream=False),
    chat_request("Name a colour.", 12, logprobs=True, top_logprobs=3),
    chat_request("Tell me about the sea.", 16, logprobs=True, temperature=1, top_p=0.9, seed=11),
    completion_request(random_text(random.Random(5), 150), 8, logprobs=1, stream=False),
    completion_request("A list: apples, pears,", 14, logprobs=1, temperature=1, seed=3, frequency_penalty=0.5, stop=["\n"]),
    completion_request("It was the best of times, it was", 12, logprobs=1, logit_bias={"30": 2}, stream=False),
)


@pytest.mark.promises("S1", "the same request gives the same bytes and log-probabilities, whatever the load")
async def test_the_same_request_gives_the_same_bits(client, slots, quick, rng, expect):
    repetitions = 96 if quick else 1000
    texts, different_bits, unanswered = await repeat_under_load(client, slots, repetitions, rng)
    expect(
        exactly("distinct outputs", texts, 1),
        at_most("outputs with other bits", different_bits, 0),
        at_most("unanswered", unanswered, 0),
        over=f"{repetitions} repetitions of {len(REQUESTS)} requests, half seeded at temperature 1, among as many others",
    )


async def repeat_under_load(client: Client, slots: int, repetitions: int, rng: random.Random) -> tuple[int, int, int]:
    """Sends a few requests over and over, in random order, among others that come, go and hang up at random, then alone.

    Returns the most distinct outputs of one request, the outputs beyond the first of each when log-probabilities count
    too, and how many were not answered.
    """
    completions: dict[int, list[Completion]] = defaultdict(list)
    order = [place % len(REQUESTS) for place in range(repetitions)]
    rng.shuffle(order)
    places, stop = iter(order), asyncio.Event()

    async def repeat() -> None:
        for place in places:
            completions[place].append(await complete(client, REQUESTS[place]))
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
    for place, body in enumerate(REQUESTS):
        completions[place].append(await complete(client, body))
    texts = [{(each.text, each.finish_reason) for each in group} for group in completions.values()]
    bits = [
        {(each.text, each.finish_reason, *(value.hex() for value in each.logprobs)) for each in group}
        for group in completions.values()
    ]
    unanswered = sum(not each.finished for group in completions.values() for each in group)
    return max(map(len, texts)), sum(len(outputs) - 1 for outputs in bits), unanswered


@pytest.mark.parametrize(("wrong", "expected"), [(None, (1, 0, 0)), (-0.25000003, (1, 1, 0))])
async def test_one_bit_in_one_output_is_noticed(wrong, expected, rng):
    seeded = 0

    def respond(method, path, headers, body):
        nonlocal seeded
        request = json.loads(body)
        seeded += request.get("seed") == 7
        is_wrong = wrong is not None and seeded == 5 and request.get("seed") == 7
        return fake_completion("fine", request, [wrong if is_wrong else -0.25] * 4)

    async with fake_server(respond) as port:
        assert await repeat_under_load(Client(port), 2, 96, rng) == expected
