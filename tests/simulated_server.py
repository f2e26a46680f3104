"""Runs the real server, from its guard to its writers, on the fake device of `simulated.py` and a clock that waits for nobody.

A seed draws clients that come, ask again as they are told or at once, read slowly or nothing, and
leave; what they ask for, completions with grammars and adapters or scores; adapters that come and
go; and a full disk behind the log, which is all that a server writes once it is ready. The routes,
admission, generations, the engine's thread, the scheduler and its sequences are the real ones. The
thread's ticks are one more task of the event loop, so that a schedule is a function of its seed.
"""

import asyncio
import dataclasses
import errno
import functools
import json
import random
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from engine.inference.request import Adapter, SamplingParams
from engine.text.detokenizer import Detokenizer
from stages.serve import engine_thread
from stages.serve.admission import Admission
from stages.serve.api import app, generation, guard
from stages.serve.api.app import Api
from stages.serve.state import ServerState
from tests.simulated import (
    NAN,
    VOCAB,
    FakeConstraint,
    alone,
    check_slots,
    draw_request,
    key_value,
    logprob_of,
    make_engine,
)
from tests.simulated_loop import SimulatedLoop

LETTERS = {token: b"abcdefg"[token : token + 1] for token in range(VOCAB)}
MOST_CLIENTS = 8
MOST_SECONDS = 3000.0  # of a schedule, on its own clock


