"""Under load: who leaves frees a slot (S4), who is too many is told at once (S5), health tells the truth (S9), an answer
has the same bits whatever else is asked (S1), and shutting down lets what is under way end (S8)."""

import asyncio
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from tiny_server import QUEUE, SLOTS, TinyServer, ask, post_head, say, until

from stages.serve import state
from stages.serve.api import event_stream
from stages.serve.api.generation import Generation

LONG = 130  # tokens


@pytest.fixture
def slowed(tiny_server: TinyServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], None]]:
    """Makes each step of the engine take so many seconds more."""
    slots = tiny_server.slots
    step = slots.step
    seconds = [0.0]

    def slow() -> Any:
        time.sleep(seconds[0])
        return step()

    monkeypatch.setattr(slots, "step", slow)
    yield lambda taken: seconds.__setitem__(0, taken)
    seconds[0] = 0.0
    assert until(lambda: tiny_server.load == (0, 0, 0))


def running(server: TinyServer) -> int:
    return server.state.engine.running


def test_who_leaves_frees_the_slot(tiny_server: TinyServer, slowed: Callable[[float], None]) -> None:
    """Streams and whole answers, cut in the queue, in the prompt or in the answer: none is left behind."""
    slowed(0.01)
    rng = random.Random(0)

    async def leaves() -> None:
        async with httpx.AsyncClient(base_url=tiny_server.url) as client:
            body = ask(
                "Hello there " * rng.choice((1, 20)), 90, ignore_eos=True, stream=rng.random() < 0.5, n=rng.choice((1, 2))
            )
            asked = asyncio.create_task(client.post("/v1/completions", json=body))
            await asyncio.sleep(rng.random() * 0.15)
            asked.cancel()
            await asyncio.wait([asked])

    async def all_leave() -> None:
        for _ in range(10):
            await asyncio.gather(*(leaves() for _ in range(4)))

    asyncio.run(all_leave())
    left = time.monotonic()
    assert until(lambda: tiny_server.load[:2] == (0, 0), 2)
    assert time.monotonic() - left < 0.5
    assert tiny_server.state.admission.reserved == 0


@pytest.mark.parametrize("stream", [True, False])
def test_how_soon_a_slot_is_free(tiny_server: TinyServer, slowed: Callable[[float], None], stream: bool) -> None:
    slowed(0.02)
    taken = []
    for _ in range(5):
        connection = tiny_server.connect()
        body = json.dumps(ask(most=LONG, ignore_eos=True, stream=stream)).encode()
        connection.sendall(post_head("/v1/completions", len(body)) + body)
        assert until(lambda: running(tiny_server) == 1)
        connection.close()
        left = time.monotonic()
        assert until(lambda: running(tiny_server) == 0)
        taken.append(time.monotonic() - left)
    assert max(taken) < 0.25


def test_who_reads_no_more_frees_the_slot(tiny_server: TinyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "UNREAD", 0.2)
    body = json.dumps(ask(most=LONG, ignore_eos=True, stream=True)).encode()
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "query_string": b"",
             "scheme": "http"}  # fmt: skip
    sent: list[Any] = []

    async def ask_and_read_nothing() -> None:
        given = iter([{"type": "http.request", "body": body}])

        async def receive() -> Any:
            return next(given, None) or await asyncio.sleep(60)

        async def send(message: Any) -> None:
            sent.append(message["type"])
            if len(sent) > 2:
                await asyncio.sleep(60)

        await tiny_server.app(scope, receive, send)

    asyncio.run_coroutine_threadsafe(ask_and_read_nothing(), tiny_server.loop).result(10)
    assert len(sent) == 3
    assert until(lambda: tiny_server.load == (0, 0, 0), 2)


