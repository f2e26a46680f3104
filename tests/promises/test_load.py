"""S1, S2, S4, S5 and S11: what each of many gets: the same bits, no text of another, its slot freed, its turn or a refusal."""

import asyncio
import math
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from bench.serving.client import Client, Response, TimedCompletion, completion_request, random_text, send
from bench.serving.measure import closed_loop, open_loop, percentile
from bench.serving.server import Server
from bench.timing import MIN_ROUNDS, Timing, ratio
from engine.counting.hardware import clock
from engine.inference.config import CHUNK
from tests.openai_like import chat_request, complete, read_metrics
from tests.promises.figures import at_least, at_most, exactly, slowest

pytestmark = pytest.mark.anyio

OVERLOAD = 10  # times what the server can do
MEAN_TOKENS = 48  # of a request: were all alike, they would end together
STUCK = 10.0  # seconds after which a slot counts as never to be freed
PART = 8  # characters of a secret that give it away

REQUESTS = (
    completion_request("The capital of France is", 10, logprobs=2),
    completion_request("Once upon a time there was a", 16, logprobs=1, temperature=1, seed=7),
    completion_request("one two three one two three one two", 20, logprobs=1, stream=False),
    chat_request("Name a colour.", 12, logprobs=True, top_logprobs=3),
    chat_request("Tell me about the sea.", 16, logprobs=True, temperature=1, top_p=0.9, seed=11),
    completion_request(
        "The assistant answers what the user asks; the system says ", 8, logprobs=1, stream=False
    ),
    completion_request(
        "A list: apples, pears,", 14, logprobs=1, temperature=1, seed=3, frequency_penalty=0.5, stop=["\n"]
    ),
    completion_request(
        "It was the best of times, it was", 12, logprobs=1, logit_bias={"30": 2}, stream=False
    ),
)


async def repeat_under_load(
    client: Client, requests: Sequence[dict[str, Any]], slots: int, repetitions: int, rng: random.Random
) -> tuple[int, int, int]:
    """Sends `requests` over and over, in random order, among others that come, go and hang up at
    random, then alone.

    Returns the most distinct outputs of one request, the outputs beyond the first of each when
    log-probabilities count too, and how many were not answered.
    """
    completions: dict[int, list[TimedCompletion]] = defaultdict(list)
    order = [place % len(requests) for place in range(repetitions)]
    rng.shuffle(order)
    places, stop = iter(order), asyncio.Event()

    async def repeat() -> None:
        for place in places:
            completions[place].append(await complete(client, requests[place]))
            if rng.random() < 0.1:  # now and then few are left
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
    for place, body in enumerate(requests):
        completions[place].append(await complete(client, body))
    texts = [{(each.text, each.finish_reason) for each in group} for group in completions.values()]
    bits = [
        {(each.text, each.finish_reason, *(value.hex() for value in each.logprobs)) for each in group}
        for group in completions.values()
    ]
    unanswered = sum(not each.finished for group in completions.values() for each in group)
    return max(map(len, texts)), sum(len(outputs) - 1 for outputs in bits), unanswered


@pytest.mark.law("batch invariance")
@pytest.mark.promises(
    name="S1"
)  # by day: tests/serve/test_serve_load.py and tests/inference/test_engine_company.py
async def test_the_same_request_gives_the_same_bits(client, slots, quick, rng, expect):
    """Three of eight at temperature 1, by their seeds; log-probabilities are compared as floats,
    which JSON carries whole.
    """
    await expect_same_bits(client, slots, 96 if quick else 1000, rng, expect)


@pytest.mark.promises(name="S1")
@pytest.mark.parametrize("weights", ["bfloat16", "float32"])
async def test_the_same_bits_by_weights_that_no_kernel_multiplies(
    make_server, weights, slots, quick, rng, expect
):
    async with make_server("--weights", weights) as server:
        await expect_same_bits(
            server.client, slots, 96 if quick else 400, rng, expect, f", {weights} weights"
        )


async def expect_same_bits(
    client: Client,
    slots: int,
    repetitions: int,
    rng: random.Random,
    expect: Callable[..., None],
    with_what: str = "",
) -> None:
    health = (await client.get("/health")).json()
    texts, different_bits, unanswered = await repeat_under_load(client, REQUESTS, slots, repetitions, rng)
    again = (await client.get("/health")).json()
    expect(
        exactly("distinct outputs", texts, 1),
        at_most("outputs with other bits", different_bits, 0),
        at_most("unanswered", unanswered, 0),
        at_most("programs compiled", again["compiles_after_ready"] - health["compiles_after_ready"], 0),
        over=f"{repetitions} repetitions of {len(REQUESTS)} requests{with_what}",
    )


