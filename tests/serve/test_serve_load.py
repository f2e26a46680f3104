"""Under load: first come, first served; one too many is refused at once (S5), health tells the truth (S9), and an answer has
the same bits whatever else is asked (S1). Clients that leave or read nothing (S4) are in test_simulation.py.
"""

import asyncio
import random
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from engine.inference import step_times
from engine.inference.scheduler import Sequence
from engine.inference.step_times import StepTimes
from engine.storage.digest import digest
from stages.serve import engine_thread
from stages.serve.api import generation
from stages.serve.api.generation import Generation
from stages.serve.api.requests import INLINE_BYTES
from tests.serve.tiny_server import QUEUE, SLOTS, TinyServer, ask, good, post_head, refused, until


@pytest.fixture(autouse=True)
def nobody_in_line(tiny_server):
    """Forgets whom another test's requests left in line: places would be held for them."""
    tiny_server.state.admission.refusals = {}


@pytest.fixture
def held(tiny_server, monkeypatch):
    """An event: until it is set the engine's thread takes no request."""
    submit, free = tiny_server.engine.submit, threading.Event()
    monkeypatch.setattr(tiny_server.engine, "submit", lambda *request: free.wait(300) and submit(*request))
    yield free
    free.set()


@pytest.mark.law("backpressure")
def test_one_request_too_many_gets_a_429_at_once(client, tiny_server, held):
    """While the engine does nothing: no refusal waits for it. Then as many are answered as there
    are places.
    """
    places = SLOTS + QUEUE
    with ThreadPoolExecutor(places) as pool:
        first = [pool.submit(client.complete) for _ in range(places)]
        assert until(lambda: tiny_server.state.admission.reserved == places)
        for _ in range(20):
            assert 1 <= int(reply_of_refused(client).headers["retry-after"]) <= 60
        assert not any(each.done() for each in first)
        held.set()
    assert [each.result().status_code for each in first] == [200] * places


def reply_of_refused(client):
    reply = client.complete()
    assert refused(reply, 429)
    return reply


def test_a_client_that_counts_its_tries_is_told_by_them(client, tiny_server, monkeypatch):
    """As those of OpenAI and Anthropic do, which send all requests over a few connections."""
    admission = tiny_server.state.admission
    monkeypatch.setattr(admission, "refusals", {})
    monkeypatch.setattr(admission, "reserved", admission.limit)
    returned = []
    for tries in ("0", "0", "1", "many"):
        headers = {"x-stainless-retry-count": tries}
        assert refused(client.post("/v1/completions", json=ask(), headers=headers), 429)
        returned.append([refusal.returned for refusal in admission.refusals.values()].count(True))
    assert returned == [0, 0, 1, 2]


def test_a_429_comes_before_a_large_body_is_read(tiny_server, monkeypatch):
    monkeypatch.setattr(tiny_server.state.admission, "reserved", SLOTS + QUEUE)
    for path in ("/v1/completions", "/v1/chat/completions"):
        with tiny_server.connect() as connection:
            connection.sendall(post_head(path, INLINE_BYTES + 1))
            assert connection.recv(1000).startswith(b"HTTP/1.1 429 ")


def test_a_stream_tells_its_place_in_the_queue(client, tiny_server, monkeypatch):
    """In comments, which clients leave out. A request that wants several answers is one in the
    queue.
    """
    monkeypatch.setattr(generation, "WAIT_SECONDS", 0.002)
    engine, step, lines = tiny_server.engine, tiny_server.engine.step, list[str]()

    def step_once_told():
        """First of the place behind those that wait, then of the one behind those that run."""
        told = sum(line.startswith(":") for line in lines)
        return step() if engine.running < SLOTS or told > (engine.waiting == 1) else time.sleep(0.002) or []

    monkeypatch.setattr(engine, "step", step_once_told)
    with ThreadPoolExecutor(2) as pool:
        pool.submit(client.complete, most=40, n=SLOTS, ignore_eos=True)
        assert until(lambda: engine.running == SLOTS)
        pool.submit(client.complete, most=40, n=SLOTS, ignore_eos=True)
        assert until(lambda: engine.waiting == SLOTS)
        with client.stream("POST", "/v1/completions", json=ask(stream=True)) as reply:
            for line in reply.iter_lines():
                lines.append(line)
    places = [line for line in lines if line.startswith(":")]
    assert places[:2] == [": place 2 in the queue", ": place 1 in the queue"]
    assert all(re.fullmatch(r": (waiting|reading \d+ of \d+ tokens)", line) for line in places[2:])
    assert len([line for line in lines if line.startswith("data: {")]) > 1


