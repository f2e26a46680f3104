"""What serving is measured by: throughput, the server against its own engine, waits under load, and what each part brings."""

import dataclasses
import math
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.peers.process import Peer
from bench.serving.load import closed_loop, completion, open_loop, percentile, post, told, words
from bench.serving.server import Server
from bench.timing import Timing, TooNoisyError, ratio
from engine.counting.hardware import clock

PROMPT, NEW = 32, 64  # tokens of each request whose throughput is measured
SHARED = 512  # tokens that prompts have in common where the prefix cache is measured


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the server under test is set up, as it says itself, and how much is measured."""

    model: str
    slots: int
    capacity: int
    weights: str
    rounds: int
    seconds: float  # of each open loop


def prompts(count: int, seed: int, vocab: int = 1000) -> list[list[int]]:
    """Prompts of PROMPT token ids, no two of which begin alike."""
    rng = random.Random(seed)
    return [[rng.randrange(100, 100 + vocab) for _ in range(PROMPT)] for _ in range(count)]


def bodies(asked: Sequence[list[int]], new: int = NEW) -> list[dict[str, Any]]:
    """Greedy completions that all run to `new` tokens."""
    return [completion(prompt, new, ignore_eos=True) for prompt in asked]


async def throughput(server: Server, streams: int, count: int, seed: int) -> float:
    """Tokens a second that `streams` clients get together, over `count` requests."""
    answers, seconds = await closed_loop(server.client, bodies(prompts(count, seed)), streams)
    return sum(told(answer).tokens for answer in answers) / seconds


async def against_offline(server: Server, at: Settings) -> dict[str, Any]:
    """The server beside its own engine without a server: as many streams as slots, in turns, round after round.

    `ratio` is the server's throughput over the engine's, each round by itself. `same`: whether all tokens were the same
    number; texts are compared by what the server streams, ids by what the engine gives, so lengths stand for both.
    """
    asked = prompts(at.slots, 1)
    spec = {
        "model": at.model, "weights": at.weights, "slots": at.slots, "capacity": at.capacity, "prompts": asked, "new": NEW,
        "prefixes": 0,
    }  # fmt: skip
    peer = Peer(Path(sys.executable), "slots_peer.py")
    try:
        peer.read()
        kept: list[dict[str, Any]] = []
        run = peer.prepare("slots", spec, kept.append)
        alone, served, texts = [], [], set()
        await closed_loop(server.client, bodies(asked), at.slots)
        for turn in range(at.rounds):
            for side in ("alone", "served") if turn % 2 else ("served", "alone"):
                if side == "alone":
                    run()
                    alone.append(kept[-1]["seconds"])
                else:
                    answers, seconds = await closed_loop(server.client, bodies(asked), at.slots)
                    served.append(seconds)
                    texts.add(tuple(told(answer).text for answer in answers))
        said = (await server.client.post("/detokenize", {"tokens": kept[-1]["tokens"][0]})).json()["prompt"]
    finally:
        peer.close()
    tokens = at.slots * NEW
    try:
        found = ratio(Timing("offline", tuple(alone)), Timing("server", tuple(served)))
        share, spread = found.value, found.spread
    except TooNoisyError as error:
        print(f"  {error}", file=sys.stderr)
        share, spread = statistics.median(a / b for a, b in zip(alone, served)), math.nan
    return {
        "name": f"server_against_offline_{at.slots}", "tokens_per_second": tokens / statistics.median(served),
        "peer_tokens_per_second": tokens / statistics.median(alone), "ratio": share, "spread": spread,
        "same_text": len(texts) == 1 and next(iter(texts))[0] == said,
    }  # fmt: skip


def mixed(rng: random.Random) -> dict[str, Any]:
    """A request of the mix that open loops send: 10 to 120 words in, 16 to 64 tokens out."""
    return completion(words(rng, rng.randint(10, 120)), rng.randint(16, 64), ignore_eos=True)


async def capacity_of(server: Server, slots: int, count: int) -> tuple[float, float]:
    """Requests and tokens a second of the mix when every slot is always in use."""
    rng = random.Random(2)
    answers, seconds = await closed_loop(server.client, [mixed(rng) for _ in range(count)], slots + 2)
    return count / seconds, sum(told(answer).tokens for answer in answers) / seconds


async def under_load(server: Server, share: float, rate: float, seconds: float) -> dict[str, Any]:
    """Waits at `share` of a capacity of `rate` requests a second, Poisson arrivals."""
    begin = clock()
    answers = [told(answer) for answer in await open_loop(server.client, mixed, share * rate, seconds)]
    took = clock() - begin
    good = [answer for answer in answers if answer.good]
    first, each = [answer.first for answer in good], [answer.a_token for answer in good if answer.tokens > 1]
    return {
        "load": share, "requests": len(answers), "answered": len(good), "requests_per_second": share * rate,
        "tokens_per_second": sum(answer.tokens for answer in good) / took,
        "ttft_p50": percentile(first, 0.5), "ttft_p99": percentile(first, 0.99),
        "token_p50": percentile(each, 0.5), "token_p99": percentile(each, 0.99),
    }  # fmt: skip


async def first_token_behind(server: Server, rounds: int) -> list[float]:
    """Seconds to the first token of prompts that begin with the same SHARED tokens, the first one's not among them."""
    rng = random.Random(3)
    shared = [rng.randrange(100, 1100) for _ in range(SHARED)]
    asked = [completion([*shared, *prompts(1, 100 + turn)[0][:8]], 2, ignore_eos=True) for turn in range(rounds + 1)]
    return [told(await post(server.client, body)).first for body in asked][1:]


async def repetitive(server: Server, rounds: int) -> list[float]:
    """Tokens a second of one stream that says again what its prompt said."""
    line = "The quick brown fox jumps over the lazy dog and runs into the dark green forest.\n"
    body = completion(line * 6, NEW, ignore_eos=True)
    found = []
    for _ in range(rounds + 1):
        answer = told(await post(server.client, body))
        found.append((answer.tokens - 1) / (answer.whole - answer.first))
    return found[1:]


async def on_and_off(first: Server, second: Server, measure: Any, rounds: int) -> tuple[float, float, float]:
    """The medians of what `measure(server, 1)` finds on both, in turns, and the median of their ratios."""
    pairs = []
    for turn in range(rounds):
        order = (first, second) if turn % 2 else (second, first)
        found = {server.port: (await measure(server, 1))[0] for server in order}
        pairs.append((found[first.port], found[second.port]))
    on, off = zip(*pairs)
    return statistics.median(on), statistics.median(off), statistics.median(a / b for a, b in pairs)


def price_of_a_million(tokens_per_second: float, dollars_an_hour: float) -> float:
    """Dollars."""
    return dollars_an_hour / 3600 / tokens_per_second * 1e6 if tokens_per_second > 0 else math.nan
