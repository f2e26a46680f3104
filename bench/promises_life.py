"""Promises about a server's own life: it ends politely, says when it is stuck, and starts without doing what it should not."""

import asyncio
import json
import sys
import tempfile
from pathlib import Path

from bench.promises import Figure, Outcome, Promise, Trial
from bench.serving.load import completion, post, told, words
from bench.serving.server import Server
from engine.counting.hardware import clock
from engine.text.template import WORKER

# The step of the real engine, which stands still while a file is there. The product has no such hook: this is code that
# runs before it, in the process of this one trial.
FROZEN = """
import os, time, engine.inference.slots as s
whole = s.Slots.step
def frozen(self):
    while os.path.exists({flag!r}): time.sleep(0.01)
    return whole(self)
s.Slots.step = frozen
"""
# Everything Python's audit hooks tell of the whole start and of serving, but imports, which read compiled Python.
HEARD = """
import json, os, sys
file = os.open({log!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
forbidden = ({events})
def hear(event, args):
    if event.startswith(forbidden): os.write(file, (json.dumps([event, repr(args)[:1000]]) + chr(10)).encode())
sys.addaudithook(hear)
"""
FORBIDDEN = (
    "pickle.find_class", "shutil.unpack_archive",
    "socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostby", "socket.getnameinfo", "urllib.Request",
    "ftplib.", "http.client.connect", "smtplib.", "webbrowser.open",
    "subprocess.Popen", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.startfile", "pty.spawn",
)  # fmt: skip
# What is its own: the address it listens on, and the one program it starts, known by all there is to its command: this
# Python, alone with the one file that renders chat templates (which X2 is about), and nothing of the environment.
OWN_ADDRESS = ("socket.getaddrinfo", "('127.0.0.1'")
OWN_PROGRAM = ["subprocess.Popen", repr((sys.executable, [sys.executable, "-I", "-S", "-B", str(WORKER)], None, {}))]


async def ending_drains(trial: Trial) -> Outcome:
    """SIGTERM while every slot is in use: what is under way is answered to its end, who comes then is refused."""
    async with trial.another() as server:
        tasks = [asyncio.create_task(post(server.client, _long(trial, trial.count(200, 60)))) for _ in range(trial.slots)]
        await asyncio.sleep(0.5)
        server.signal()
        await asyncio.sleep(0.1)
        late = await post(server.client, _long(trial, 2), seconds=10)
        answers = [told(answer) for answer in await asyncio.gather(*tasks)]
        code = await server.gone(20)
    complete = sum(answer.good and answer.tokens == trial.count(200, 60) for answer in answers) / len(answers)
    ended, abort_code = await _abort(trial)
    trial.asked += 2 * trial.slots + 1
    return Outcome(
        (
            Figure("complete", complete, 1, most=False),
            Figure("new ones that were let in", float(late.status == 200), 0),
            Figure("exit code", float("nan") if code is None else code, 0),
            Figure("abort mode", ended, 2, " s"),
        ),
        f"{len(answers)} streams at SIGTERM; a new one got {late.status or 'no connection'}; "
        f"a second signal ended it with {abort_code}",
    )


async def _abort(trial: Trial) -> tuple[float, int | None]:
    """Seconds from a second signal to the end, while every slot is in use."""
    async with trial.another() as server:
        tasks = [asyncio.create_task(post(server.client, _long(trial, 400))) for _ in range(trial.slots)]
        await asyncio.sleep(0.5)
        server.signal()
        await asyncio.sleep(0.2)
        begin = clock()
        server.signal()
        code = await server.gone(20)
        seconds = clock() - begin
        await asyncio.gather(*tasks)
    return (seconds if code is not None else float("nan")), code


def _long(trial: Trial, tokens: int) -> dict:
    return completion(words(trial.rng, 8), tokens, ignore_eos=True)


async def health_tells_the_truth(trial: Trial) -> Outcome:
    """The engine's thread stands still in the middle of an answer, and goes on later; what /health and /live say."""
    with tempfile.TemporaryDirectory() as folder:
        flag = Path(folder) / "frozen"
        async with Server(trial.model, trial.flags, before=FROZEN.format(flag=str(flag))) as server:
            task = asyncio.create_task(post(server.client, _long(trial, 100)))
            await asyncio.sleep(0.3)
            flag.touch()
            begin = clock()
            told_ = await _until(server, 503, 15)
            stuck = told_ - begin
            alive = (await server.client.get("/live", seconds=2)).status
            flag.unlink()
            begin = clock()
            well = await _until(server, 200, 15) - begin
            answer = told(await task)
    return Outcome(
        (Figure("503 after", stuck, 5, " s"), Figure("200 again after", well, 5, " s"), Figure("/live meanwhile", alive, 200),
         Figure("the answer came all the same", float(answer.good), 1, most=False)),
        "the step of the real engine is held by code that runs before the server",
    )  # fmt: skip


async def _until(server: Server, status: int, seconds: float) -> float:
    """When /health first has that status; NaN when it does not have it in time."""
    end = clock() + seconds
    while clock() < end:
        if (await server.client.get("/health", seconds=2)).status == status:
            return clock()
        await asyncio.sleep(0.02)
    return float("nan")


async def nothing_foreign_runs(trial: Trial) -> Outcome:
    """A server's start and some of its work under an audit hook."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "heard"
        async with Server(trial.model, trial.flags, before=hook(log)) as server:
            answer = told(await post(server.client, _long(trial, 8)))
        heard = foreign(log)
    names = sorted({f"{event} {args[:200]}" for event, args in heard})
    return Outcome(
        (Figure("events", len(heard), 0), Figure("answered", float(answer.good), 1, most=False)),
        "unpickling, unpacking, connections, name look-ups, programs other than the template's"
        f"{': ' if names else ''}{'; '.join(names)[:300]}",
    )


def hook(log: Path) -> str:
    """Lines of Python that write what is FORBIDDEN and done after them to a file."""
    return HEARD.format(log=str(log), events=", ".join(map(repr, FORBIDDEN)))


def foreign(log: Path) -> list[list[str]]:
    """(event, arguments) of what was written and is not the server's own."""
    heard = [json.loads(line) for line in log.read_text().splitlines()]
    event, start = OWN_ADDRESS
    return [each for each in heard if each != OWN_PROGRAM and not (each[0] == event and each[1].startswith(start))]


PROMISES: list[tuple[str, str, Promise]] = [
    ("S8", "SIGTERM drains", ending_drains),
    ("S9", "health tells the truth", health_tells_the_truth),
    ("X5", "no pickle, unpacking, remote code or network at load", nothing_foreign_runs),
]