def test_a_stream_tells_how_much_of_its_prompt_is_read(client, tiny_server, monkeypatch):
    """In comments too: each chunk is held until the one before has been told of."""
    monkeypatch.setattr(generation, "WAIT_SECONDS", 0.002)
    engine, step, lines = tiny_server.engine, tiny_server.engine.step, list[str]()
    prompt = [7] * 60

    def step_once_told():
        done = [sequence.prefilled_tokens for sequence in engine.scheduler.prefilling]
        is_told = not done or f": reading {done[0]} of {len(prompt)} tokens" in lines
        return step() if is_told else time.sleep(0.002) or []

    monkeypatch.setattr(engine, "step", step_once_told)
    with client.stream("POST", "/v1/completions", json=ask(stream=True) | {"prompt": prompt}) as reply:
        for line in reply.iter_lines():
            lines.append(line)
    told = [
        int(match[1])
        for match in (re.match(r": reading (\d+) of 60 tokens", line) for line in lines)
        if match
    ]
    assert told == sorted(set(told))
    assert len(told) >= 60 // engine.config.chunk
    assert "data: [DONE]" in lines


@pytest.mark.law("fairness")
def test_sixty_clients_are_served_in_the_order_in_which_they_came(tiny_server, held, monkeypatch):
    """Requests of 1 to 8 answers on three slots: none is refused or overtaken, and each answer has
    its own bits. The first request's text becomes tokens last.
    """
    state, scheduler = tiny_server.state, tiny_server.engine.scheduler
    wishes = [1, 2, 4, 8] * 15
    random.Random(2).shuffle(wishes)
    options: Any = {"most": 5, "temperature": 1, "logprobs": 1, "ignore_eos": True}
    admitted: list[Sequence] = []
    admit, encode, encodes = scheduler.admit, state.tokenizer.encode, threading.Event()

    async def encode_late(texts, *options):
        while texts == ["first"] and not encodes.is_set():
            await asyncio.sleep(0.01)
        return await encode(texts, *options)

    with (
        tiny_server.client(limits=httpx.Limits(max_connections=60)) as client,
        ThreadPoolExecutor(60) as pool,
    ):
        monkeypatch.setattr(scheduler, "admit", lambda: admitted.extend(new := admit()) or new)
        monkeypatch.setattr(state.admission, "limit", 60)
        monkeypatch.setattr(
            state.admission, "held_places", 0
        )  # for those whom the tests before this one refused
        monkeypatch.setattr(state.tokenizer, "encode", encode_late)
        asked = [pool.submit(client.complete, "first", n=wishes[0], **options)]
        assert until(lambda: state.admission.reserved == 1)
        asked += [pool.submit(client.complete, n=wish, seed=7, **options) for wish in wishes[1:]]
        assert until(lambda: state.engine.waiting == sum(wishes[1:]) - 1)  # the thread holds one
        encodes.set()
        assert until(lambda: state.engine.waiting == sum(wishes) - 1)
        held.set()
        replies = [good(each.result())["choices"] for each in asked]
        alone = [good(client.complete(seed=7 + n, **options))["choices"][0] | {"index": n} for n in range(8)]
    assert replies[1:] == [alone[:wish] for wish in wishes[1:]]
    priorities = [sequence.priority for sequence in admitted[: sum(wishes)]]
    assert len(priorities) == sum(wishes)
    assert priorities == sorted(priorities)


@pytest.mark.parametrize(
    ("path", "different", "body"),
    [
        ("/v1/score", 3, {"prompt": "Hello", "candidates": ["a", "Hello there, how are you", "é" * 9] * 8}),
        (
            "/v1/embeddings",
            1,
            {"input": ["The assistant answers what the user asks; the system says how. " * 3] * 6},
        ),
    ],
)
def test_scores_and_embeddings_are_what_they_are_alone_and_so_is_a_completion(
    client, tiny_server, path, different, body
):
    """No weight is changed, and nothing compiled."""
    completion = lambda: good(client.complete(most=40, ignore_eos=True, logprobs=1))["choices"]
    results = lambda: good(client.post(path, json=body))["data"]
    alone, expected, compiled = completion(), results(), tiny_server.state.engine.compiles_after_ready
    with ThreadPoolExecutor(2) as pool:
        both = pool.submit(results), pool.submit(completion)
        assert [each.result() for each in both] == [expected, alone]
    places = [each.pop("index") for each in expected]
    assert places == [*range(len(expected))]
    assert expected[different:] == expected[:-different]
    assert tiny_server.state.engine.compiles_after_ready == compiled
    assert digest(tiny_server.engine.params) == tiny_server.state.digest


def test_health_tells_that_the_engine_is_stuck(client, tiny_server, held, monkeypatch):
    assert engine_thread.STUCK_SECONDS + 0.5 < 5  # seconds, as promised
    assert client.get("/health").json()["status"] == "ok"
    monkeypatch.setattr(engine_thread, "STUCK_SECONDS", 0.4)
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(client.complete)
        assert until(lambda: client.get("/health").status_code == 503)
        assert client.get("/health").json()["status"] == "stuck"
        assert client.get("/live").status_code == 200
        held.set()
        assert until(lambda: client.get("/health").status_code == 200)
        assert reply.result().status_code == 200


