"""S6: no request causes a compile, an out-of-memory or a blocked loop."""

import asyncio
import random
from collections.abc import Sequence

import pytest
from figures import Figure, at_most, milliseconds
from fuzz import fuzzed_request
from openai_like import fake_server

from bench.serving.client import Client, Response
from bench.serving.measure import percentile
from engine.counting.hardware import clock

pytestmark = pytest.mark.anyio

PROBES = 20  # of /health, a second


@pytest.mark.promises("S6", "no request causes a compile, an out-of-memory or a blocked loop")
async def test_nothing_disturbs_the_server(client, quick, rng, expect):
    responses, probes = await send_fuzzed(client, 800 if quick else 10_000, rng)
    compiles = (await client.get("/health")).json()["compiles_after_ready"]
    sound = sum(response.status == 200 for response in responses)
    expect(
        *disturbances(responses, probes, compiles),
        over=f"{len(responses):,} fuzzed requests of which {sound:,} were sound, {len(probes)} probes of /health",
    )


async def send_fuzzed(client: Client, count: int, rng: random.Random) -> tuple[list[Response], list[float]]:
    """Sends damaged requests, eight at a time -> their responses, and seconds of each GET of /health meanwhile."""
    responses: list[Response] = []
    places, stop = iter(range(count)), asyncio.Event()

    async def stream() -> None:
        for _ in places:
            method, path, body, headers = fuzzed_request(rng)
            responses.append(await client.request(method, path, body, headers=headers, timeout=30))

    probes = asyncio.create_task(_probe_health(client, stop))
    await asyncio.gather(*(stream() for _ in range(8)))
    stop.set()
    return responses, await probes


def disturbances(responses: Sequence[Response], probes: Sequence[float], compiles: int) -> list[Figure]:
    return [
        at_most("compiles after ready", compiles, 0),
        at_most("5xx", sum(response.status >= 500 for response in responses), 0),
        at_most("unanswered", sum(response.error is not None for response in responses), 0),
        milliseconds("/health p99", percentile(probes, 0.99), 100),
    ]


async def _probe_health(client: Client, stop: asyncio.Event) -> list[float]:
    """Seconds of each GET of /health; one that is not 200 counts as never answered."""
    seconds, at = [], clock()
    while not stop.is_set():
        response = await client.get("/health", sent_at=at, timeout=10)
        seconds.append(response.seconds if response.status == 200 else float("inf"))
        at = max(at + 1 / PROBES, clock())
        await asyncio.sleep(max(0.0, at - clock()))
    return seconds


async def test_a_server_error_and_a_silent_one_are_noticed(rng):
    count = 0

    def respond(method, path, headers, body):
        nonlocal count
        if path == "/health":
            return 200, {}
        count += 1
        return (500 if count == 9 else 400), {}

    async with fake_server(respond) as port:
        responses, probes = await send_fuzzed(Client(port), 100, rng)
    responses[0].error = "TimeoutError"
    figures = disturbances(responses, probes, compiles=1)
    assert [figure.value for figure in figures[:3]] == [1, 1, 1]
    assert not any(figure.met for figure in figures[:3])
    assert not disturbances(responses, [0.01, float("inf")], 0)[-1].met


def test_fuzzed_requests_are_the_same_for_one_seed_and_can_be_sent():
    requests, again = ([fuzzed_request(rng) for _ in range(400)] for rng in (random.Random(3), random.Random(3)))
    assert requests == again
    for method, path, body, headers in requests:
        assert Client(1).encode(method, path, body, headers)[1].startswith(method.encode())
    assert len({request.path for request in requests}) > 10
    assert len({request.method for request in requests}) > 5
