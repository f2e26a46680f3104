"""The client times what it reads, latency counts from when a request should have been sent, and a bar that is missed shows."""

import asyncio
import json
import math
import random
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.serving import __main__ as serving
from bench.serving import measure
from bench.serving.client import Client, Response, completion_request, random_text, read_completion
from bench.serving.measure import closed_loop, open_loop, percentile, tail
from engine.inference.request import Request, SamplingParams
from engine.text.tokenizer import byte_tokenizer
from tests.openai_like import chat_request, complete, fake_completion, fake_server
from tests.tiny import lively_params, tiny_config

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
CHUNKS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n"


@pytest.fixture
def anyio_backend():
    return "asyncio"


def test_events_have_the_moment_at_which_they_were_whole():
    body = b'data: {"a": 1}\n\n: waiting\n\ndata: {"a": 2}\n\ndata: [DONE]\n\ndata: {"a": 3}'
    response = Response(
        0.0, body=bytearray(body), arrivals=[(1.0, 5), (2.0, 20), (3.0, 40), (4.0, 43), (5.0, len(body))]
    )
    assert response.events() == [(2.0, {"a": 1}), (4.0, {"a": 2})]


@pytest.mark.anyio
async def test_a_connection_is_reused_and_one_that_was_closed_meanwhile_is_made_anew():
    connections, responses = [], []

    async def serve(reader, writer):
        connections.append(writer)
        while await reader.readuntil(b"\r\n\r\n"):
            writer.write(OK if len(responses) % 2 else CHUNKS)
            if len(connections) == 1 and len(responses) == 1:
                writer.close()  # after the second answer of the first connection, without a word
                return

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    client = Client(server.sockets[0].getsockname()[1])
    for _ in range(4):
        response = await client.get("/")
        responses.append((response.status, response.body, response.error))
        await asyncio.sleep(0.01)
    client.close()
    server.close()
    assert responses == [(200, b"hello", None)] * 4
    assert len(connections) == 2


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("sent", "error"),
    [
        (b"", "IncompleteReadError"),
        (OK[:-1], "IncompleteReadError"),
        (b"x\r\n\r\n", "ValueError"),
        (CHUNKS[:-2], "IncompleteReadError"),
        (CHUNKS[:-5], "IncompleteReadError"),
        (None, "TimeoutError"),
    ],
)
async def test_a_response_that_breaks_off_says_how(sent, error):
    async def serve(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        if sent is None:
            await asyncio.sleep(1)
        writer.write(sent or b"")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    client = Client(server.sockets[0].getsockname()[1])
    assert (await client.get("/", timeout=0.1 if sent is None else 30)).error.startswith(error)
    server.close()


@pytest.mark.anyio
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    "body", [completion_request("a", 9, logprobs=1), chat_request("a", 9, logprobs=True)]
)
async def test_a_completion_is_read_streamed_or_whole(body, stream):
    async with fake_server(lambda *_: fake_completion("hello", body | {"stream": stream})) as port:
        completion = await complete(Client(port), body | {"stream": stream})
    assert (completion.text, completion.completion_tokens, completion.prompt_tokens) == ("hello", 5, 3)
    assert (completion.finish_reason, completion.finished) == ("length", True)
    assert completion.logprobs == (-0.5,) * 5
    assert 0 < completion.ttft <= completion.latency


def test_a_refusal_and_an_error_in_a_stream_are_errors():
    refused = Response(0.0, 429, body=bytearray(b'{"error": {"message": "full"}}'), ended_at=1.0)
    completion = read_completion(refused)
    assert (completion.error, completion.finished) == ("full", False)
    body = b'data: {"choices": [{"text": "a"}]}\n\ndata: {"error": {"message": "gone"}}\n\n'
    response = Response(0.0, 200, {"content-type": "text/event-stream"}, bytearray(body), [(1.0, len(body))])
    completion = read_completion(response)
    assert (completion.text, completion.error, completion.finished) == ("a", "gone", False)
    assert read_completion(Response(0.0, error="EOFError")).error == "EOFError"


@given(st.lists(st.integers(-50, 50), min_size=1, max_size=40), st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0]))
def test_a_percentile_is_the_least_value_that_enough_do_not_exceed(values, share):
    result = percentile(values, share)
    suffices = lambda value: sum(each <= value for each in values) >= share * len(values) - 1e-9
    assert suffices(result)
    assert not any(suffices(value) for value in values if value < result)
    assert math.isnan(percentile([], share))


@given(st.lists(st.integers(0, 10**6), min_size=20, max_size=3000, unique=True))
def test_a_tail_is_the_highest_percentile_that_ten_samples_lie_above(values):
    p, value = tail(values)
    above = lambda share: sum(each > percentile(values, share / 100) for each in values)
    assert value == percentile(values, p / 100)
    assert above(p) >= 10
    assert p == 99 or above(p + 1) < 10
    assert (p == 99) == (len(values) >= 1000)


def test_too_few_samples_have_no_tail_but_the_median():
    assert tail([3.0, 1.0, 2.0]) == (50, 2.0)
    assert math.isnan(tail([])[1])