def test_health_waits_for_a_program_as_long_as_it_is_known_to_take(client, tiny_server, monkeypatch):
    """Up to three times its longest run so far, 5 seconds at least, and a minute for a first run:
    on a clock that goes on while a program runs.
    """
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(engine_thread, "time", clock)
    monkeypatch.setattr(step_times, "time", clock)
    monkeypatch.setattr(tiny_server.engine, "step_times", StepTimes())
    monkeypatch.setattr(tiny_server.state.engine, "_start_seconds", 1.0)
    # of the next run of each program, after which /health is asked
    seconds: dict[str, list[float]] = {}
    seen: list[Any] = []

    def slow_down(name: str) -> None:
        run = getattr(tiny_server.engine.runner, name)

        def slow_run(*arguments: Any) -> Any:
            begin = now[0]
            for second in seconds.pop(name, ()):
                now[0] = begin + second
                reply = client.get("/health")
                assert (reply.status_code == 503) == (reply.json()["status"] == "stuck")
                assert reply.json()["wait"]["program"].startswith(name)
                assert reply.json()["wait"]["seconds"] == second
                seen.append(reply.json()["status"])
            return run(*arguments)

        monkeypatch.setattr(tiny_server.engine.runner, name, slow_run)

    def statuses(text: str, **of: list[float]) -> list[str]:
        seen.clear()
        seconds.update(of)
        assert good(client.complete(f"{text} says nothing more", 1))
        assert not seconds
        return [*seen]

    def step_and_look() -> Any:
        events = step()
        between.add(tiny_server.state.status)
        return events

    slow_down("prefill")
    slow_down("decode")
    between = set[str]()
    step = tiny_server.engine.step
    monkeypatch.setattr(tiny_server.engine, "step", step_and_look)
    assert statuses("a", decode=[3, 6]) == ["ok", "ok"]
    assert statuses("b", decode=[6, 16.7, 18]) == ["ok", "ok", "stuck"]
    assert statuses("c", decode=[19, 50, 54]) == ["ok", "ok", "stuck"]
    assert statuses("d", prefill=[3.9, 5]) == ["ok", "stuck"], "its other runs took no time at all"
    monkeypatch.setattr(tiny_server.engine, "step_times", StepTimes())
    assert statuses("e", prefill=[59, 61]) == ["ok", "stuck"]
    monkeypatch.setattr(tiny_server.engine, "step_times", StepTimes())
    monkeypatch.setattr(tiny_server.state.engine, "_start_seconds", 100.0)
    assert statuses("f", prefill=[99, 101]) == ["ok", "stuck"], "a model that took long to start"
    assert client.get("/health").json()["wait"]["program"] is None
    assert between == {"ok"}, "as soon as a program has ended"


def test_a_program_that_does_more_steps_than_ever_may_take_longer(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(step_times, "time", SimpleNamespace(monotonic=lambda: now[0]))
    times = StepTimes()
    for steps, seconds in ((4, 8.0), (1, 3.0)):
        times.begin("decode", steps)
        now[0] += seconds
    for steps, longest in ((1, 8.0), (2, 8.0), (8, 24.0)):
        times.begin("decode", steps)
        assert times.running
        assert times.longest(times.running) == longest


def test_health_before_and_after_its_time():
    with TinyServer(warm=False) as server, server.client() as client:
        assert client.get("/health").json()["status"] == "warming"
        assert client.get("/health").status_code == 503
        for reply in (client.complete(), client.chat()):
            assert refused(reply, 503)["code"] == "warming"
        assert client.post("/tokenize", json={"prompt": "a"}).status_code == 200
        server.engine.warm = lambda **_: 1 / 0
        changed = threading.Event()
        server.loop.call_soon_threadsafe(server.state.engine.start, changed.set)
        assert changed.wait(300)
        assert client.get("/health").json()["status"] == "failed"
        assert refused(client.complete(), 503)["code"] == "failed"


def test_a_failed_engine_answers_every_request():
    with TinyServer() as server, server.client() as client:
        steps = iter([server.engine.step] * 2)
        server.engine.step = lambda: next(steps)()
        assert "failed" in refused(client.complete(most=100, ignore_eos=True, n=4), 503)["message"]
        assert client.get("/health").json()["status"] == "failed"


def test_logits_that_are_not_finite_are_a_server_error(client, tiny_server, monkeypatch):
    step = tiny_server.engine.step
    monkeypatch.setattr(
        tiny_server.engine, "step", lambda: [event._replace(finish_reason="error") for event in step()]
    )
    assert refused(client.complete(most=1), 500)["type"] == "server_error"
    streamed = client.complete(most=1, stream=True)
    assert '"type":"server_error"' in streamed.text
    assert streamed.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("stream", [True, False])
def test_an_internal_error_is_a_500_and_is_printed(client, tiny_server, monkeypatch, capfd, stream):
    monkeypatch.setattr(Generation, "_piece", lambda *_: {}["a mistake"])
    reply = client.complete(most=3, stream=stream)
    assert reply.status_code == (200 if stream else 500)
    assert '"type":"server_error"' in reply.text
    assert "a mistake" not in reply.text
    assert "KeyError: 'a mistake'" in capfd.readouterr().err
    assert until(lambda: tiny_server.load == (0, 0, 0))