def test_too_many_are_told_at_once(tiny_server: TinyServer, slowed: Callable[[float], None]) -> None:
    slowed(0.02)
    places = SLOTS + QUEUE

    async def flood() -> list[tuple[int, float, str | None]]:
        async with httpx.AsyncClient(base_url=tiny_server.url, timeout=60, limits=httpx.Limits(max_connections=200)) as client:

            async def one() -> tuple[int, float, str | None]:
                begin = time.monotonic()
                reply = await client.post("/v1/completions", json=ask(most=24, ignore_eos=True))
                return reply.status_code, time.monotonic() - begin, reply.headers.get("retry-after")

            first = [asyncio.create_task(one()) for _ in range(places)]
            await asyncio.sleep(0.2)
            rest = await asyncio.gather(*(one() for _ in range(60)))
            return [*rest, *await asyncio.gather(*first)]

    told = asyncio.run(flood())
    assert {status for status, _, _ in told} <= {200, 429}
    refused = sorted(seconds for status, seconds, _ in told if status == 429)
    assert len(refused) >= 50
    assert all(wait and 1 <= int(wait) <= 60 for status, _, wait in told if status == 429)
    assert sum(status == 200 for status, _, _ in told) >= places
    assert refused[len(refused) // 2] < 0.5


def test_who_is_too_many_is_told_before_its_body_is_read(tiny_server: TinyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_server.state.admission, "reserved", SLOTS + QUEUE)
    for path in ("/v1/completions", "/v1/chat/completions"):
        with tiny_server.connect() as connection:
            connection.sendall(post_head(path, 99))
            assert connection.recv(1000).startswith(b"HTTP/1.1 429 ")


def test_n_takes_n_places_or_none(tiny_server: TinyServer, slowed: Callable[[float], None]) -> None:
    slowed(0.02)
    with tiny_server.client() as client:
        thread = threading.Thread(target=lambda: client.complete(most=40, ignore_eos=True, n=5))
        thread.start()
        assert until(lambda: tiny_server.state.admission.reserved == 5)
        assert client.complete(n=3).status_code == 429
        assert client.complete(n=2).status_code == 200
        thread.join()


def test_health_tells_that_the_engine_is_stuck(tiny_server: TinyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "STUCK", 0.4)
    freed = threading.Event()
    with tiny_server.client() as client:
        assert client.get("/health").status_code == 200
        tiny_server.state.engine._work.put(lambda: freed.wait(30) and None)
        begin = time.monotonic()
        assert until(lambda: client.get("/health").status_code == 503, 5)
        assert time.monotonic() - begin < 1.0
        assert client.get("/health").json()["status"] == "stuck"
        assert client.get("/live").status_code == 200
        freed.set()
        assert until(lambda: client.get("/health").status_code == 200, 5)
        assert client.complete().status_code == 200


def test_stuck_is_noticed_within_what_is_promised() -> None:
    assert state.STUCK + 0.5 < 5


def test_health_before_and_after_its_time() -> None:
    with TinyServer(warm=False) as server, server.client() as client:
        assert client.get("/health").json()["status"] == "warming"
        assert client.get("/health").status_code == 503
        for path, body in (("/v1/completions", ask()), ("/v1/chat/completions", say())):
            reply = client.post(path, json=body)
            assert reply.status_code == 503
            assert reply.json()["error"]["code"] == "warming"
        assert client.post("/tokenize", json={"prompt": "a"}).status_code == 200
        server.slots.warm = lambda report, ahead: 1 / 0
        changed = threading.Event()
        server.state.engine.start(server.loop.call_soon_threadsafe, changed.set)
        assert changed.wait(10)
        assert client.get("/health").json()["status"] == "failed"
        assert client.complete().json()["error"]["code"] == "failed"


def test_an_engine_that_breaks_leaves_nobody_waiting() -> None:
    with TinyServer() as server, server.client() as client:
        step = server.slots.step
        calls = [0]

        def breaks() -> Any:
            calls[0] += 1
            return step() if calls[0] < 3 else 1 / 0

        server.slots.step = breaks
        reply = client.complete(most=100, ignore_eos=True, n=4)
        assert reply.status_code == 503
        assert "failed" in reply.json()["error"]["message"]
        assert client.get("/health").json()["status"] == "failed"


def test_numbers_that_are_none_are_an_error_of_the_server(tiny_server: TinyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    slots = tiny_server.slots
    step = slots.step
    monkeypatch.setattr(slots, "step", lambda: [event._replace(finished="error") for event in step()])
    with tiny_server.client() as client:
        reply = client.complete(most=1)
        assert reply.status_code == 500
        assert reply.json()["error"]["type"] == "server_error"
        streamed = client.complete(most=1, stream=True)
        assert '"type":"server_error"' in streamed.text
        assert streamed.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("stream", [True, False])
def test_a_mistake_of_ours_is_told_and_printed(
    tiny_server: TinyServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], stream: bool
) -> None:
    monkeypatch.setattr(Generation, "_piece", lambda *_: {}["a mistake"])
    with tiny_server.client() as client:
        reply = client.complete(most=3, stream=stream)
    assert reply.status_code == (200 if stream else 500)
    assert '"type":"server_error"' in reply.text
    assert "a mistake" not in reply.text
    assert "KeyError: 'a mistake'" in capfd.readouterr().err
    assert until(lambda: tiny_server.load == (0, 0, 0))


REPEATED = (
    ask(most=20, logprobs=2),
    ask("The assistant answers what the user asks; the system says", 12, logprobs=1, temperature=1, seed=7),
    ask("1 2 1 2 1 2 1 2", 25, logprobs=1, stream=True),
    say(most=15, logprobs=True, top_logprobs=2, temperature=1, seed=3, stream=True),
    ask("Hello", 18, logprobs=1, presence_penalty=1, temperature=1, seed=5),
    ask("Hello there, how", 10, logprobs=1, logit_bias={"72": 3}),
)  # fmt: skip


def test_the_same_request_has_the_same_bits_under_any_load(tiny_server: TinyServer) -> None:
    """Alone, and among others that come, go and hang up; log-probabilities compared as floats, which JSON carries whole."""
    path = lambda body: "/v1/chat/completions" if "messages" in body else "/v1/completions"
    with tiny_server.client() as client:
        alone = [said(client.post(path(body), json=body)) for body in REPEATED]
        compiled = client.get("/health").json()["compiles_after_ready"]
    rng = random.Random(1)
    different = []

    async def load() -> None:
        async with httpx.AsyncClient(base_url=tiny_server.url, timeout=60) as client:

            async def asks(place: int) -> None:
                body = REPEATED[place]
                while (reply := await client.post(path(body), json=body)).status_code == 429:
                    await asyncio.sleep(0.01)
                if said(reply) != alone[place]:
                    different.append(place)

            async def disturbs() -> None:
                body = ask("Hello " * rng.randrange(1, 40), rng.randrange(1, 20), temperature=1, stream=rng.random() < 0.5)
                asked = asyncio.create_task(client.post("/v1/completions", json=body))
                await asyncio.wait([asked], timeout=rng.choice((0.02, 10)))
                asked.cancel()

            waiting = [place % len(REPEATED) for place in range(90)]
            rng.shuffle(waiting)

            async def worker() -> None:
                while waiting:
                    await (asks(waiting.pop()) if rng.random() < 0.6 else disturbs())

            await asyncio.gather(*(worker() for _ in range(SLOTS + 2)))

    asyncio.run(load())
    assert different == []
    assert tiny_server.state.engine.compiled == compiled


def said(reply: httpx.Response) -> Any:
    """Text, reason and log-probabilities of an answer, streamed or not."""
    assert reply.status_code == 200, reply.text
    if not reply.headers["content-type"].startswith("text/event-stream"):
        return reply.json()["choices"]
    text, drawn, reason = "", [], None
    for line in reply.text.split("\n\n"):
        if line.startswith("data: {"):
            (choice,) = json.loads(line[6:])["choices"]
            text += choice["delta"].get("content", "") if "delta" in choice else choice["text"]
            reason = choice["finish_reason"] or reason
            logprobs = choice["logprobs"] or {}
            drawn += logprobs.get("content") or list(zip(logprobs.get("tokens", []), logprobs.get("token_logprobs", [])))
    return text, drawn, reason


def test_weights_are_as_they_were(tiny_server: TinyServer) -> None:
    with tiny_server.client() as client:
        told = client.get("/v1/attestation").json()
        assert told["digest"] == told["digest_at_load"]


def test_the_loop_answers_while_long_texts_become_tokens(tiny_server: TinyServer) -> None:
    """/health twenty times a second beside megabytes of one thing."""
    texts = ("a" * 1_000_000, "^" * 1_000_000, "😀" * 250_000, "aGVsbG8gdGhlcmU" * 60_000)
    with tiny_server.client() as client, tiny_server.client() as other:
        taken: list[float] = []
        done = threading.Event()

        def probe() -> None:
            while not done.wait(0.05):
                begin = time.monotonic()
                assert other.get("/health").status_code == 200
                taken.append(time.monotonic() - begin)

        thread = threading.Thread(target=probe)
        thread.start()
        counts = [client.post("/tokenize", json={"prompt": text}).json()["count"] for text in texts]
        done.set()
        thread.join()
    assert min(counts) > 0
    assert sorted(taken)[len(taken) // 2] < 0.1


def test_what_is_under_way_ends_and_nobody_new_is_let_in(tiny_server: TinyServer, slowed: Callable[[float], None]) -> None:
    slowed(0.02)
    admission = tiny_server.state.admission
    with tiny_server.client() as client:
        whole: list[httpx.Response] = []
        body = ask(most=60, ignore_eos=True)
        threads = [
            threading.Thread(target=lambda more=more: whole.append(client.post("/v1/completions", json=body | more)))
            for more in ({}, {"stream": True})
        ]
        for thread in threads:
            thread.start()
        assert until(lambda: running(tiny_server) == 2)
        admission.draining = True
        try:
            for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
                late = client.post(path, json=ask())
                assert late.status_code == 503
                assert late.json()["error"]["code"] == "draining"
                assert late.headers["retry-after"]
            assert client.get("/health").json()["status"] == "draining"
            for thread in threads:
                thread.join()
        finally:
            admission.draining = False
    assert [reply.status_code for reply in whole] == [200, 200]
    assert sum("[DONE]" in reply.text for reply in whole) == 1


def test_prefixes_are_not_shared_between_keys() -> None:
    text = "The assistant answers what the user asks; the system says how. 1234 "
    with TinyServer(keys=("one", "two")) as server:
        cached = []
        for key in ("one", "two", "two", "one"):
            with server.client(headers={"Authorization": f"Bearer {key}"}) as client:
                usage = client.complete(text).json()["usage"]
            cached.append(usage["prompt_tokens_details"]["cached_tokens"] > 0)
        assert cached == [False, False, True, True]
