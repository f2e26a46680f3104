"""Puts load on a server and measures throughput, also against its own engine, and latency."""

import asyncio
import dataclasses
import math
import random
import statistics
from collections.abc import Callable, Sequence

from bench.cli import Json
from bench.models import answer, load
from bench.serving.client import Client, Completion, Response, completion_request, random_text, read_completion, send
from bench.serving.server import Server
from bench.timing import measure, ratio
from engine.counting.hardware import clock
from engine.inference.config import EngineConfig
from engine.inference.decode import prepare_params
from engine.inference.engine import Engine
from engine.inference.request import Adapter, Request, SamplingParams
from engine.model.weights.int8 import quantize

PROMPT_TOKENS, NEW_TOKENS = 32, 64  # of each request in a measurement of throughput
SHARE_BAR = 0.85  # of its engine's throughput, for the server
ADAPTER_RANK, ADAPTER_BAR = 8, 0.8  # of as many adapters as streams; their share of the throughput without
ABOVE = 10  # samples that must lie above a percentile for it to be reported


def percentile(values: Sequence[float], share: float) -> float:
    """Returns the smallest value that at least `share` of them do not exceed (nearest rank); NaN of none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


def tail(values: Sequence[float]) -> tuple[int, float]:
    """Returns (p, value) of the highest whole percentile, 99 at most, that ABOVE of the values lie above: p99 needs 1,000.

    Fewer than twice ABOVE values have no percentile above the median: (50, the median).
    """
    p = max(50, min(99, math.floor(100 * (1 - ABOVE / max(len(values), 1)))))
    return p, percentile(values, p / 100)


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


def make_engine(name: str, weights: str, slots: int, capacity: int) -> Engine:
    """Returns the server's engine of a model, without a server; `weights`: int8, or the model's own type."""
    model = load(name)
    params = quantize(model.params) if weights == "int8" else model.params
    engine = Engine(model.cfg, prepare_params(model.cfg, params), EngineConfig(slots, capacity))
    engine.warm()
    return engine


async def compare_with_engine(server: Server, engine: Engine, rounds: int) -> Json:
    """Compares the server with its own engine, which runs in this process, in turns, with as many streams as slots.

    `ratio` is the server's throughput over the engine's, and `met` whether it exceeds SHARE_BAR; each is None where noise
    hides it. `same_text`: whether the server's text was, in every round, that of the engine's tokens.
    """
    rng, loop, slots = random.Random(1), asyncio.get_running_loop(), engine.config.slots
    prompts = [_random_tokens(rng, PROMPT_TOKENS) for _ in range(slots)]
    requests = [Request(tuple(each), SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0)) for each in prompts]
    texts: set[tuple[str, ...]] = set()
    output: list[list[int]] = []

    def run_server() -> None:
        sent = closed_loop(server.client, [*map(_request, prompts)], slots)
        completions, _ = asyncio.run_coroutine_threadsafe(sent, loop).result()
        texts.add(tuple(completion.text for completion in completions))

    def run_engine() -> None:
        output[:] = answer(engine, requests)

    # In a thread, for the connections to the server live in this one.
    timings = await asyncio.to_thread(lambda: measure({"engine": run_engine, "server": run_server}, rounds=rounds))
    first = await server.client.post("/detokenize", {"tokens": output[0]})
    over, made = ratio(timings["engine"], timings["server"]), slots * NEW_TOKENS
    return over._asdict() | {
        "name": f"server_against_offline_{slots}",
        "tokens_per_second": made / timings["server"].median,
        "peer_tokens_per_second": made / timings["engine"].median,
        "bar": SHARE_BAR,
        "met": over.exceeds(SHARE_BAR),
        "same_text": len(texts) == 1 and next(iter(texts))[0] == first.json()["prompt"],
    }


def compare_with_adapters(engine: Engine, rounds: int) -> Json:
    """Compares as many streams as slots, each with an adapter of its own of rank ADAPTER_RANK, with as many without, in turns.

    `ratio`: of their throughput, and `met` whether it exceeds ADAPTER_BAR; each is None where noise hides it.
    """
    rng, slots = random.Random(3), engine.config.slots
    options = dataclasses.replace(engine.config, adapters=slots, adapter_rank=ADAPTER_RANK)
    adapted = Engine(engine.cfg, engine.params, options)
    adapted.warm()
    for index in range(1, slots + 1):
        adapted.runner.put_adapter(index, adapted.random_adapter())
    sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0)
    prompts = [tuple(_random_tokens(rng, PROMPT_TOKENS)) for _ in range(slots)]
    plain = [Request(each, sampling) for each in prompts]
    named = [Request(each, sampling, adapter=Adapter(str(n), n)) for n, each in enumerate(prompts, 1)]
    timings = measure({"plain": lambda: answer(engine, plain), "adapted": lambda: answer(adapted, named)}, rounds=rounds)
    over, made = ratio(timings["plain"], timings["adapted"]), slots * NEW_TOKENS
    return over._asdict() | {
        "name": f"adapters_against_none_{slots}",
        "tokens_per_second": made / timings["adapted"].median,
        "peer_tokens_per_second": made / timings["plain"].median,
        "bar": ADAPTER_BAR,
        "met": over.exceeds(ADAPTER_BAR),
    }


def _mixed_request(rng: random.Random) -> Json:
    """Returns a request of the mix of open loops: 10 to 120 words in, 16 to 64 tokens out."""
    return _request(random_text(rng, rng.randint(10, 120)), rng.randint(16, 64))


async def saturated_throughput(server: Server, slots: int, count: int) -> tuple[float, float]:
    """Returns requests and tokens a second of the mix with every slot always in use."""
    rng = random.Random(2)
    completions, seconds = await closed_loop(server.client, [_mixed_request(rng) for _ in range(count)], slots + 2)
    return count / seconds, sum(completion.completion_tokens for completion in completions) / seconds


async def latency_under_load(server: Server, load: float, peak_rate: float, seconds: float) -> Json:
    """Measures latency under Poisson arrivals at `load` times `peak_rate` requests a second.

    TTFT and time per output token have a sample a request, inter-token latency one for each gap between events with text.
    """
    begin = clock()
    responses = await open_loop(server.client, _mixed_request, load * peak_rate, seconds, random.Random(0))
    took = clock() - begin
    finished = [completion for completion in map(read_completion, responses) if completion.finished]
    samples = {
        "ttft": [each.ttft for each in finished],
        "inter_token": [gap for each in finished for gap in each.gaps],
        "per_token": [each.time_per_output_token for each in finished if each.completion_tokens > 1],
    }
    document: Json = {
        "load": load,
        "requests": len(responses),
        "answered": len(finished),
        "requests_per_second": load * peak_rate,
        "tokens_per_second": sum(completion.completion_tokens for completion in finished) / took,
    }
    for name, values in samples.items():
        share, highest = tail(values)
        document[name] = {"p50": statistics.median(values or [math.nan]), "tail_percentile": share, "tail": highest}
    return document
