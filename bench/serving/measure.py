"""Puts load on a server and measures throughput, also against its own engine, and latency."""

import asyncio
import dataclasses
import itertools
import math
import random
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bench.machine import Json
from bench.models import answer, load
from bench.serving.client import (
    Client,
    Response,
    TimedCompletion,
    completion_request,
    random_text,
    read_completion,
    send,
)
from bench.serving.server import Server
from bench.timing import Timing, measure, ratio
from engine.counting.hardware import clock
from engine.errors import UserError
from engine.inference.config import EngineConfig
from engine.inference.constraints import GrammarCompiler
from engine.inference.engine import Engine
from engine.inference.grammars import json_grammar
from engine.inference.request import Adapter, Request, SamplingParams
from engine.text.tokenizer import Tokenizer

PROMPT_TOKENS = 32
NEW_TOKENS = 64  # of each request in a measurement of throughput
SHARE_BAR = 0.85  # of its engine's throughput, for the server
ADAPTER_RANK = 8
ADAPTER_BAR = 0.8  # of as many adapters as streams; their share of the throughput without
GRAMMAR_BAR = 0.9  # of the throughput without a grammar
IDLE_BAR = 0.95  # of the throughput in one slot, for a lone stream in many
SCORED_PROMPT = 256
CANDIDATES = 4
CANDIDATE_TOKENS = 4
SCORE_BAR = 100.0  # tokens, answers, tokens of each, answers a second
ABOVE = 10  # samples that must lie above a percentile for it to be reported


def percentile(values: Sequence[float], share: float) -> float:
    """Returns the smallest value that at least `share` of them do not exceed (nearest rank); NaN of
    none.
    """
    ordered = sorted(values)
    if ordered:
        return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
    return math.nan


def tail(values: Sequence[float]) -> tuple[int, float]:
    """Returns (p, value) of the highest whole percentile, 99 at most, that ABOVE of the values lie
    above: p99 needs 1,000.

    Fewer than twice ABOVE values have no percentile above the median: (50, the median).
    """
    p = max(50, min(99, math.floor(100 * (1 - ABOVE / max(len(values), 1)))))
    return p, percentile(values, p / 100)


async def closed_loop(
    client: Client, bodies: Sequence[Json], streams: int
) -> tuple[list[TimedCompletion], float]:
    """Sends all bodies, `streams` at a time; returns their completions in order, and the seconds of
    all.
    """
    free = asyncio.Semaphore(streams)

    async def send_in_turn(body: Json) -> Response:
        async with free:
            return await send(client, body)

    begin = clock()
    responses = await asyncio.gather(*map(send_in_turn, bodies))
    seconds = clock() - begin
    return [*map(read_completion, responses)], seconds


async def open_loop(
    client: Client,
    make_request: Callable[[random.Random], Json],
    rate: float,
    seconds: float,
    rng: random.Random,
) -> list[Response]:
    """Sends the requests of `make_request` as Poisson arrivals, `rate` a second for `seconds`;
    returns all responses.

    Latency counts from when a request should be sent, as people see it, a full server's queue
    included.
    """
    # Requests are made before the first is sent: the server shall have the cores.
    plan = list[tuple[float, Json]]()
    at = rng.expovariate(rate)
    while at < seconds:
        plan.append((at, make_request(rng)))
        at += rng.expovariate(rate)
    requests = []
    begin = clock()
    for at, body in plan:
        await asyncio.sleep(max(0.0, begin + at - clock()))
        requests.append(asyncio.create_task(send(client, body, sent_at=begin + at)))
    return await asyncio.gather(*requests)


def _random_tokens(rng: random.Random, count: int) -> list[int]:
    """Returns token ids of a prompt. Two such prompts hardly begin alike, so that the prefix cache
    has neither.
    """
    return [rng.randrange(100, 1100) for _ in range(count)]


def _request(prompt: str | list[int], max_tokens: int = NEW_TOKENS) -> Json:
    return completion_request(prompt, max_tokens, ignore_eos=True)


def make_engine(name: str, weights: Any, slots: int, capacity: int) -> tuple[Engine, Tokenizer]:
    """Returns the server's engine of a model, without a server, and its tokenizer; `weights`: as of
    EngineConfig.
    """
    config = EngineConfig(slots, capacity, weights, prefix_cache_bytes=None)  # texts come again
    # As the server does: int8 of other floats is another model.
    model = load(name, dtype=None, keep_kinds=config.kept_kinds)
    if model.tokenizer is None:
        raise UserError(f"{name} has no tokenizer, so there is no text to serve. Give a model that has one.")
    config = config.with_capacity(model.cfg, 0)
    cfg = config.model_config(model.cfg)
    engine = Engine(cfg, config.prepare_params(cfg, model.params), config)
    engine.warm()
    return engine, model.tokenizer