class Ignored:
    """Metrics, and the counter of compiled programs, that nobody reads."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *_: Any) -> None:
        pass


async def compile_grammar(grammar: Any) -> Any:
    await asyncio.sleep(0.2)
    return FakeConstraint(int(re.findall(r"\d+", grammar.make())[0]))


async def encode_texts(texts: Any, **_: Any) -> list[list[int]]:
    assert not texts, "all are sent as tokens"
    return []


class SimulatedState(ServerState):
    """The state of a server whose tokens are letters."""

    def __init__(self, engine: Any, queue: int) -> None:
        tokenizer: Any = SimpleNamespace(
            controls={}, bytes_of=LETTERS.get, stream=lambda: Detokenizer(LETTERS)
        )
        self.name, self.names = "base", ["base"]
        self.engine, self.admission = (
            engine_thread.EngineThread(engine),
            Admission(engine.config.slots, queue),
        )
        self.tokenizer: Any = SimpleNamespace(
            tokenizer=tokenizer, tool_format=None, compile=compile_grammar, encode=encode_texts
        )
        self.sampling, self.stop_token_ids = SamplingParams(), frozenset()
        self.price, self.step_flops = None, 1
        self.metrics: Any = Ignored()
        self.adapters: Any = SimpleNamespace(adapters={})

    def fingerprint(self, _: Adapter | None) -> str:
        return "fp"


@dataclasses.dataclass
class Ask:
    """What a client asks for and how: `reads` at once, slowly, or nothing after a while; it `leaves` at a time, or never."""

    path: str
    body: dict[str, Any]
    expected: Callable[[Adapter | None], Any]  # None for an error: a number was none
    port: int
    obedient: bool
    counts: bool
    reads: str
    leaves: float
    is_stream: bool = False


def completion(rng: random.Random) -> tuple[str, dict[str, Any], Callable[[Adapter | None], Any]]:
    """A request for completions, and their texts and finish reasons."""
    request, n = draw_request(rng), rng.choice([1, 1, 2, 3])
    sampling = request.sampling
    body: dict[str, Any] = {
        "prompt": list(request.prompt),
        "n": n,
        "max_tokens": sampling.max_tokens,
        "seed": sampling.seed,
        "temperature": sampling.temperature,
        "min_tokens": sampling.min_tokens,
        "presence_penalty": sampling.presence_penalty,
        "stream": rng.random() < 0.5,
        "stop_token_ids": list(sampling.stop_token_ids),
        "logit_bias": {str(token): value for token, value in sampling.logit_bias.items()},
    }
    if request.constraint:
        body["guided_choice"] = [str(request.constraint.seed)]

    def expected(adapter: Adapter | None) -> Any:
        rows = [dataclasses.replace(request, sampling=row, adapter=adapter) for row in sampling.per_row(n)]
        outputs = [alone(row) for row in rows]
        if any(reason == "error" for _, reason in outputs):
            return None
        return [("".join("abcdefg"[token] for token in tokens), reason) for tokens, reason in outputs]

    return "/v1/completions", body, expected


def scores(rng: random.Random) -> tuple[str, dict[str, Any], Callable[[Adapter | None], Any]]:
    """A request for the log-probabilities of candidates, and these."""
    prompt = draw_request(rng).prompt
    candidates = [rng.choices(range(VOCAB), k=rng.randint(1, 5)) for _ in range(rng.randint(1, 4))]

    def expected(adapter: Adapter | None) -> Any:
        values = []
        for candidate in candidates:
            text, own = list[int](), list[float]()
            for position, token in enumerate((*prompt, *candidate[:-1])):
                text.append(key_value(token, position, text, int(adapter.digest) if adapter else 0))
                if position >= len(prompt) - 1:
                    own.append(logprob_of(candidate[position + 1 - len(prompt)], text))
            if NAN in text:
                return None
            values.append(own)
        return values

    return "/v1/score", {"prompt": list(prompt), "candidates": candidates}, expected


def draw_ask(rng: random.Random, port: int) -> Ask:
    path, body, expected = (scores if rng.random() < 0.25 else completion)(rng)
    return Ask(
        path,
        body,
        expected,
        port,
        obedient=rng.random() < 0.6,
        counts=rng.random() < 0.3,
        reads=rng.choice(["at once", "at once", "slowly", "nothing"]),
        leaves=rng.random() * 2 if rng.random() < 0.2 else 0.0,
        is_stream=bool(body.get("stream")),
    )


class HttpState(dict[str, Any]):
    """The state of an HTTP request, which adds the generation to lists as it begins."""

    def __init__(self, *lists: list[Any]) -> None:
        self.lists = lists

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        if name == "generation":
            for each in self.lists:
                each.append(value)


class Schedule:
    """One schedule of a seed, and who is served in it."""

    def __init__(self, seed: int, loop: SimulatedLoop) -> None:
        self.rng, self.loop = random.Random(seed), loop
        engine = make_engine(self.rng)
        self.state = SimulatedState(engine, self.rng.randint(0, 4))
        self.thread, self.live, self.ended = self.state.engine, list[Any](), False
        self.thread._loop, self.thread.ready = loop, True
        self.app = guard.Guard(api_for(self.state), (), None, frozenset(), log="json")
        self.registered: dict[str, Adapter] = {}
        self.full = self.rng.choice([0.0, 0.5, 1.0])

    async def run(self) -> None:
        rng = self.rng
        engine = asyncio.create_task(self.tick())
        asks = [draw_ask(rng, 1000 + n % 5) for n in range(rng.randint(1, MOST_CLIENTS))]
        tasks = [engine, *(asyncio.create_task(self.client(ask, rng.random() * 1.5)) for ask in asks)]
        pending = {*tasks}
        try:
            while pending != {engine}:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for each in done:
                    each.result()
            await asyncio.sleep(1)
            self.ended = True
            await engine
        finally:
            for each in tasks:
                each.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        assert not self.thread.engine.busy, "a request goes on whose client is gone"
        assert not self.thread._listeners, "somebody listens to a request that has ended"
        assert (self.state.admission.reserved, self.state.admission.body_bytes) == (0, 0), "a place is lost"

    async def tick(self) -> None:
        """The engine's thread."""
        rng, engine = self.rng, self.thread.engine
        while not self.ended:
            is_idle = not engine.busy and self.thread._work.empty()
            while (
                not (changes := engine.config.adapters and rng.random() < 0.2)
                and is_idle
                and self.loop.is_free(0.25)
            ):
                self.loop.now += 0.25  # a tick that nobody would see
            assert self.loop.now < MOST_SECONDS, "a request is never finished"
            if changes:
                self.thread._work.put(self.change_adapters)
            self.thread.tick()
            check_slots(engine)
            assert self.state.admission.reserved <= self.state.admission.limit, (
                "more are let in than there are places"
            )
            wanted = sum(len(each._unfinished) for each in self.live)
            assert engine.waiting + engine.running <= wanted, "the engine answers somebody who is gone"
            await self.loop.sleep(rng.uniform(0.005, 0.05) if engine.busy else 0.25)

    def change_adapters(self) -> None:
        """One goes, and one of few numbers comes: as in AdapterTable, behind every request that has
        looked its adapter up.
        """
        rng, engine, live = self.rng, self.thread.engine, self.state.adapters.adapters
        if live and rng.random() < 0.7:
            del live[rng.choice([*live])]
        if index := engine.free_adapter_index([adapter.index for adapter in live.values()]):
            adapter = Adapter(str(number := rng.randint(1, 3)), index)
            live[name := f"adapter-{len(self.registered)}"] = self.registered[name] = adapter
            engine.runner.put_adapter(index, number)

    async def client(self, ask: Ask, at: float) -> None:
        await asyncio.sleep(at)
        if live := [*self.state.adapters.adapters]:
            ask.body["model"] = self.rng.choice([*live, "base"])
        adapter, tries = self.registered.get(ask.body.get("model", "")), 0
        sent = json.dumps(ask.body).encode()
        while True:
            status, headers, content, whole = await self.send(ask, sent, tries)
            if status != 429:
                break
            wait = int(headers[b"retry-after"])
            assert 1 <= wait <= 60
            tries += ask.obedient
            assert self.loop.now < at + MOST_CLIENTS * (app.SEND_SECONDS + 20), "a client is never let in"
            await asyncio.sleep(wait + self.rng.random() / 2 if ask.obedient else self.rng.random())
        if status == 404:
            assert adapter, "the base is not found"
        elif whole:
            found, wanted = self.read(ask, status, content), ask.expected(adapter)
            assert found == wanted, f"an answer is not what it is alone: {found} for {wanted}"

    async def send(self, ask: Ask, content: bytes, tries: int) -> tuple[int, dict[bytes, bytes], bytes, bool]:
        """Sends a request. Returns the status, headers and body of its reply, and whether the
        client read it to its end.
        """
        parts, status, headers, is_whole, is_stuck = list[bytes](), 0, {}, False, False
        sent, leaves, rng, reserved = iter([content]), self.loop.now + ask.leaves, self.rng, list[Any]()
        names = {"host": "localhost", "content-type": "application/json", "content-length": str(len(content))}
        if ask.counts and ask.obedient:
            names["x-stainless-retry-count"] = str(tries)
        scope: Any = {
            "type": "http",
            "method": "POST",
            "path": ask.path,
            "query_string": b"",
            "client": ("127.0.0.1", ask.port),
            "headers": [(name.encode(), value.encode()) for name, value in names.items()],
            "state": HttpState(self.live, reserved),
        }

        async def receive() -> dict[str, Any]:
            if (body := next(sent, None)) is not None:
                return {"type": "http.request", "body": body}
            await asyncio.sleep(leaves - self.loop.now if ask.leaves else 10 * MOST_SECONDS)
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            nonlocal status, headers, is_whole, is_stuck
            if message["type"] == "http.response.start":
                status, headers = message["status"], dict(message["headers"])
                is_full = self.state.admission.reserved >= self.thread.engine.config.slots
                assert status != 429 or is_full, "somebody is refused while a slot is empty"
                if ask.reads == "nothing" and not ask.is_stream and status == 200:
                    is_stuck = True
                    await asyncio.sleep(app.SEND_SECONDS + 1)
                    raise AssertionError("a reply waits for somebody who reads nothing")
                return
            parts.append(message["body"])
            is_whole = not message.get("more_body")
            if ask.reads == "slowly":
                await asyncio.sleep(rng.expovariate(5))
            elif ask.reads == "nothing" and ask.is_stream and status == 200 and len(parts) > 2:
                await asyncio.sleep(app.SEND_SECONDS + 1)
                raise AssertionError("a stream waits for somebody who reads nothing")

        await self.app(scope, receive, send)
        for each in reserved:
            assert not each._unfinished, "a request ends before its completions"
            self.live.remove(each)
        is_gone = is_stuck or (ask.leaves and self.loop.now > leaves - 1e-6)
        return status, headers, b"".join(parts), is_whole and not is_gone

    def log(self, line: str, flush: bool) -> None:
        """Prints to a disk that is full now and then."""
        if self.rng.random() < self.full:
            raise OSError(errno.ENOSPC, "No space left on device")

    def read(self, ask: Ask, status: int, content: bytes) -> Any:
        """Returns what a reply says; None for logits that were no numbers."""
        if b"no finite logits" in content:
            return None
        assert status == 200, content
        if ask.path == "/v1/score":
            return [each["token_logprobs"] for each in json.loads(content)["data"]]
        if not ask.is_stream:
            return [(each["text"], each["finish_reason"]) for each in json.loads(content)["choices"]]
        *events, last = [
            line.removeprefix("data: ")
            for line in content.decode().split("\n\n")
            if line.startswith("data: ")
        ]
        assert last == "[DONE]"
        texts, reasons = [""] * ask.body["n"], [None] * ask.body["n"]
        for event in events:
            for each in json.loads(event)["choices"]:
                texts[each["index"]] += each["text"]
                reasons[each["index"]] = each["finish_reason"] or reasons[each["index"]]
        return list(zip(texts, reasons))


@functools.cache
def _api() -> Api:
    state: Any = SimpleNamespace(engine=SimpleNamespace(cfg=SimpleNamespace(vocab=VOCAB)))
    return Api(state, "1")


def api_for(state: ServerState) -> Api:
    """The routes, made once: their documents take longer than a schedule."""
    _api()._state = state
    return _api()


def simulate_server(seed: int) -> None:
    """Runs the schedule of a seed to its end. Raises AssertionError where a promise is broken."""
    loop = SimulatedLoop()
    with pytest.MonkeyPatch.context() as patch:
        for module in (app, generation, guard, engine_thread):
            patch.setattr(module, "time", SimpleNamespace(monotonic=loop.time))
        patch.setattr(engine_thread, "CompileCounter", Ignored)
        patch.setattr(engine_thread, "IDLE_SECONDS", 0)
        schedule = Schedule(seed, loop)
        patch.setattr(guard, "print", schedule.log, raising=False)
        loop.run(schedule.run())
