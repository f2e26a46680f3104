"""Puts load on a server and measures throughput, also against its own engine, latency, and the gain of each part."""

import asyncio
import contextlib
import functools
import itertools
import math
import random
import statistics
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from bench.cli import Json, progress
from bench.peers.process import Peer
from bench.serving.client import Client, Completion, Response, complete, completion_request, random_text, read_completion, send
from bench.serving.server import Server
from bench.timing import Timing, ratio
from engine.counting.hardware import clock

PROMPT_TOKENS, NEW_TOKENS = 32, 64  # of each request in a measurement of throughput
SHARE_BAR = 0.85  # of its engine's throughput, for the server
SHARED_TOKENS = 512  # at the beginning of prompts that measure the prefix cache


def percentile(values: Sequence[float], share: float) -> float:
    """Returns the smallest value that at least `share` of them do not exceed (nearest rank); NaN of none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


async def closed_loop(client: Client, bodies: Sequence[Json], streams: int) -> tuple[list[Completion], float]:
    """Sends all bodies, `streams` at a time; returns their completions in order, and the seconds of all."""
    free = asyncio.Semaphore(streams)

    async def send_in_turn(body: Json) -> Response:
        async with free:
            return await send(client, body)

    begin = clock()
    responses = await asyncio.gather(*map(send_in_turn, bodies))
    seconds = clock() - begin
    return [*map(read_completion, responses)], seconds


async def open_loop(
    client: Client, make_request: Callable[[random.Random], Json], rate: float, seconds: float, rng: random.Random
) -> list[Response]:
    """Sends the requests of `make_request` as Poisson arrivals, `rate` a second for `seconds`; returns all responses.

    Latency counts from when a request should be sent, as people see it, a full server's queue included.
    """
    begin, at, requests = clock(), 0.0, []
    while (at := at + rng.expovariate(rate)) < seconds:
        body = make_request(rng)
        await asyncio.sleep(max(0.0, begin + at - clock()))
        requests.append(asyncio.create_task(send(client, body, sent_at=begin + at)))
    return await asyncio.gather(*requests)


def _random_tokens(rng: random.Random, count: int) -> list[int]:
    """Returns token ids of a prompt. Two such prompts hardly begin alike."""
    return [rng.randrange(100, 1100) for _ in range(count)]


def _request(prompt: str | list[int], max_tokens: int = NEW_TOKENS) -> Json:
    return completion_request(prompt, max_tokens, ignore_eos=True)


async def in_turns(first: Callable[[], Awaitable[Any]], second: Callable[[], Awaitable[Any]], rounds: int) -> list[list[Any]]:
    """Runs both in each round and returns their results; which of them begins alternates."""
    results: list[list[Any]] = [[], []]
    for turn in range(rounds):
        for place in (0, 1) if turn % 2 else (1, 0):
            results[place].append(await (first, second)[place]())
    return results


async def throughput(server: Server, streams: int, count: int, seed: int) -> float:
    """Returns tokens a second of `count` greedy completions in a closed loop of `streams`."""
    rng = random.Random(seed)
    bodies = [_request(_random_tokens(rng, PROMPT_TOKENS)) for _ in range(count)]
    completions, seconds = await closed_loop(server.client, bodies, streams)
    return sum(completion.completion_tokens for completion in completions) / seconds


async def compare_with_engine(server: Server, model: str, weights: str, slots: int, capacity: int, rounds: int) -> Json:
    """Compares the server with its own engine without a server, in turns, with as many streams as slots.

    `ratio` is the server's throughput over the engine's, both of the median round, and `met` whether it exceeds SHARE_BAR;
    each is None where noise hides it. `same_text`: whether the server's text was, in every round, that of the engine's tokens.
    """
    rng = random.Random(1)
    prompts = [_random_tokens(rng, PROMPT_TOKENS) for _ in range(slots)]
    spec = {"model": model, "weights": weights, "slots": slots, "capacity": capacity, "prompts": prompts, "new": NEW_TOKENS}
    with contextlib.closing(Peer(Path(sys.executable), "slots_peer.py")) as peer:
        peer.read()
        peer.ask(make="slots", spec=spec)

        async def run_engine() -> Json:
            return peer.ask(run="slots")

        run_server = lambda: closed_loop(server.client, [*map(_request, prompts)], slots)
        await run_engine()
        await run_server()
        engine_rounds, server_rounds = await in_turns(run_engine, run_server, rounds)
    detokenized = await server.client.post("/detokenize", {"tokens": engine_rounds[-1]["tokens"][0]})
    engine, served = [reply["seconds"] for reply in engine_rounds], [seconds for _, seconds in server_rounds]
    texts = {tuple(completion.text for completion in completions) for completions, _ in server_rounds}
    over = ratio(Timing("engine", tuple(engine)), Timing("server", tuple(served)))
    tokens = slots * NEW_TOKENS
    return over.fields() | {
        "name": f"server_against_offline_{slots}", "tokens_per_second": tokens / statistics.median(served),
        "peer_tokens_per_second": tokens / statistics.median(engine), "bar": SHARE_BAR, "met": over.exceeds(SHARE_BAR),
        "same_text": len(texts) == 1 and next(iter(texts))[0] == detokenized.json()["prompt"],
    }  # fmt: skip


def _mixed_request(rng: random.Random) -> Json:
    """Returns a request of the mix of open loops: 10 to 120 words in, 16 to 64 tokens out."""
    return _request(random_text(rng, rng.randint(10, 120)), rng.randint(16, 64))


async def saturated_throughput(server: Server, slots: int, count: int) -> tuple[float, float]:
    """Returns requests and tokens a second of the mix with every slot always in use."""
    rng = random.Random(2)
    completions, seconds = await closed_loop(server.client, [_mixed_request(rng) for _ in range(count)], slots + 2)
    return count / seconds, sum(completion.completion_tokens for completion in completions) / seconds


async def latency_under_load(server: Server, load: float, peak_rate: float, seconds: float) -> Json:
    """Measures TTFT and inter-token latency under Poisson arrivals at `load` times `peak_rate` requests a second."""
    begin = clock()
    responses = await open_loop(server.client, _mixed_request, load * peak_rate, seconds, random.Random(0))
    took = clock() - begin
    finished = [completion for completion in map(read_completion, responses) if completion.finished]
    ttft = [completion.ttft for completion in finished]
    gaps = [completion.inter_token_latency for completion in finished if completion.completion_tokens > 1]
    return {
        "load": load, "requests": len(responses), "answered": len(finished), "requests_per_second": load * peak_rate,
        "tokens_per_second": sum(completion.completion_tokens for completion in finished) / took,
        "ttft_p50": percentile(ttft, 0.5), "ttft_p99": percentile(ttft, 0.99),
        "token_p50": percentile(gaps, 0.5), "token_p99": percentile(gaps, 0.99),
    }  # fmt: skip


async def prefix_ttft(server: Server) -> float:
    """Returns the TTFT of a prompt that begins with the same SHARED_TOKENS as the one before it."""
    rng = random.Random(3)
    shared = _random_tokens(rng, SHARED_TOKENS)
    bodies = [_request([*shared, *_random_tokens(rng, 8)], 2) for _ in range(2)]
    return [(await complete(server.client, body)).ttft for body in bodies][1]


async def repetitive_throughput(server: Server) -> float:
    """Returns tokens a second of a lone stream that repeats its prompt, which suits draft tokens; the second of two."""
    line = "The quick brown fox jumps over the lazy dog and runs into the dark green forest.\n"
    body = _request(line * 6)
    return 1 / [(await complete(server.client, body)).inter_token_latency for _ in range(2)][1]


async def gains(server: Server, model: str, flags: list[str], slots: int, rounds: int) -> list[Json]:
    """Measures the gains of batching, and of prefix cache, speculative decoding and int8 weights beside a server without each.

    The gain, `ratio`, is the quotient of the medians `on` and `off`, above 1 where the part is of use.
    """
    seeds = itertools.count(50)
    streams = lambda count: throughput(server, count, count, next(seeds))
    turns = await in_turns(lambda: streams(slots), lambda: streams(1), rounds)
    rows = [_gain("batching", f"{slots} streams at once, tokens/s", *turns)]
    # (part, flags that switch it off, figure, measurement)
    parts: tuple[tuple[str, list[str], str, Any], ...] = (
        ("prefix cache", ["--prefix-cache", "0"], f"first token behind {SHARED_TOKENS} shared tokens, s", prefix_ttft),
        ("speculative decoding", ["--no-speculative-decoding"], "repetitive text, one stream, tokens/s", repetitive_throughput),
        ("int8 weights", ["--weights", "bfloat16"], "all slots, tokens/s", lambda server: throughput(server, slots, slots, 30)),
    )
    for part, more, figure, measure in parts:
        progress(f"with and without {part}")
        async with Server(model, [*flags, *more]) as other:
            turns = await in_turns(functools.partial(measure, server), functools.partial(measure, other), rounds)
        rows.append(_gain(part, figure, *turns))
    return rows


def _gain(part: str, figure: str, on: list[float], off: list[float]) -> Json:
    first, second = (off, on) if figure.endswith(", s") else (on, off)
    gain = ratio(Timing("on", tuple(first)), Timing("off", tuple(second)))
    medians = {"on": statistics.median(on), "off": statistics.median(off)}
    return {"part": part, "measured": figure, **medians, **gain.fields()}