async def compare_with_engine(server: Server, engine: Engine, rounds: int) -> Json:
    """Compares the server with its own engine, which runs in this process, interleaved, with as
    many streams as slots.

    Raises UserError unless the server's texts are, in every round, those of the engine's tokens.
    """
    rng = random.Random(1)
    loop = asyncio.get_running_loop()
    slots = engine.config.slots
    prompts = [_random_tokens(rng, PROMPT_TOKENS) for _ in range(slots)]
    requests = [
        Request(tuple(each), SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0)) for each in prompts
    ]
    texts: set[tuple[str, ...]] = set()
    output: list[list[int]] = []

    def run_server() -> None:
        sent = closed_loop(server.client, [*map(_request, prompts)], slots)
        completions, _ = asyncio.run_coroutine_threadsafe(sent, loop).result()
        texts.add(tuple(completion.text for completion in completions))

    def run_engine() -> None:
        output[:] = answer(engine, requests)

    # In a thread, for the connections to the server live in this one.
    timings = await asyncio.to_thread(
        lambda: measure({"engine": run_engine, "server": run_server}, rounds=rounds)
    )
    replies = [await server.client.post("/detokenize", {"tokens": tokens}) for tokens in output]
    expected = _without_half_characters(reply.json()["prompt"] for reply in replies)
    if any(_without_half_characters(each) != expected for each in texts):
        raise UserError(
            "The server's texts are not those of the engine, so that their speeds cannot be compared."
        )
    return _row(
        f"the server over its engine, {slots} streams", SHARE_BAR, timings["engine"], timings["server"], slots
    )


def _without_half_characters(texts: Iterable[str]) -> list[str]:
    """Returns the texts without the character that their last token may have begun."""
    return [text.rstrip("\N{REPLACEMENT CHARACTER}") for text in texts]


def compare_with_one_slot(engine: Engine, rounds: int) -> Json:
    """Compares a lone stream in as many slots as the engine has with one in a single slot, without
    draft tokens.
    """

    def with_slots(slots: int) -> Engine:
        config = dataclasses.replace(engine.config, slots=slots, speculate=False)
        return Engine(engine.cfg, engine.params, config)

    single = with_slots(1)
    all_slots = with_slots(engine.config.slots)
    single.warm()
    all_slots.warm()
    name = f"{engine.config.slots} slots over one, 1 stream"
    return _compare(name, IDLE_BAR, (single, _greedy(1)), (all_slots, _greedy(1)), rounds)


def compare_with_adapters(engine: Engine, rounds: int) -> Json:
    """Compares as many streams as slots, each with an adapter of its own of rank ADAPTER_RANK, with
    as many without.
    """
    slots = engine.config.slots
    options = dataclasses.replace(engine.config, adapters=slots, adapter_rank=ADAPTER_RANK)
    adapted = Engine(engine.cfg, engine.params, options)
    adapted.warm()
    for index in range(1, slots + 1):
        adapted.runner.put_adapter(index, adapted.random_adapter())
    plain = _greedy(slots)
    with_adapters = []
    for index, request in enumerate(plain, 1):
        with_adapters.append(dataclasses.replace(request, adapter=Adapter(str(index), index)))
    name = f"an adapter each, {slots} streams"
    return _compare(name, ADAPTER_BAR, (engine, plain), (adapted, with_adapters), rounds)


def compare_with_grammars(engine: Engine, tokenizer: Tokenizer, rounds: int) -> list[Json]:
    """Compares streams that keep to a JSON schema with streams that keep to none: half of all
    slots, and a single one.

    The string of the schema is longer than the answers, so that each has NEW_TOKENS tokens.
    """
    text = {"type": "string", "minLength": 100 * NEW_TOKENS}
    schema = {
        "type": "object",
        "properties": {"text": text},
        "required": ["text"],
        "additionalProperties": False,
    }
    constraint = GrammarCompiler(tokenizer, engine.cfg.vocab, tokenizer.controls).compile(
        json_grammar(schema)
    )
    rows = []
    for streams, name in ((engine.config.slots, "a schema for every second"), (1, "a schema")):
        plain = _greedy(streams)
        constrained = list(plain)
        for index in range(0, len(plain), 2):
            constrained[index] = dataclasses.replace(plain[index], constraint=constraint)
        unit = "stream" if streams == 1 else "streams"
        full_name = f"{name}, {streams} {unit}"
        rows.append(_compare(full_name, GRAMMAR_BAR, (engine, plain), (engine, constrained), rounds))
    return rows


