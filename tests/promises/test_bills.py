"""F2: what answers cost adds up to what was computed for them, and equal requests cost equally in any company."""

import asyncio
import math
from typing import Any

import pytest

from bench.serving.client import Client, Json, completion_request, send
from tests.openai_like import chat_request, read_metrics
from tests.promises.figures import at_most, exactly, servers

pytestmark = pytest.mark.anyio

HEADERS = {"x-usage-cost": "1"}
BODIES = (
    completion_request("The capital of France is", 10, logprobs=2),
    completion_request("Once upon a time there was a", 16, temperature=1, seed=7),
    completion_request("one two three one two three one two", 20, stream=False),
    completion_request("It was the best of times, it was", 12, logit_bias={"30": 2}, n=2, stream=False),
    chat_request("Name a colour.", 12, temperature=1, seed=3),
    chat_request("Tell me about the sea.", 16, stream=False),
)


async def ask(client: Client, number: int, salt: str) -> Any:
    """Returns the bill of a request whose prompt nobody has sent before; None where it has none."""
    body: Json = BODIES[number % len(BODIES)] | {"cache_salt": f"{salt} {number}"}
    response = await send(client, body, headers=HEADERS)
    if response.status != 200 or response.error:
        return None
    if not body["stream"]:
        return response.json()["usage"]["cost"]
    bills = [part["usage"]["cost"] for _, part in response.events() if part.get("usage")]
    return bills[-1] if bills else None


async def served(client: Client) -> tuple[int, float]:
    """Returns the FLOPs that the server has computed for requests so far, and its busy seconds."""
    (card,) = (await client.get("/v1/models")).json()["data"]
    return card["served_flops"], (await read_metrics(client))["thrice_engine_busy_seconds_total"]


@pytest.mark.law("batch invariance")
@servers("F2")
async def test_bills_add_up_and_are_equal_in_company(server, slots, quick, rng, expect):
    client, count = server.client, 60 if quick else 10_000
    alone = [await ask(client, number, "alone") for number in range(len(BODIES))]
    flops_before, seconds_before = await served(client)
    places = iter(range(count))
    bills: dict[int, Any] = {}

    async def ask_in_turn() -> None:
        for number in places:
            bills[number] = await ask(client, number, "together")
            if rng.random() < 0.05:  # now and then few are left
                await asyncio.sleep(rng.random() * 0.1)

    await asyncio.gather(*(ask_in_turn() for _ in range(slots)))
    flops, seconds = await served(client)
    flops -= flops_before
    seconds -= seconds_before
    missing = sum(bill is None for bill in bills.values())
    billed = [bill for bill in bills.values() if bill]
    others = 0
    for number, bill in bills.items():
        others += bill is not None and bill["flop"] != alone[number % len(BODIES)]["flop"]
    difference = math.fsum(bill["seconds"] for bill in billed) / seconds - 1
    expect(
        exactly("without a bill", missing, 0),
        exactly("billed otherwise than alone", others, 0),
        exactly(
            "FLOPs computed for requests and not billed", flops - sum(bill["flop"] for bill in billed), 0
        ),
        at_most("seconds billed beside the engine's, off by", abs(100 * difference), 2, "%"),
        over=f"{count:,} requests in random company",
    )
