"""Promises about load: who leaves frees a slot, who is too many is told so at once, and nobody is starved."""

import asyncio
import math
from typing import Any

from bench.promises import GENERATED, MS, RUNNING, Figure, Outcome, Promise, Trial, server_errors, settled
from bench.serving.http_client import Answer, connect
from bench.serving.load import closed_loop, completion, percentile, post, told, words
from engine.counting.hardware import clock
from engine.inference.slots import CHUNK

FREED = 250.0  # milliseconds, or a decode step where that is longer
STUCK = 10.0  # seconds after which a slot is taken never to be freed
OVER = 10  # times what the server can do
FLOOD = 48  # tokens of a request of the flood, on average: were all alike, they would end together


async def leaving_frees_the_slot(trial: Trial) -> Outcome:
    """Requests whose connections are cut at random moments; for each, how long until the server holds one fewer."""
    count = trial.count(1000, 60)
    size = trial.slots + 2  # two of them wait for a slot
    step = await _decode_step(trial)
    waits: list[float] = []
    stuck = 0
    for wave in range(-(-count // size)):
        waits += await (_burst if wave % 8 == 7 else _wave)(trial, size)
        if math.isnan(await settled(trial.server)):
            stuck += int((await trial.server.gauges())[RUNNING])
    trial.asked += len(waits)
    return Outcome(
        (Figure("slot free p99", percentile(waits, 0.99) * MS, max(FREED, step * MS), " ms"), Figure("stuck", stuck, 0)),
        f"{len(waits)} aborts, streaming or not, waiting, reading or answering; p50 {percentile(waits, 0.5) * MS:.0f} ms; "
        f"a decode step takes {step * MS:.0f} ms",
    )


async def _wave(trial: Trial, size: int) -> list[float]:
    """One after the other leaves at a random moment -> seconds from each abort to the first look that finds one fewer.

    Nobody comes meanwhile, and the next leaves when the last one is gone, so that no wait is another's.
    """
    open_ = [await _opened(trial) for _ in range(size)]
    while await _held(trial) < size:
        await asyncio.sleep(0.002)
    trial.rng.shuffle(open_)
    waits: list[float] = []
    while open_ and not any(wait > STUCK for wait in waits):
        await asyncio.sleep(trial.rng.random() / 10)
        waits.append(await _cut(trial, [open_.pop()], left=len(open_)))
    for writer in open_:
        writer.transport.abort()
    return waits


async def _burst(trial: Trial, size: int) -> list[float]:
    """All leave at once, before the server may have seen them -> for each, seconds until it holds nobody."""
    wait = await _cut(trial, [await _opened(trial) for _ in range(size)], left=0, first=0.05)  # by then it has seen them
    return [wait] * size


async def _opened(trial: Trial) -> Any:
    """A request that goes on for longer than anybody waits, streaming or not -> its connection."""
    prompt = words(trial.rng, trial.rng.choice((8, 60, 200)))
    body = completion(prompt, 400, ignore_eos=True, stream=trial.rng.random() < 0.6)
    _, writer = await connect("127.0.0.1", trial.server.port)
    writer.write(trial.server.client.written("POST", "/v1/completions", body, {}))
    return writer


async def _cut(trial: Trial, writers: list[Any], left: int, first: float = 0.002) -> float:
    """Ends connections, by a reset or politely -> seconds until the server holds `left` or fewer, looking from `first` on."""
    begin = clock()
    for writer in writers:
        writer.transport.abort() if trial.rng.random() < 0.5 else writer.close()
    await asyncio.sleep(first)
    while await _held(trial) > left and clock() - begin < STUCK:
        await asyncio.sleep(0.002)
    return clock() - begin


async def _held(trial: Trial) -> float:
    """Requests the server holds, with a slot or waiting for one."""
    found = (await trial.server.client.get("/health")).json()
    return found["running"] + found["waiting"]


async def _decode_step(trial: Trial) -> float:
    """Seconds a token takes each of all streams when every slot is in use."""
    bodies = [completion(words(trial.rng, 12), 40, ignore_eos=True) for _ in range(trial.slots)]
    answers, _ = await closed_loop(trial.server.client, bodies, trial.slots)
    return percentile([told(answer).a_token for answer in answers], 0.5)


async def overload_is_refused(trial: Trial) -> Outcome:
    """Ten times what the server can do, arriving whether it answers or not; before and after, as much as it can take."""
    seconds = 16.0 if not trial.quick else 6.0
    before = await _peak(trial, seconds / 2)
    rate = OVER * before / FLOOD
    answers, work = await _flood(trial, rate, seconds)
    after = await _peak(trial, seconds / 2)
    peak = (before + after) / 2
    refused = [answer for answer in answers if answer.status == 429]
    accepted = [answer for answer in answers if answer.status == 200]
    other = len(answers) - len(refused) - len(accepted) - server_errors(answers)
    without = sum("retry-after" not in answer.headers for answer in refused)
    trial.asked += len(answers)
    return Outcome(
        (
            Figure("429 p99", percentile([answer.seconds for answer in refused], 0.99) * MS, 100, " ms"),
            Figure("without Retry-After", without, 0),
            Figure("accepted throughput / peak", work / peak, 0.95, most=False),
            Figure("5xx", server_errors(answers), 0),
            Figure("unanswered", other, 0),
        ),
        f"{len(answers)} requests at {rate:.0f}/s, {len(accepted)} accepted; peak {peak:.0f} tokens/s",
    )


async def _peak(trial: Trial, seconds: float) -> float:
    """Tokens a second while every slot and a short queue are always full, after a moment to fill them."""
    end = clock() + seconds + 1

    async def stream() -> None:
        while clock() < end:
            await post(trial.server.client, _flooding(trial))

    streams = [asyncio.create_task(stream()) for _ in range(trial.slots + 4)]
    await asyncio.sleep(1)
    found = await _work(trial, seconds - 0.5)
    await asyncio.gather(*streams)
    return found


async def _flood(trial: Trial, rate: float, seconds: float) -> tuple[list[Answer], float]:
    """Poisson arrivals at `rate` -> their answers, and tokens a second from one second after the start on."""
    begin, at, sent = clock(), 0.0, []
    work = asyncio.create_task(_later(1.0, _work(trial, seconds - 1.5)))
    while (at := at + trial.rng.expovariate(rate)) < seconds:
        if (wait := begin + at - clock()) > 0:
            await asyncio.sleep(wait)
        sent.append(asyncio.create_task(post(trial.server.client, _flooding(trial))))
    return list(await asyncio.gather(*sent)), await work


async def _later(seconds: float, what: Any) -> Any:
    await asyncio.sleep(seconds)
    return await what


async def _work(trial: Trial, seconds: float) -> float:
    """Tokens a second that the server makes, by its own counter."""
    begin, first = clock(), (await trial.server.gauges())[GENERATED]
    await asyncio.sleep(seconds)
    last = (await trial.server.gauges())[GENERATED]
    return (last - first) / (clock() - begin)


def _flooding(trial: Trial) -> dict[str, Any]:
    tokens = trial.rng.randint(FLOOD // 2, FLOOD * 3 // 2)
    return completion(words(trial.rng, 10), tokens, ignore_eos=True, stream=False)


async def short_ones_are_not_starved(trial: Trial) -> Outcome:
    """Short requests one after another, alone and while a prompt as long as fits is being read beside them all the time."""
    count = trial.count(60, 12)
    client = trial.server.client
    length = trial.capacity - 40
    begin = clock()
    answer = told(await post(client, _long(trial, length)))
    chunks = math.ceil(answer.prompt_tokens / CHUNK)
    chunk = (clock() - begin) / chunks
    alone = await _firsts(trial, count)
    done = asyncio.Event()

    async def long_ones() -> int:
        read = 0
        while not done.is_set():
            read += told(await post(client, _long(trial, length))).good
        return read

    beside = asyncio.create_task(long_ones())
    await asyncio.sleep(0.3)
    short = await _firsts(trial, count)
    done.set()
    read = await beside
    trial.asked += 2 * count + read + 1
    typical = percentile(alone, 0.5)
    return Outcome(
        (Figure("short TTFT p99", percentile(short, 0.99) * MS, (2 * chunk + 2 * typical) * MS, " ms"),
         Figure("long prompts that were answered", read, 1, most=False)),
        f"{count} short requests beside prompts of {answer.prompt_tokens:,} tokens (all that fit); a chunk takes "
        f"{chunk * MS:.0f} ms, TTFT alone is {typical * MS:.0f} ms",
    )  # fmt: skip


async def _firsts(trial: Trial, count: int) -> list[float]:
    return [
        told(await post(trial.server.client, completion(words(trial.rng, 8), 4, ignore_eos=True))).first for _ in range(count)
    ]


def _long(trial: Trial, length: int) -> dict[str, Any]:
    return completion([trial.rng.randrange(1000, 2000) for _ in range(length)], 2, ignore_eos=True)


PROMISES: list[tuple[str, str, Promise]] = [
    ("S4", "a disconnect frees the slot, streaming or not", leaving_frees_the_slot),
    ("S5", "overload is refused, not suffered", overload_is_refused),
    ("S11", "short requests are not starved by a long prompt", short_ones_are_not_starved),
]
