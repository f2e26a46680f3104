"""Promises about what an answer is: the same whatever the load, nobody else's, and from weights that never change."""

import asyncio
import random
import re
from collections import defaultdict
from typing import Any

from bench.fuzz import fuzzed
from bench.promises import Figure, Outcome, Promise, Trial
from bench.serving.http_client import Client
from bench.serving.load import Told, chat, completion, post, told, words

REPEATED = (
    completion("The capital of France is", 10, logprobs=2),
    completion("Once upon a time there was a", 16, logprobs=1, temperature=1, seed=7),
    completion("one two three one two three one two", 20, logprobs=1, stream=False),
    chat("Name a colour.", 12, logprobs=True, top_logprobs=3),
    chat("Tell me about the sea.", 16, logprobs=True, temperature=1, top_p=0.9, seed=11),
    completion(words(random.Random(5), 150), 8, logprobs=1, stream=False),
    completion("A list: apples, pears,", 14, logprobs=1, temperature=1, seed=3, frequency_penalty=0.5, stop=["\n"]),
    completion("It was the best of times, it was", 12, logprobs=1, logit_bias={"30": 2}, stream=False),
)


async def same_whatever_the_load(trial: Trial) -> Outcome:
    """A few requests over and over, in random order, among others that come, go and hang up at random."""
    repetitions = trial.count(1000, 96)
    seen: dict[int, set[Any]] = defaultdict(set)
    bits: dict[int, set[Any]] = defaultdict(set)
    unanswered = await _under_load(trial, repetitions, seen, bits)
    texts = max(len(found) for found in seen.values())
    different = sum(len(found) - 1 for found in bits.values())
    return Outcome(
        (Figure("distinct outputs", texts, 1), Figure("outputs with other bits", different, 0),
         Figure("unanswered", unanswered, 0)),
        f"{repetitions} repetitions of {len(REPEATED)} requests, half seeded at temperature 1, among as many others",
    )  # fmt: skip


async def _under_load(trial: Trial, repetitions: int, seen: dict[int, set[Any]], bits: dict[int, set[Any]]) -> int:
    order = [place % len(REPEATED) for place in range(repetitions)]
    trial.rng.shuffle(order)
    client, unanswered = trial.server.client, 0
    left = iter(order)

    async def asks() -> None:
        nonlocal unanswered
        for place in left:
            found = told(await post(client, REPEATED[place]))
            unanswered += not found.good
            seen[place].add((found.text, found.finished))
            bits[place].add((found.text, found.finished, tuple(value.hex() for value in found.logprobs)))
            if trial.rng.random() < 0.1:  # now and then few are left, so that a request is also alone
                await asyncio.sleep(trial.rng.random() * 0.3)

    async def disturbs(done: asyncio.Event) -> None:
        while not done.is_set():
            body = trial.drawn(24, temperature=trial.rng.choice((0, 1)), seed=trial.rng.randrange(2**32))
            trial.asked += 1
            patience = 0.05 if trial.rng.random() < 0.2 else 30.0
            await post(client, body, seconds=patience)
            await asyncio.sleep(trial.rng.expovariate(4))

    done = asyncio.Event()
    others = [asyncio.create_task(disturbs(done)) for _ in range(trial.slots)]
    await asyncio.gather(*(asks() for _ in range(trial.slots)))
    done.set()
    await asyncio.gather(*others)
    for place, body in enumerate(REPEATED):  # and alone
        found = told(await post(client, body))
        seen[place].add((found.text, found.finished))
        bits[place].add((found.text, found.finished, tuple(value.hex() for value in found.logprobs)))
    trial.asked += repetitions
    return unanswered


