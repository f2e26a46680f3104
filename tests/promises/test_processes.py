"""S8, S9 and X5: SIGTERM drains, health tells the truth, and a start runs nothing foreign; on servers of their own."""

import asyncio
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.serving.client import completion_request, random_text
from bench.serving.server import Server
from engine.counting.hardware import clock
from engine.model.native.library import CHECK, KERNELS
from engine.text.template import WORKER
from tests.openai_like import complete
from tests.promises.figures import at_least, at_most, exactly

pytestmark = pytest.mark.anyio

# While a file is there, the real engine stands still after a step that has made some tokens of an
# answer, not all. The product has no such hook: this is code that runs before it, in the process of
# this one test.
FREEZE = """
import os, time, engine.inference.engine as engine
whole = engine.Engine.step
def frozen(self):
    events = whole(self)
    while events and self.busy and os.path.exists({flag!r}): time.sleep(0.01)
    return events
engine.Engine.step = frozen
"""


@pytest.mark.promises(name="S8")
async def test_sigterm_drains(make_server, slots, quick, rng, expect):
    """SIGTERM while every slot is in use: what is under way is answered to its end, new requests
    are refused.
    """
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
    completed = sum(
        completion.finished and completion.completion_tokens == tokens for completion in completions
    )
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


@pytest.mark.promises(name="S9")
async def test_a_frozen_engine_is_unhealthy(make_server, rng, tmp_path, expect):
    """The engine's thread stands still in the middle of an answer, and goes on later; what /health
    and /live say.
    """
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


# Each run of the decoding program takes so many seconds more, and stands still while a file is
# there.
SLOW = """
import os, time, engine.inference.runner as runner
whole = runner.ModelRunner.decode
def slow(self, *arguments):
    time.sleep({seconds})
    while os.path.exists({flag!r}): time.sleep(0.01)
    return whole(self, *arguments)
runner.ModelRunner.decode = slow
"""
SLOW_SECONDS = 6.0


@pytest.mark.promises(name="S9")
async def test_an_engine_of_slow_steps_is_healthy(make_server, rng, tmp_path, expect):
    """Steps of 6 s are no harm; one that takes three times as long is."""
    flag = tmp_path / "frozen"
    async with make_server(preamble=SLOW.format(seconds=SLOW_SECONDS, flag=str(flag))) as server:
        stream = asyncio.create_task(complete(server.client, _request(20, rng)))
        probes = unhealthy_probes = 0
        while not stream.done():
            probes += 1
            unhealthy_probes += (await server.client.get("/health", timeout=2)).status != 200
            await asyncio.sleep(0.1)
        flag.touch()
        frozen = asyncio.create_task(complete(server.client, _request(2, rng)))
        unhealthy = await _seconds_until_health(server, 503)
        flag.unlink()
        healthy = await _seconds_until_health(server, 200)
        completions = [await stream, await frozen]
    expect(
        at_most("503 while it works", unhealthy_probes, 0),
        at_least("probes meanwhile", probes, 50),
        at_most("503 after", unhealthy, 3 * SLOW_SECONDS + 1, " s"),
        at_most("200 again after", healthy, 5, " s"),
        at_least("answers", sum(completion.finished for completion in completions), 2),
        over=f"each run of the decoding program takes {SLOW_SECONDS:g} s more, by code that runs before the server",
    )


async def _seconds_until_health(server: Server, status: int) -> float:
    """Seconds until /health has that status; NaN when it does not have it within 30."""
    begin = clock()
    while clock() < begin + 30:
        if (await server.client.get("/health", timeout=2)).status == status:
            return clock() - begin
        await asyncio.sleep(0.02)
    return math.nan


# Writes what Python's audit hooks hear of the whole start and of serving, but imports, which read
# compiled Python.
AUDIT_HOOK = """
import json, os, sys
file = os.open({log!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
forbidden = ({events})
def hear(event, args):
    if event.startswith(forbidden): os.write(file, (json.dumps([event, repr(args)[:1000]]) + chr(10)).encode())
sys.addaudithook(hear)
"""
FORBIDDEN = (
    "pickle.find_class",
    "shutil.unpack_archive",
    "socket.connect",
    "socket.sendto",
    "socket.getaddrinfo",
    "socket.gethostby",
    "socket.getnameinfo",
    "urllib.Request",
    "ftplib.",
    "http.client.connect",
    "smtplib.",
    "webbrowser.open",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "os.startfile",
    "pty.spawn",
)
# The server's own: the address it listens on, and the program it starts, known by all there is to
# its command: this Python, alone with the one file that renders chat templates (which X2 is about),
# and nothing of the environment. A first start also runs a C compiler on a copy of the server's own
# files, and this Python, alone, which loads what the compiler wrote.
OWN_ADDRESS = ("socket.getaddrinfo", "('127.0.0.1'")
OWN_CHECK = repr((sys.executable, [sys.executable, "-I", "-S", "-c", CHECK]))[
    :-2
]  # the library and its functions follow
OWN_PROGRAM = [
    "subprocess.Popen",
    repr((sys.executable, [sys.executable, "-I", "-S", "-B", str(WORKER)], None, {})),
]


def audit_hook(log: Path) -> str:
    """Lines of Python that write the FORBIDDEN events after them to a file."""
    return AUDIT_HOOK.format(log=str(log), events=", ".join(map(repr, FORBIDDEN)))


def foreign_events(log: Path) -> list[list[str]]:
    """(event, arguments) of what was written and is not the server's own."""
    events = [json.loads(line) for line in log.read_text().splitlines()]
    name, start = OWN_ADDRESS

    def builds_kernel(name: str, args: str) -> bool:
        compiles = any(f"/{kernel}.c', '-o'" in args for kernel in KERNELS)
        return name in ("subprocess.Popen", "os.posix_spawn") and (compiles or args.startswith(OWN_CHECK))

    return [
        event
        for event in events
        if event != OWN_PROGRAM
        and not builds_kernel(*event)
        and not (event[0] == name and event[1].startswith(start))
    ]


@pytest.mark.promises(name="X5")
async def test_a_start_runs_nothing_foreign(make_server, rng, tmp_path, expect):
    """A server's start and some of its work under an audit hook."""
    async with make_server(preamble=audit_hook(tmp_path / "log")) as server:
        completion = await complete(
            server.client, completion_request(random_text(rng, 8), 8, ignore_eos=True)
        )
    events = foreign_events(tmp_path / "log")
    names = "; ".join(sorted({f"{event} {args[:200]}" for event, args in events}))[:300]
    expect(
        at_most("events", len(events), 0),
        at_least("answered", float(completion.finished), 1),
        over="unpickling, unpacking, connections, name look-ups, programs other than the template's and the C compiler"
        + (names and f": {names}"),
    )
