"""S1: the same request gives the same bytes and log-probabilities, whatever the load."""

import json
import random

import pytest
from figures import at_most, exactly
from openai_like import chat_request, fake_completion, fake_server
from under_load import repeat_under_load

from bench.serving.client import Client, completion_request, random_text

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
    texts, different_bits, unanswered = await repeat_under_load(client, REQUESTS, slots, repetitions, rng)
    expect(
        exactly("distinct outputs", texts, 1),
        at_most("outputs with other bits", different_bits, 0),
        at_most("unanswered", unanswered, 0),
        over=f"{repetitions} repetitions of {len(REQUESTS)} requests, half seeded at temperature 1, among as many others",
    )


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
        assert await repeat_under_load(Client(port), REQUESTS, 2, 96, rng) == expected
