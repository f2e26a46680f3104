"""Measurements of a running server: throughput, its share of its own engine's, latency under load, what each part brings."""

import contextlib
import math
import random
import statistics
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from bench.peers.process import Peer
from bench.serving.completions import complete, completion_request, random_text
from bench.serving.load import closed_loop, open_loop, percentile
from bench.serving.server import Server
from bench.timing import Timing, ratio_or_none
from engine.counting.hardware import clock

PROMPT_TOKENS, NEW_TOKENS = 32, 64  # of each request whose throughput is measured
SHARED_TOKENS = 512  # that prompts have in common where the prefix cache is measured


def random_prompts(count: int, seed: int) -> list[list[int]]:
    """Prompts of PROMPT_TOKENS token ids, no two of which begin alike."""
    rng = random.Random(seed)
    return [[rng.randrange(100, 1100) for _ in range(PROMPT_TOKENS)] for _ in range(count)]


def _requests(prompts: list[list[int]]) -> list[dict[str, Any]]:
    return [completion_request(prompt, NEW_TOKENS, ignore_eos=True) for prompt in prompts]


async def in_turns[A, B](
    first: Callable[[], Awaitable[A]], second: Callable[[], Awaitable[B]], rounds: int
) -> tuple[list[A], list[B]]:
    """What both return, round after round; which of them begins alternates."""
    firsts, seconds = [], []
    for turn in range(rounds):
        if turn % 2:
            firsts.append(await first())
        seconds.append(await second())
        if not turn % 2:
            firsts.append(await first())
    return firsts, seconds


async def throughput(server: Server, streams: int, count: int, seed: int) -> float:
    """Tokens a second over `count` greedy completions in a closed loop of `streams`."""
    completions, seconds = await closed_loop(server.client, _requests(random_prompts(count, seed)), streams)
    return sum(completion.completion_tokens for completion in completions) / seconds


async def compare_with_engine(
    server: Server, model: str, weights: str, slots: int, capacity: int, rounds: int
) -> dict[str, Any]:
    """Compares the server with its own engine without a server: as many streams as slots, in turns, round after round.

    `ratio` is the server's throughput over the engine's, the median of each round's own; `spread` is NaN when there
    is too much noise to know it. `same_text`: whether the server streamed, every round, what the engine's tokens say.
    """
    prompts = random_prompts(slots, 1)
    spec = {
        "model": model, "weights": weights, "slots": slots, "capacity": capacity, "prompts": prompts, "new": NEW_TOKENS,
        "prefixes": 0,
    }  # fmt: skip
    engine_rounds: list[dict[str, Any]] = []
    with contextlib.closing(Peer(Path(sys.executable), "slots_peer.py")) as peer:
        peer.read()
        run_engine = peer.prepare("slots", spec, engine_rounds.append)

        async def engine_seconds() -> float:
            run_engine()
            return engine_rounds[-1]["seconds"]

        run_server = lambda: closed_loop(server.client, _requests(prompts), slots)
        await run_server()
        engine, server_rounds = await in_turns(engine_seconds, run_server, rounds)
        detokenized = await server.client.post("/detokenize", {"tokens": engine_rounds[-1]["tokens"][0]})
    served = [seconds for _, seconds in server_rounds]
    texts = {tuple(completion.text for completion in completions) for completions, _ in server_rounds}
    result = ratio_or_none(Timing("engine", tuple(engine)), Timing("server", tuple(served)))
    tokens = slots * NEW_TOKENS
    return {
        "name": f"server_against_offline_{slots}", "tokens_per_second": tokens / statistics.median(served),
        "peer_tokens_per_second": tokens / statistics.median(engine), "spread": result.spread if result else math.nan,
        "ratio": statistics.median(a / b for a, b in zip(engine, served)),
        "same_text": len(texts) == 1 and next(iter(texts))[0] == detokenized.json()["prompt"],
    }  # fmt: skip


def mixed_request(rng: random.Random) -> dict[str, Any]:
    """A request of the mix that open loops send: 10 to 120 words in, 16 to 64 tokens out."""
    return completion_request(random_text(rng, rng.randint(10, 120)), rng.randint(16, 64), ignore_eos=True)


async def saturated_throughput(server: Server, slots: int, count: int) -> tuple[float, float]:
    """Requests and tokens a second of the mix when every slot is always in use."""
    rng = random.Random(2)
    completions, seconds = await closed_loop(server.client, [mixed_request(rng) for _ in range(count)], slots + 2)
    return count / seconds, sum(completion.completion_tokens for completion in completions) / seconds


async def latency_under_load(server: Server, load: float, peak_rate: float, seconds: float) -> dict[str, Any]:
    """Time to first token and inter-token latency under Poisson arrivals at `load` times `peak_rate` requests a second."""
    begin = clock()
    completions = await open_loop(server.client, mixed_request, load * peak_rate, seconds)
    took = clock() - begin
    finished = [completion for completion in completions if completion.finished]
    ttft = [completion.ttft for completion in finished]
    gaps = [completion.inter_token_latency for completion in finished if completion.completion_tokens > 1]
    return {
        "load": load, "requests": len(completions), "answered": len(finished), "requests_per_second": load * peak_rate,
        "tokens_per_second": sum(completion.completion_tokens for completion in finished) / took,
        "ttft_p50": percentile(ttft, 0.5), "ttft_p99": percentile(ttft, 0.99),
        "token_p50": percentile(gaps, 0.5), "token_p99": percentile(gaps, 0.99),
    }  # fmt: skip


async def prefix_ttft(server: Server) -> float:
    """Seconds to the first token of a prompt that begins with the same SHARED_TOKENS as the one before it."""
    rng = random.Random(3)
    shared = [rng.randrange(100, 1100) for _ in range(SHARED_TOKENS)]
    prompts = [[*shared, *random_prompts(1, 100 + turn)[0][:8]] for turn in range(2)]
    return [(await complete(server.client, completion_request(prompt, 2, ignore_eos=True))).ttft for prompt in prompts][1]


async def repetitive_throughput(server: Server) -> float:
    """Tokens a second of one stream that repeats its prompt, which suits draft tokens; the second of two streams."""
    line = "The quick brown fox jumps over the lazy dog and runs into the dark green forest.\n"
    body = completion_request(line * 6, NEW_TOKENS, ignore_eos=True)
    return 1 / [(await complete(server.client, body)).inter_token_latency for _ in range(2)][1]