async def no_text_of_another(trial: Trial) -> Outcome:
    """Each prompt holds a secret of its own and asks for it; no answer may hold a part of another's."""
    count = trial.count(600, 64)
    secrets = [f"{trial.rng.getrandbits(48):012x}" for _ in range(count)]

    def asked(secret: str) -> dict[str, Any]:
        shared = words(random.Random(9), trial.rng.choice((0, 140)))  # many begin alike, by whole chunks
        text = f"{shared} The password is {secret}. Repeat: the password is {secret}. The password is"
        return completion(text, 14, temperature=trial.rng.choice((0, 1)), seed=trial.rng.randrange(2**32))

    client = trial.server.client
    answers: list[Told] = []
    left = iter(range(count))

    async def stream() -> None:
        for place in left:
            answers.append(told(await post(client, asked(secrets[place]))))
            own.append(secrets[place])

    own: list[str] = []
    await asyncio.gather(*(stream() for _ in range(2 * trial.slots)))
    trial.asked += count
    parts = {secret[at : at + 8]: secret for secret in secrets for at in range(5)}
    leaked = echoed = 0
    for mine, answer in zip(own, answers):
        pieces = {answer.text[at : at + 8] for at in range(max(0, len(answer.text) - 7))}
        leaked += any(parts.get(piece, mine) != mine and piece not in mine for piece in pieces)
        echoed += any(parts.get(piece) == mine for piece in pieces)
    return Outcome(
        (Figure("answers with another's secret", leaked, 0), Figure("with their own", echoed, count // 4, most=False)),
        f"{count} prompts, two to a slot; free slots filled with NaN and Inf: tests/inference/test_slots.py",
    )


async def weights_never_change(trial: Trial) -> Outcome:
    """The digest of the weights in memory, at load, after everything, and as the server says when it is ended, which this
    does; and every route that might change them."""
    client, left = trial.server.client, iter(range(trial.count(500, 100)))

    async def sends() -> None:
        for _ in left:
            asked = fuzzed(trial.rng)
            await client.ask(asked.method, asked.path, asked.body, headers=asked.headers)
            trial.asked += 1

    await asyncio.gather(*(sends() for _ in range(trial.slots)))
    attested = (await trial.server.client.get("/v1/attestation")).json()
    routes = (await trial.server.client.get("/openapi.json")).json()["paths"]
    accepted = await _accepted(trial.server.client, routes)
    trial.server.signal()
    code = await trial.server.gone(20)
    said = re.search(r"Weights \w+.*: SHA-256 ([0-9a-f]{16})", trial.server.words())
    last = said[1] if said else "nothing"  # the beginning of it; that all of it is that of load is in the exit code
    digests = {attested["digest_at_load"], attested["digest"], last + attested["digest"][len(last) :]}
    return Outcome(
        (Figure("digests at load, on demand and at shutdown", len(digests), 1),
         Figure("exit code", float("nan") if code is None else code, 0),
         Figure("routes that take PUT, PATCH or DELETE or load weights", accepted, 0)),
        f"after {trial.asked:,} requests of all kinds",
    )  # fmt: skip


UPDATES = (
    "/update_weights", "/v1/update_weights", "/update_weights_from_disk", "/load_weights", "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter", "/init_weight_update", "/collective_rpc", "/sleep", "/wake_up", "/reset_prefix_cache", "/pause",
    "/v1/models/load", "/v1/fine_tuning/jobs", "/v1/files", "/admin", "/debug", "/shutdown",
)  # fmt: skip


async def _accepted(client: Client, routes: dict[str, Any]) -> int:
    paths = [path.replace("{model}", "default") for path in routes]
    tried = [(method, path) for path in paths for method in ("PUT", "PATCH", "DELETE")]
    tried += [(method, path) for path in UPDATES for method in ("GET", "POST", "PUT")]
    return sum([(await client.ask(method, path, {})).status < 400 for method, path in tried])


PROMISES: list[tuple[str, str, Promise]] = [
    ("S1", "the same request gives the same bytes and log-probabilities, whatever the load", same_whatever_the_load),
    ("S2", "no text of one request reaches another", no_text_of_another),
]
LAST: list[tuple[str, str, Promise]] = [("S3", "serving never changes weights, and no route could", weights_never_change)]