def _greedy(streams: int) -> list[Request]:
    rng = random.Random(3)
    sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0)
    return [Request(tuple(_random_tokens(rng, PROMPT_TOKENS)), sampling) for _ in range(streams)]


Side = tuple[Engine, list[Request]]


def _compare(name: str, bar: float, plain: Side, other: Side, rounds: int) -> Json:
    """Compares how fast an engine answers its requests with how fast another answers as many,
    interleaved.
    """
    timings = measure({"plain": lambda: answer(*plain), "other": lambda: answer(*other)}, rounds=rounds)
    return _row(name, bar, timings["plain"], timings["other"], len(plain[1]))


def _row(name: str, bar: float, peer: Timing, timing: Timing, streams: int) -> Json:
    """Returns a row of the document. `ratio`: the throughput over the peer's, and `met` whether it
    exceeds `bar`; None where noise hides it.
    """
    speedup = ratio(peer, timing)
    tokens = streams * NEW_TOKENS
    return speedup._asdict() | {
        "name": name,
        "tokens_per_second": tokens / timing.median,
        "peer_tokens_per_second": tokens / peer.median,
        "bar": bar,
        "met": speedup.exceeds(bar),
    }


async def scored_per_second(server: Server, rounds: int) -> Json:
    """Measures POST /v1/score: CANDIDATES answers of CANDIDATE_TOKENS tokens to a prompt that the
    prefix cache holds.

    A candidate counts as one. `ratio` is their number a second, with its interval. Raises UserError
    when the server refuses.
    """
    rng = random.Random(4)
    prompt = _random_tokens(rng, SCORED_PROMPT)
    seconds = []
    for _ in range(rounds + 1):
        candidates = [_random_tokens(rng, CANDIDATE_TOKENS) for _ in range(CANDIDATES)]
        begin = clock()
        reply = await server.client.post("/v1/score", {"prompt": prompt, "candidates": candidates})
        seconds.append(clock() - begin)
        if reply.status != 200:
            raise UserError(
                f"/v1/score answers {reply.status}: {bytes(reply.body)[:200].decode(errors='replace')}"
            )
    rounds_seconds = tuple(seconds[1:])  # the first reads the prompt
    at_the_bar = Timing((CANDIDATES / SCORE_BAR,) * rounds)
    per_second = ratio(at_the_bar, Timing(rounds_seconds)).scaled(SCORE_BAR)
    return per_second._asdict() | {
        "name": "candidates scored a second",
        "bar": SCORE_BAR,
        "met": per_second.exceeds(SCORE_BAR),
    }


def _mixed_request(rng: random.Random) -> Json:
    """Returns a request of the mix of open loops: 10 to 120 words in, 16 to 64 tokens out."""
    return _request(random_text(rng, rng.randint(10, 120)), rng.randint(16, 64))


async def saturated_throughput(server: Server, slots: int, count: int) -> tuple[float, float]:
    """Returns requests and tokens a second of the mix with every slot always in use."""
    rng = random.Random(2)
    requests = [_mixed_request(rng) for _ in range(count)]
    completions, seconds = await closed_loop(server.client, requests, slots + 2)
    tokens = sum(completion.completion_tokens for completion in completions)
    return count / seconds, tokens / seconds


async def latency_under_load(server: Server, load: float, peak_rate: float, seconds: float) -> Json:
    """Measures latency under Poisson arrivals at `load` times `peak_rate` requests a second.

    TTFT and time per output token have a sample a request, inter-token latency one for each gap
    between events with text.
    """
    begin = clock()
    responses = await open_loop(server.client, _mixed_request, load * peak_rate, seconds, random.Random(0))
    took = clock() - begin
    finished = [completion for completion in map(read_completion, responses) if completion.finished]
    samples = {
        "ttft": [each.ttft for each in finished],
        "inter_token": list(itertools.chain.from_iterable(each.gaps for each in finished)),
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
        document[name] = {
            "p50": statistics.median(values or [math.nan]),
            "tail_percentile": share,
            "tail": highest,
        }
    return document
