"""S8 and S9: SIGTERM drains, and health tells the truth."""

import asyncio
import math
import random
from typing import Any

import pytest
from figures import at_least, at_most, exactly

from bench.serving.client import complete, completion_request, random_text
from bench.serving.server import Server
from engine.counting.hardware import clock

pytestmark = pytest.mark.anyio

# While a file is there, the real engine stands still after a step that has made some tokens of an answer, not all. The product
# has no such hook: this is code that runs before it, in the process of this one test.
FREEZE = """
import os, time, engine.inference.engine as engine
whole = engine.Engine.step
def frozen(self):
    events = whole(self)
    while events and self.busy and os.path.exists({flag!r}): time.sleep(0.01)
    return events
engine.Engine.step = frozen
"""


@pytest.mark.promises("S8", "SIGTERM drains")
async def test_sigterm_drains(make_server, slots, quick, rng, expect):
    """SIGTERM while every slot is in use: what is under way is answered to its end, new requests are refused."""
    tokens = 60 if quick else 200
    async with make_server() as server:
        streams = await _fill(server, slots, tokens, rng)
        server.process.terminate()
        await asyncio.sleep(0.1)
        late = await complete(server.client, _request(2, rng), timeout=10)
        completions = await asyncio.gather(*streams)
        code = await server.wait(20)
    async with make_server() as server:  # a second signal ends it at once
        streams = await _fill(server, slots, 400, rng)
        server.process.terminate()
        await asyncio.sleep(0.2)
        begin = clock()
        server.process.terminate()
        abort_code = await server.wait(20)
        abort_seconds = clock() - begin
        await asyncio.gather(*streams)
    completed = sum(completion.finished and completion.completion_tokens == tokens for completion in completions)
    expect(
        at_least("complete", completed / slots, 1),
        at_most("new ones that were let in", float(late.status == 200), 0),
        exactly("exit code", code, 0),
        at_most("abort mode", math.nan if abort_code is None else abort_seconds, 2, " s"),
        over=f"{slots} streams at SIGTERM; a new one got {late.status or 'no connection'}; "
        f"a second signal ended it with {abort_code}",
    )


async def _fill(server: Server, slots: int, tokens: int, rng: random.Random) -> list[asyncio.Task]:
    """Fills every slot with a request of so many tokens; their completions to come."""
    streams = [asyncio.create_task(complete(server.client, _request(tokens, rng))) for _ in range(slots)]
    await asyncio.sleep(0.5)
    return streams


def _request(tokens: int, rng: random.Random) -> dict[str, Any]:
    return completion_request(random_text(rng, 8), tokens, ignore_eos=True)


@pytest.mark.promises("S9", "health tells the truth")
async def test_a_frozen_engine_is_unhealthy(make_server, rng, tmp_path, expect):
    """The engine's thread stands still in the middle of an answer, and goes on later; what /health and /live say."""
    flag = tmp_path / "frozen"
    async with make_server(preamble=FREEZE.format(flag=str(flag))) as server:
        flag.touch()
        stream = asyncio.create_task(complete(server.client, _request(100, rng)))
        unhealthy = await _seconds_until_health(server, 503)
        alive = (await server.client.get("/live", timeout=2)).status
        flag.unlink()
        healthy = await _seconds_until_health(server, 200)
        completion = await stream
    expect(
        at_most("503 after", unhealthy, 5, " s"),
        at_most("200 again after", healthy, 5, " s"),
        exactly("/live meanwhile", alive, 200),
        at_least("the answer came all the same", float(completion.finished), 1),
        over="the step of the real engine is held by code that runs before the server",
    )


async def _seconds_until_health(server: Server, status: int) -> float:
    """Seconds until /health has that status; NaN when it does not have it within 15."""
    begin = clock()
    while clock() < begin + 15:
        if (await server.client.get("/health", timeout=2)).status == status:
            return clock() - begin
        await asyncio.sleep(0.02)
    return math.nan
