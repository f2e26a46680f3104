"""S4: a disconnect frees the slot, streaming or not."""

import asyncio
import random
from typing import Any

import pytest
from figures import at_most, milliseconds

from bench.serving.client import Client, completion_request, connect, random_text
from bench.serving.measure import closed_loop, percentile
from engine.counting.hardware import clock

pytestmark = pytest.mark.anyio

STUCK = 10.0  # seconds after which a slot counts as never to be freed


@pytest.mark.promises("S4", "a disconnect frees the slot, streaming or not")
async def test_a_disconnect_frees_the_slot(client, slots, quick, rng, expect):
    clients = slots + 2  # two of them wait for a slot
    bodies = [completion_request(random_text(rng, 12), 40, ignore_eos=True) for _ in range(slots)]
    completions, _ = await closed_loop(client, bodies, slots)
    step = percentile([completion.time_per_output_token for completion in completions], 0.5)  # when every slot is in use
    waits: list[float] = []
    stuck = 0
    for wave in range(-(-(60 if quick else 1000) // clients)):
        waits += await (_leave_at_once if wave % 8 == 7 else _leave_in_turn)(client, clients, rng)
        stuck += await _still_held(client)
    expect(  # within 250 ms, or a decode step where that is longer
        milliseconds("slot free p99", percentile(waits, 0.99), 1e3 * max(0.25, step)),
        at_most("stuck", stuck, 0),
        over=f"{len(waits)} aborts, streaming or not, waiting, reading or answering; "
        f"p50 {1e3 * percentile(waits, 0.5):.0f} ms; a decode step takes {1e3 * step:.0f} ms",
    )


async def _leave_in_turn(client: Client, count: int, rng: random.Random) -> list[float]:
    """One after the other leaves at a random moment -> seconds from each abort until the server holds one fewer.

    Nobody comes meanwhile, and the next leaves when the last one is gone, so that no wait is another's.
    """
    connections = [await _open(client, rng) for _ in range(count)]
    while await _requests_held(client) < count:
        await asyncio.sleep(0.002)
    rng.shuffle(connections)
    waits: list[float] = []
    while connections and not any(wait > STUCK for wait in waits):
        await asyncio.sleep(rng.random() / 10)
        waits.append(await _cut(client, [connections.pop()], len(connections), rng))
    for writer in connections:
        writer.transport.abort()
    return waits


async def _leave_at_once(client: Client, count: int, rng: random.Random) -> list[float]:
    """All leave at once, before the server may have seen them -> for each, seconds until it holds nobody."""
    connections = [await _open(client, rng) for _ in range(count)]
    return [await _cut(client, connections, 0, rng, first_look=0.05)] * count  # by then it has seen them


async def _open(client: Client, rng: random.Random) -> Any:
    """The connection of a request, streaming or not, that goes on for longer than anybody waits."""
    prompt = random_text(rng, rng.choice((8, 60, 200)))
    body = completion_request(prompt, 400, ignore_eos=True, stream=rng.random() < 0.6)
    _, writer = await connect(client.port)
    writer.write(client.encode("POST", "/v1/completions", body, {})[1])
    return writer


async def _cut(client: Client, writers: list[Any], left: int, rng: random.Random, first_look: float = 0.002) -> float:
    """Ends connections, by a reset or politely -> seconds until the server holds `left` requests or fewer."""
    begin = clock()
    for writer in writers:
        writer.transport.abort() if rng.random() < 0.5 else writer.close()
    await asyncio.sleep(first_look)
    while await _requests_held(client) > left and clock() - begin < STUCK:
        await asyncio.sleep(0.002)
    return clock() - begin


async def _requests_held(client: Client) -> int:
    """Requests with a slot or waiting for one."""
    health = (await client.get("/health")).json()
    return health["running"] + health["waiting"]


async def _still_held(client: Client, timeout: float = 5.0) -> int:
    """Requests that the server still holds after `timeout` seconds; 0 as soon as it holds none."""
    begin = clock()
    while (count := await _requests_held(client)) and clock() - begin < timeout:
        await asyncio.sleep(0.01)
    return count
