"""S12 and S16: large requests beside small ones, and who asks again as told beside who asks at once: each gets its turn.

Among both are answers that keep to a grammar, answers of an adapter, and scores.
"""

import asyncio
import dataclasses
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

from bench.models import load
from bench.serving.client import completion_request, random_text
from bench.serving.measure import percentile
from engine.counting.hardware import clock
from engine.model.paths import unflatten
from engine.model.weights.lora import LoRA
from engine.storage.adapter import base_digest
from engine.storage.adapter_writer import save_adapter
from tests.promises.figures import at_least, at_most, exactly, servers
from tests.serve.tiny_server import QUEUE, SLOTS, TinyServer, tiny_model, until

pytestmark = pytest.mark.anyio

LARGE = (2, 4, 8)  # completions, or candidates, of a request
# that a client on a busy machine may come late; one that comes later is not counted
PUNCTUAL_SECONDS = 1.0
KINDS = ("plain", "grammar", "adapter", "score")
TEXT = "[a-z ]{4,12}"


def save_random_adapter(folder: Any, model: Any) -> None:
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)
    leaves = {
        f"blocks/{layer}/{name}": LoRA(None, normal(rows, 2) / rows, normal(2, columns), 0.5)  # type: ignore[arg-type]
        for layer in range(model.cfg.layers)
        for name, (rows, columns) in model.cfg.matrices.items()
    }
    save_adapter(folder, model.cfg, unflatten(leaves), base=base_digest(model.params), base_name="base")


@pytest.fixture(scope="module")
async def crowded(anyio_backend, make_server, tmp_path_factory, pytestconfig, request):
    """A server with the adapter `voice`, its slots, and the places of its queue."""
    folder = tmp_path_factory.mktemp("adapters")
    if request.param == "tiny":
        save_random_adapter(folder / "voice", tiny_model())
        with TinyServer(adapter_folder=folder) as tiny:
            assert until(lambda: tiny.state.engine.ready)
            await tiny_adapter(tiny)
            yield SimpleNamespace(url=tiny.url, slots=SLOTS, queue=QUEUE)
        return
    save_random_adapter(folder / "voice", load(pytestconfig.getoption("--promises-model"), dtype=None))
    slots = pytestconfig.getoption("--promises-slots")
    async with make_server("--adapter", f"voice={folder / 'voice'}", "--queue", str(slots)) as server:
        yield SimpleNamespace(url=f"http://127.0.0.1:{server.port}", slots=slots, queue=slots)


async def tiny_adapter(tiny: TinyServer) -> None:
    adding = asyncio.run_coroutine_threadsafe(tiny.state.adapters.add("voice", "voice"), tiny.loop)
    await asyncio.wrap_future(adding)


@dataclasses.dataclass
class Turn:
    """One request: its size, when it was first sent and last, when it was refused, and when it was let in, by `clock`.

    `passed_over`: how often it came as told and was refused, though one that first asked later had been let in meanwhile.
    """

    size: int
    kind: str
    first: float
    ahead: int
    sent: float = 0.0
    refused: list[float] = dataclasses.field(default_factory=list)
    admitted: float = 0.0
    passed_over: int = 0
    status: int = 0