@pytest.mark.law("isolation")
@pytest.mark.promises(name="S2")
async def test_no_completion_holds_anothers_secret(client, slots, quick, rng, expect):
    count = 64 if quick else 600
    leaked, echoed = await exchange_secrets(client, 2 * slots, count, rng)
    expect(
        at_most("answers with another's secret", leaked, 0),
        at_least("with their own", echoed, count // 4),
        over=f"{count} prompts, two to a slot; free slots filled with NaN and Inf: tests/inference/test_inference_engine.py",
    )


async def exchange_secrets(client: Client, streams: int, count: int, rng: random.Random) -> tuple[int, int]:
    """Sends prompts that each hold a secret of their own and ask for it.

    Returns how many completions hold a part of another's secret, and how many a part of their own.
    """
    secrets = [f"{rng.getrandbits(48):012x}" for _ in range(count)]
    texts: list[tuple[str, str]] = []
    remaining = iter(secrets)

    async def stream() -> None:
        for secret in remaining:
            # many begin alike, by whole chunks
            shared = random_text(random.Random(9), rng.choice((0, 140)))
            prompt = f"{shared} The password is {secret}. Repeat: the password is {secret}. The password is"
            fields = {"temperature": rng.choice((0, 1)), "seed": rng.randrange(2**32)}
            texts.append((secret, (await complete(client, completion_request(prompt, 14, **fields))).text))

    await asyncio.gather(*(stream() for _ in range(streams)))
    owner = {part: secret for secret in secrets for part in _parts(secret)}
    leaked = sum(
        any(owner.get(part, own) != own and part not in own for part in _parts(text)) for own, text in texts
    )
    echoed = sum(any(owner.get(part) == own for part in _parts(text)) for own, text in texts)
    return leaked, echoed


def _parts(text: str) -> set[str]:
    return {text[at : at + PART] for at in range(len(text) - PART + 1)}


@pytest.mark.promises(name="S4")
async def test_a_disconnect_frees_the_slot(client, slots, quick, rng, expect):
    clients = slots + 2  # two of them wait for a slot
    bodies = [completion_request(random_text(rng, 12), 40, ignore_eos=True) for _ in range(slots)]
    completions, _ = await closed_loop(client, bodies, slots)
    step = percentile(
        [completion.time_per_output_token for completion in completions], 0.5
    )  # when every slot is in use
    waits: list[float] = []
    stuck = 0
    for wave in range(-(-(60 if quick else 1000) // clients)):
        waits += await (_leave_at_once if wave % 8 == 7 else _leave_in_turn)(client, clients, rng)
        stuck += await _still_held(client)
    expect(  # within 250 ms, or a decode step where that is longer
        slowest("slot free", waits, 1e3 * max(0.25, step)),
        at_most("stuck", stuck, 0),
        over=f"{len(waits)} aborts, streaming or not, waiting, reading or answering; "
        f"p50 {1e3 * percentile(waits, 0.5):.0f} ms; a decode step takes {1e3 * step:.0f} ms",
    )


async def _leave_in_turn(client: Client, count: int, rng: random.Random) -> list[float]:
    """One after the other leaves at a random moment -> seconds from each abort until the server
    holds one fewer.

    Nobody comes meanwhile, and the next leaves when the last one is gone, so that no wait is
    another's.
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
    """All leave at once, before the server may have seen them -> for each, seconds until it holds
    nobody.
    """
    connections = [await _open(client, rng) for _ in range(count)]
    # by then it has seen them
    return [await _cut(client, connections, 0, rng, first_look=0.05)] * count


async def _open(client: Client, rng: random.Random) -> Any:
    """The connection of a request, streaming or not, that goes on for longer than anybody waits."""
    prompt = random_text(rng, rng.choice((8, 60, 200)))
    body = completion_request(prompt, 400, ignore_eos=True, stream=rng.random() < 0.6)
    _, writer = await asyncio.open_connection("127.0.0.1", client.port)
    writer.write(client.encode("POST", "/v1/completions", body, {}))
    return writer


async def _cut(
    client: Client, writers: list[Any], left: int, rng: random.Random, first_look: float = 0.002
) -> float:
    """Ends connections, by a reset or politely -> seconds until the server holds `left` requests or
    fewer.
    """
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


@pytest.mark.law("backpressure")
@pytest.mark.promises(name="S5")
async def test_overload_is_refused(server, slots, quick, rng, expect):
    """Ten times what the server can do, arriving whether it answers or not, in turns with as much
    as it can take.
    """
    seconds = 3.0 if quick else 12.0
    peaks: list[float] = []
    overloaded: list[float] = []
    responses: list[Response] = []
    for _ in range(MIN_ROUNDS if quick else 9):
        peaks.append(await _peak_throughput(server, slots, seconds, rng))
        rate = OVERLOAD * peaks[0] / MEAN_TOKENS
        counting = asyncio.create_task(_generated_per_second(server, seconds - 1.5))
        responses += await open_loop(server.client, _medium_request, rate, seconds, rng)
        overloaded.append(await counting)
    at_peak, over_it = (Timing(tuple(1 / rate for rate in rates)) for rates in (peaks, overloaded))
    share = ratio(at_peak, over_it)
    refused = [response for response in responses if response.status == 429]
    accepted = sum(response.status == 200 for response in responses)
    errors = sum(response.status >= 500 for response in responses)
    expect(
        slowest("429", [response.seconds for response in refused], 100),
        at_most("without Retry-After", sum("retry-after" not in response.headers for response in refused), 0),
        at_least("accepted throughput / peak, the low end of its interval", share.low or 0.0, 0.95),
        at_most("5xx", errors, 0),
        at_most("unanswered", len(responses) - len(refused) - accepted - errors, 0),
        over=f"{len(responses)} requests at {rate:.0f}/s, {accepted} accepted; accepted throughput / peak {share}",
    )


async def _peak_throughput(server: Server, slots: int, seconds: float, rng: random.Random) -> float:
    """Tokens a second while every slot and a short queue are always full, after a moment to fill
    them.
    """
    end = clock() + seconds + 1

    async def stream() -> None:
        while clock() < end:
            await send(server.client, _medium_request(rng))

    streams = [asyncio.create_task(stream()) for _ in range(slots + 4)]
    throughput = await _generated_per_second(server, seconds - 0.5)
    await asyncio.gather(*streams)
    return throughput


async def _generated_per_second(server: Server, seconds: float) -> float:
    """Tokens a second that the server generates, by its own counter, after a second to begin with."""
    await asyncio.sleep(1)
    begin, first = clock(), (await read_metrics(server.client))["vllm:generation_tokens_total"]
    await asyncio.sleep(seconds)
    last = (await read_metrics(server.client))["vllm:generation_tokens_total"]
    return (last - first) / (clock() - begin)


def _medium_request(rng: random.Random) -> dict[str, Any]:
    tokens = rng.randint(MEAN_TOKENS // 2, MEAN_TOKENS * 3 // 2)
    return completion_request(random_text(rng, 10), tokens, ignore_eos=True, stream=False)


@pytest.mark.promises(name="S11")
async def test_a_short_request_beside_long_prompts(server, client, quick, rng, expect):
    """Short requests one after another, alone and while a prompt as long as fits is being read
    beside them all the time.
    """
    count = 12 if quick else 60
    length = (await server.model())["max_model_len"] - 40
    begin = clock()
    prompt_tokens = (await complete(client, _long_request(length, rng))).prompt_tokens
    chunks = math.ceil(prompt_tokens / CHUNK)
    chunk = (clock() - begin) / chunks
    alone = percentile(await _ttfts(client, count, rng), 0.5)
    stop = asyncio.Event()

    async def read_long_prompts() -> int:
        finished = 0
        while not stop.is_set():
            finished += (await complete(client, _long_request(length, rng))).finished
        return finished

    beside = asyncio.create_task(read_long_prompts())
    await asyncio.sleep(0.3)
    short = await _ttfts(client, count, rng)
    stop.set()
    expect(
        slowest("short TTFT", short, 1e3 * (2 * chunk + 2 * alone)),
        at_least("long prompts that were answered", await beside, 1),
        over=f"{count} short requests beside prompts of {prompt_tokens:,} tokens (nearly all that fit); a chunk takes "
        f"{1e3 * chunk:.0f} ms, TTFT alone is {1e3 * alone:.0f} ms",
    )


async def _ttfts(client: Client, count: int, rng: random.Random) -> list[float]:
    """Seconds to the first token of short requests, one after another."""
    return [
        (await complete(client, completion_request(random_text(rng, 8), 4, ignore_eos=True))).ttft
        for _ in range(count)
    ]


def _long_request(length: int, rng: random.Random) -> dict[str, Any]:
    return completion_request([rng.randrange(1000, 2000) for _ in range(length)], 2, ignore_eos=True)