def test_inter_token_latency_is_of_the_gaps_between_events_and_not_a_mean():
    events = [json.dumps({"choices": [{"text": text}]}) for text in ("a", "bc", "d")]
    events.append(json.dumps({"choices": [], "usage": {"completion_tokens": 4, "prompt_tokens": 1}}))
    blocks = [f"data: {event}\n\n".encode() for event in events]
    arrivals = [(moment, sum(map(len, blocks[: n + 1]))) for n, moment in enumerate((1.0, 2.0, 7.0, 7.5))]
    completion = read_completion(
        Response(0.0, 200, {"content-type": "text/event-stream"}, bytearray(b"".join(blocks)), arrivals)
    )
    assert (completion.ttft, completion.gaps) == (1.0, (1.0, 5.0))
    assert completion.time_per_output_token == 2.0


@pytest.mark.anyio
async def test_a_closed_loop_keeps_so_many_under_way_and_gives_answers_in_order():
    under_way = [0]

    class Counting(Client):
        async def request(self, *args, **options):
            under_way.append(under_way[-1] + 1)
            response = await super().request(*args, **options)
            under_way.append(under_way[-1] - 1)
            return response

    respond = lambda method, path, headers, body: fake_completion(
        json.loads(body)["prompt"], json.loads(body)
    )
    async with fake_server(respond, delay=0.01) as port:
        completions, seconds = await closed_loop(
            Counting(port), [completion_request(f"p{n}", 2) for n in range(9)], 3
        )
    assert [completion.text for completion in completions] == [f"p{n}" for n in range(9)]
    assert max(under_way) == 3
    assert seconds >= 0.03


@pytest.mark.anyio
async def test_an_open_loop_sends_when_it_is_time_and_counts_the_wait_from_then():
    lock = asyncio.Lock()

    class OneAtATime(Client):
        async def request(self, *args, **options):
            async with lock:
                return await super().request(*args, **options)

    async with fake_server(
        lambda *request: fake_completion("ab", json.loads(request[-1])), delay=0.05
    ) as port:
        draw = lambda rng: completion_request(random_text(rng, 2), 2)
        responses = await open_loop(OneAtATime(port), draw, rate=100, seconds=0.2, rng=random.Random(1))
    assert 10 <= len(responses) <= 30
    assert read_completion(responses[-1]).ttft > 0.3, "the last waits for all those before it"


def test_what_was_measured_is_shown_and_what_falls_short_is_said(capsys):
    times = {"p50": 0.1, "tail_percentile": 80, "tail": 0.4}
    document = {
        "model": "m",
        "device": "d",
        "weights": "int8",
        "slots": 8,
        "ready_met": False,
        "ready_seconds": 9.5,
        "ready_bar": 8.0,
        "first_ready_seconds": 40.0,
        "resident_bytes": 5e8,
        "rows": [
            {
                "name": name,
                "tokens_per_second": 200.0,
                "peer_tokens_per_second": 250.0,
                "ratio": 0.8,
                "low": 0.79,
                "high": 0.81,
                "bar": bar,
                "met": False,
            }
            for name, bar in (("a", 0.85), ("b", 0.8))
        ],
        "scored": {"ratio": 40.0, "low": 39.0, "high": 41.0, "bar": 100.0, "met": False},
        "saturated": {"requests_per_second": 6.0, "tokens_per_second": 260.0},
        "under_load": [
            {
                "load": 0.5,
                "answered": 9,
                "requests": 9,
                "tokens_per_second": 99.0,
                "ttft": times,
                "inter_token": times,
                "per_token": times,
            }
        ],
    }
    serving.print_tables(document)
    output = capsys.readouterr().out.replace("\u202f", " ")
    for text in (
        "ready after 9.5 s, at most 8   ** not met **",
        "0.80 (0.79 to 0.81)",
        "0.85   ** not met **",
        "/v1/score: 40 (39 to 41) candidates a second, at least 100   ** not met **",
        "50%",
        "9 of 9",
        "6.0 requests/s of the mix, 260 tokens/s",
        "100 ms, p80 400 ms",
    ):
        assert text in output


@pytest.mark.whole
def test_the_engine_beside_a_server_has_a_prefix_cache_as_that_has(monkeypatch):
    cfg = tiny_config(context=512)
    model = SimpleNamespace(cfg=cfg, params=lively_params(cfg), tokenizer=byte_tokenizer())
    monkeypatch.setattr(measure, "load", lambda *_, **__: model)
    engine, _ = measure.make_engine("sea", "int8", 2, 512)
    cached = []
    for _ in range(2):
        engine.submit(Request((3,) * 200, SamplingParams(2, temperature=0.0)))
        while engine.busy:
            cached += [event.cached_tokens for event in engine.step() if event.finish_reason]
    assert cached == [0, 199]


@pytest.mark.whole
def test_the_engine_beside_a_server_has_blocks_where_that_has(monkeypatch):
    cfg, reads = tiny_config(), []

    def load(name, *, keep_kinds, **_):
        reads.append(bool(keep_kinds))
        return SimpleNamespace(cfg=cfg, params=lively_params(cfg), tokenizer=byte_tokenizer())

    monkeypatch.setattr(measure, "load", load)
    monkeypatch.setattr("engine.inference.backend.computes_in_c", lambda: True)
    for weights in ("int8", "file", "q4"):
        measure.make_engine("sea", weights, 2, cfg.context)
    assert reads == [False, True, True]