class Crowd:
    """Clients that ask, wait and ask again, each over a connection of its own.

    The large ones for so many seconds, and at least `rounds` times; the small ones as long as they do.
    """

    def __init__(self, server: Any, seconds: float, rounds: int, rng: random.Random) -> None:
        self.server, self.rng, self.end, self.rounds = server, rng, clock() + seconds, rounds
        self.turns: list[Turn] = []

    async def gather(self, small: int, obedient: bool) -> None:
        """Sends requests of one completion from `small` clients, and of more from one client of
        each size.
        """
        large = [
            asyncio.create_task(self.client(size, KINDS[n], True))
            for n, size in enumerate((*LARGE, LARGE[0]))
        ]
        asking = lambda _: not all(task.done() for task in large)
        clients = [asyncio.create_task(self.client(1, KINDS[n % 4], obedient, asking)) for n in range(small)]
        await asyncio.gather(*large, *clients)

    async def client(
        self, size: int, kind: str, obedient: bool, goes_on: Callable[[int], bool] | None = None
    ) -> None:
        goes_on = goes_on or (lambda served: served < self.rounds or clock() < self.end)
        served = 0
        async with httpx.AsyncClient(base_url=self.server.url, timeout=600) as http:
            await asyncio.sleep(self.rng.random() / 2)
            while goes_on(served):
                await self.ask(http, size, kind, obedient)
                served += 1

    async def ask(self, http: httpx.AsyncClient, size: int, kind: str, obedient: bool) -> None:
        path, body = make_request(self.rng, size, kind)
        waiting = sum(not turn.status for turn in self.turns)
        self.turns.append(turn := Turn(size, kind, clock(), waiting))
        due, is_late = turn.first, False
        while not turn.status:
            is_late, turn.sent = is_late or clock() - due > PUNCTUAL_SECONDS, clock()
            async with http.stream("POST", path, json=body) as reply:
                if reply.status_code != 429:
                    turn.admitted = clock()  # for a stream: it begins when its request is let in
                    await reply.aread()
                    turn.status = reply.status_code
                    return
                wait = int(reply.headers["retry-after"])
            overtaken = [
                other
                for other in self.turns
                if other.first > turn.first
                and turn.refused
                and other.sent > turn.refused[-1]
                and 0 < other.admitted < turn.sent
            ]
            turn.passed_over += bool(obedient and overtaken and not is_late)
            turn.refused.append(clock())
            due = clock() + (wait if obedient else 0.02)
            await asyncio.sleep(due - clock())


def make_request(rng: random.Random, size: int, kind: str) -> tuple[str, dict[str, Any]]:
    text = random_text(rng, 6)
    if kind == "score":
        return "/v1/score", {"prompt": text, "candidates": [f" {text[: n + 1]}" for n in range(size)]}
    fields: dict[str, Any] = {"n": size, "temperature": 1, "seed": rng.randrange(99)}
    fields |= {"guided_regex": TEXT} if kind == "grammar" else {}
    fields |= {"model": "voice"} if kind == "adapter" else {}
    return "/v1/completions", completion_request(text, 12, **fields)


@pytest.mark.law("fairness")
@servers("S12", "crowded")
async def test_large_requests_are_not_starved_by_small_ones(crowded, quick, is_real, rng, expect):
    """All come again as Retry-After says."""
    crowd = Crowd(crowded, 0.0 if quick else 75.0, 2, rng)
    begin = clock()
    await crowd.gather(60 if is_real else 2 * (crowded.slots + crowded.queue), obedient=True)
    each = (clock() - begin) / len(crowd.turns)  # seconds between two ends
    large = [turn for turn in crowd.turns if turn.size > 1]
    # Beside what was ahead: the second to which Retry-After is rounded up.
    waits = [
        (turn.admitted - turn.first) / ((turn.ahead + 1) * each + 1) for turn in large if turn.kind != "score"
    ]
    figures = [
        exactly("not answered", sum(turn.status != 200 for turn in crowd.turns), 0),
        at_least("sizes served", len({turn.size for turn in large}), len(LARGE)),
        at_least("kinds served", len({turn.kind for turn in crowd.turns}), len(KINDS)),
        at_most("times that a large one was passed over", max(turn.passed_over for turn in large), 1),
    ]
    longest = at_most(
        "longest wait of a large one over the service of what was ahead", max(waits, default=0.0), 2
    )
    median = percentile(waits, 0.5)
    expect(
        *figures,
        *[longest] * is_real,
        over=f"{len(crowd.turns)} requests, {len(large)} large; the median {median:.2f}",
    )


@pytest.mark.law("fairness")
@servers("S16", "crowded")
async def test_who_waits_as_told_is_not_passed_over_twice(crowded, quick, is_real, rng, expect):
    """Small ones ask at once, again and again; large ones come as Retry-After says."""
    crowd = Crowd(crowded, 0.0 if quick else 75.0, 3, rng)
    await crowd.gather(4 * (crowded.slots + crowded.queue), obedient=False)
    large = [turn for turn in crowd.turns if turn.size > 1]
    expect(
        exactly("not answered", sum(turn.status != 200 for turn in crowd.turns), 0),
        at_least("refusals of large ones", sum(len(turn.refused) for turn in large), 1),
        at_most("times that one was passed over", max(turn.passed_over for turn in large), 1),
        over=f"{len(crowd.turns)} requests, {len(large)} large",
    )
