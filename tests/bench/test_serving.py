"""The client reads HTTP however it is cut, waits are counted from when they begin, and a promise that is broken shows."""

import asyncio
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai_like import completed, pretended
from tiny import lively_params, tiny_config

from bench import promises_input, promises_life, promises_same
from bench.fuzz import fuzzed
from bench.promises import Figure, Outcome, Trial, chosen, kept, show
from bench.serving import __main__ as serving
from bench.serving.http_client import Answer, Client, Parser, raw
from bench.serving.load import chat, closed_loop, completion, open_loop, percentile, told, words
from bench.serving.measure import price_of_a_million
from bench.serving.server import gauges
from engine.errors import UserError
from engine.storage.huggingface import folder as huggingface

sys.path.append(str(Path(__file__).parents[1] / "text"))

PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-A: b\r\n\r\nhello"
CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"5\r\nhel\r\n\r\n1;x=y\r\nl\r\nb\r\no, world!!\n\r\n0\r\nTrailer: x\r\n\r\n"
)


def read(data, sizes, method="GET"):
    """What a parser makes of bytes that come in parts of these sizes, over and over."""
    parser, body, start = Parser(method), b"", 0
    for turn in range(len(data) + 1):
        if start >= len(data) or parser.done:
            break
        size = sizes[turn % len(sizes)]
        body += parser.feed(data[start : start + size])
        start += size
    return parser, body


# The client


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_an_answer_reads_the_same_however_it_is_cut(sizes):
    parser, body = read(PLAIN, sizes)
    assert (parser.status, parser.headers["x-a"], body, parser.done) == (200, "b", b"hello", True)
    parser, body = read(CHUNKED, sizes)
    assert (body, parser.done, parser.rest) == (b"hel\r\nlo, world!!\n", True, b"")


def test_what_has_no_body_ends_with_its_head():
    assert read(b"HTTP/1.1 204 No Content\r\n\r\n", [999])[0].done
    assert read(b"HTTP/1.1 304 X\r\nContent-Length: 9\r\n\r\n", [999])[0].done
    assert read(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", [999], "HEAD")[0].done
    assert read(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", [999])[0].done


def test_without_a_length_the_end_of_the_connection_ends_the_body():
    parser, body = read(b"HTTP/1.0 200 OK\r\n\r\nabc", [999])
    assert (body, parser.done) == (b"abc", False)
    parser.feed(b"")
    assert parser.done


@pytest.mark.parametrize("data", [b"", PLAIN[:-1], CHUNKED[:-1], b"HTTP/1.1 200"])
def test_an_end_that_is_too_soon_is_an_error(data):
    parser, _ = read(data, [999])
    with pytest.raises(EOFError):
        parser.feed(b"")


def test_a_second_answer_is_left_and_an_interim_one_is_passed_over():
    parser, body = read(b"HTTP/1.1 100 Continue\r\n\r\n" + PLAIN + PLAIN, [999])
    assert (body, parser.rest) == (b"hello", PLAIN)
    with pytest.raises(ValueError, match="not HTTP"):
        Parser().feed(b"SSH-2.0-x\r\n\r\n")


def test_events_have_the_moment_at_which_they_were_whole():
    body = b'data: {"a": 1}\r\n\r\n: ping\n\ndata: {"a":\ndata: 2}\n\ndata: [DONE]\n\ndata: {"a": 3}'
    answer = Answer(0.0, body=body, pieces=[(1.0, 5), (2.0, 20), (3.0, 45), (4.0, len(body))])
    assert answer.events() == [(2.0, {"a": 1}), (4.0, {"a": 2})]


def test_a_connection_is_kept_and_one_that_was_closed_meanwhile_is_made_anew():
    async def scenario():
        seen = []

        async def serve(reader, writer):
            seen.append(writer)
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(PLAIN)
                if len(seen) == 1 and len(asked) == 1:
                    writer.close()  # after the second answer of the first connection, without a word
                    return

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        client, asked = Client(server.sockets[0].getsockname()[1], key="k"), []
        for _ in range(4):
            answer = await client.get("/")
            asked.append((answer.status, answer.body, answer.broken))
            await asyncio.sleep(0.01)
        client.close()
        server.close()
        return len(seen), asked

    connections, asked = asyncio.run(scenario())
    assert asked == [(200, b"hello", None)] * 4
    assert connections == 2


@pytest.mark.parametrize(
    ("said", "why"), [(b"", "EOFError"), (PLAIN[:-1], "EOFError"), (None, "TimeoutError"), (b"x\r\n\r\n", "ValueError")]
)
def test_an_answer_that_breaks_says_how(said, why):
    async def scenario():
        async def serve(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            if said is None:
                await asyncio.sleep(1)
            writer.write(said or b"")
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        answers = await Client(port).get("/", seconds=0.1), await raw("127.0.0.1", port, b"GET / HTTP/1.1\r\n\r\n", seconds=0.1)
        server.close()
        return answers

    for answer in asyncio.run(scenario()):
        assert answer.broken.startswith(why)


# What an answer says


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("body", [completion("a", 9, logprobs=1), chat("a", 9, logprobs=True)])
def test_a_completion_is_read_streamed_or_whole(body, stream):
    async def scenario():
        async with pretended(lambda *_: completed("hello", body | {"stream": stream})) as port:
            return told(await Client(port).post("/v1/completions", body | {"stream": stream}))

    found = asyncio.run(scenario())
    assert (found.text, found.tokens, found.prompt_tokens, found.finished, found.good) == ("hello", 5, 3, "length", True)
    assert found.logprobs == (-0.5,) * 5
    assert 0 < found.first <= found.whole


def test_a_refusal_and_an_error_in_a_stream_are_no_answers():
    refused = Answer(0.0, 429, body=b'{"error": {"message": "full"}}', ended=1.0)
    assert (told(refused).error, told(refused).good) == ("full", False)
    body = b'data: {"choices": [{"text": "a"}]}\n\ndata: {"error": {"message": "gone"}}\n\n'
    broken = Answer(0.0, 200, {"content-type": "text/event-stream"}, body, [(1.0, len(body))])
    assert (told(broken).text, told(broken).error, told(broken).good) == ("a", "gone", False)
    assert told(Answer(0.0, broken="EOFError")).error == "EOFError"


def test_a_request_that_is_not_streamed_asks_for_no_usage_of_a_stream():
    assert "stream_options" not in completion("a", 1, stream=False)
    assert completion("a", 1)["stream_options"] == {"include_usage": True}
    assert "prompt" not in chat("a", 1)
    assert chat("a", 1)["max_completion_tokens"] == 1


# Load


@given(st.lists(st.integers(-50, 50), min_size=1, max_size=40), st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0]))
def test_a_percentile_is_the_least_value_that_enough_do_not_exceed(values, share):
    found = percentile(values, share)
    reached = lambda value: sum(each <= value for each in values) >= share * len(values) - 1e-9
    assert reached(found)
    assert not any(reached(value) for value in values if value < found)


def test_the_percentile_of_nothing_is_no_number():
    assert math.isnan(percentile([], 0.5))


def test_a_closed_loop_keeps_so_many_under_way_and_gives_answers_in_order():
    async def scenario():
        most = [0, 0]

        class Counting(Client):
            async def ask(self, *args, **options):
                most[0] += 1
                most[1] = max(most)
                try:
                    return await super().ask(*args, **options)
                finally:
                    most[0] -= 1

        make = lambda method, path, headers, body: completed(json.loads(body)["prompt"], json.loads(body))
        async with pretended(make, delay=0.01) as port:
            answers, seconds = await closed_loop(Counting(port), [completion(f"p{n}", 2) for n in range(9)], 3)
        return [told(answer).text for answer in answers], seconds, most[1]

    texts, seconds, most = asyncio.run(scenario())
    assert texts == [f"p{n}" for n in range(9)]
    assert most == 3
    assert seconds >= 0.03


def test_an_open_loop_sends_when_it_is_time_and_counts_the_wait_from_then():
    async def scenario():
        lock = asyncio.Lock()

        class OneAtATime(Client):
            async def ask(self, *args, **options):
                async with lock:
                    return await super().ask(*args, **options)

        make = lambda method, path, headers, body: completed("ab", json.loads(body))
        async with pretended(make, delay=0.05) as port:
            draw = lambda rng: completion(words(rng, 2), 2)
            return [told(answer) for answer in await open_loop(OneAtATime(port), draw, rate=100, seconds=0.2, seed=1)]

    answers = asyncio.run(scenario())
    assert 10 <= len(answers) <= 30
    assert answers[-1].first > 0.3, "the last waits for all those before it"


def test_a_price_is_for_a_million():
    assert price_of_a_million(1000 / 3.6, 0.1) == pytest.approx(0.1)
    assert math.isnan(price_of_a_million(0, 1))


def test_gauges_add_up_what_differs_in_labels_alone():
    text = '# HELP a b\na{x="1"} 2\na{x="2"} 3.5\nh_bucket{le="1"} 7\nh_sum 4\nvllm:n{m="}"} 1e3\n'
    assert gauges(text) == {"a": 5.5, "h_sum": 4.0, "vllm:n": 1000.0}


# Damage


def test_fuzzed_requests_are_the_same_for_one_seed_and_can_be_sent():
    drawn = [[fuzzed(rng) for _ in range(400)] for rng in (random.Random(3), random.Random(3))]
    assert drawn[0] == drawn[1]
    client = Client(1)
    for asked in drawn[0]:
        assert client.written(asked.method, asked.path, asked.body, asked.headers).startswith(asked.method.encode())
    assert len({asked.path for asked in drawn[0]}) > 10
    assert len({asked.method for asked in drawn[0]}) > 5


# The table


def test_a_promise_is_kept_when_every_figure_meets_its_bar():
    good, bad = Figure("a", 1, 1), Figure("b", 0.94, 0.95, most=False)
    assert Outcome((good,), "x").kept
    assert not Outcome((good, bad), "x").kept
    assert not Outcome((), "x").kept
    assert not Outcome((good,), "x", missing="the rest").kept
    assert not Figure("c", math.nan, 1).met
    assert not Figure("c", math.nan, 1, most=False).met
    assert (bad.wanted, str(bad)) == ("b ≥ 0.95", "b 0.94")


def trial(port, ended=("", 0)):
    class Pretended:
        client = Client(port)

        def signal(self):
            pass

        async def gone(self, seconds):
            return ended[1]

        def words(self):
            return ended[0]

        async def gauges(self):
            return gauges((await self.client.get("/metrics")).body.decode())

    pretended_server = Pretended()
    pretended_server.port = port
    return Trial("tiny", pretended_server, True, slots=2, capacity=99)


def test_a_trial_that_breaks_is_a_promise_not_kept(capsys):
    async def breaks(_):
        raise KeyError("gone")

    async def keeps(_):
        return Outcome((Figure("a", 0, 0),), "one look")

    lines = asyncio.run(kept(trial(1), [("X4", "says", breaks), ("S11", "says", keeps), ("S2", "says", keeps)]))
    assert [(line.name, line.outcome.kept) for line in lines] == [("S2", True), ("S11", True), ("X4", False)]
    assert "its trial broke: KeyError: 'gone'" in lines[-1].as_json()["missing"]
    show(lines)
    said = capsys.readouterr().out
    assert "NO" in said
    assert "a ≤ 0" in said
    json.dumps([line.as_json() for line in lines], allow_nan=False)


def test_promises_are_chosen_by_name():
    assert [name for name, _, _ in chosen("s5, S1")] == ["S1", "S5"]
    every = [name for name, _, _ in chosen("")]
    assert sorted(every) == sorted([*(f"S{n}" for n in range(1, 12)), "X2", "X3", "X4", "X5"])
    assert every[-1] == "S3", "the weights are looked at after everything else"
    with pytest.raises(UserError, match="no promise S12"):
        chosen("S12")


def tried(promise, make, **options):
    async def scenario():
        async with pretended(make) as port:
            return await promise(trial(port, **options))

    return asyncio.run(scenario())


def by_itself(method, path, headers, body):
    """An answer that depends on the request alone, and says the secret that is in it."""
    asked = json.loads(body)
    prompt = asked.get("prompt") or asked["messages"][0]["content"]
    return completed(prompt.rpartition(" is ")[0][-12:] if "password" in prompt else "fine", asked, [-0.25] * 4)


def test_answers_that_depend_on_the_request_alone_keep_the_promise():
    assert tried(promises_same.same_whatever_the_load, by_itself).kept
    assert tried(promises_same.no_text_of_another, lambda m, p, h, body: by_itself(m, p, h, body)).figures[0].value == 0


def test_one_bit_in_one_answer_breaks_the_promise():
    count = [0]

    def sometimes_other(method, path, headers, body):
        asked = json.loads(body)
        count[0] += asked.get("seed") == 7
        return completed("fine", asked, [-0.25 if count[0] != 5 or asked.get("seed") != 7 else -0.25000003] * 4)

    outcome = tried(promises_same.same_whatever_the_load, sometimes_other)
    assert [figure.value for figure in outcome.figures] == [1, 1, 0]
    assert not outcome.kept


def test_the_secret_of_another_is_found():
    secrets = []

    def leaks(method, path, headers, body):
        prompt = json.loads(body)["prompt"]
        secrets.append(prompt.split("password is ")[1][:12])
        return completed(secrets[-1] if len(secrets) != 20 else secrets[3], json.loads(body))

    outcome = tried(promises_same.no_text_of_another, leaks)
    assert [figure.value for figure in outcome.figures] == [1, 63]
    assert not outcome.kept


def test_a_server_error_and_a_silent_one_are_counted():
    count = [0]

    def fails(method, path, headers, body):
        if path == "/health":
            return 200, {"compiles_after_ready": 1}
        count[0] += 1
        return (500 if count[0] == 9 else 400), {}

    found = {figure.name: figure for figure in tried(promises_input.nothing_disturbs_it, fails).figures}
    assert found["5xx"].value == 1
    assert found["compiles after ready"].value == 1
    assert found["/health p99"].met


@pytest.mark.parametrize(
    ("now", "ended", "figures"),
    [
        ("a", ("Stopped. Weights unchanged: SHA-256 " + "a" * 16 + "; 0 programs", 0), [1, 0, 0]),
        ("a", ("Stopped. Weights CHANGED from aaaa: SHA-256 " + "b" * 16 + "; 0 programs", 1), [2, 1, 0]),
        ("b", ("Stopped. Weights unchanged: SHA-256 " + "a" * 16 + "; 0 programs", 0), [3, 0, 0]),
        ("a", ("Killed", 137), [2, 137, 0]),
    ],
)
def test_weights_are_the_same_at_load_on_demand_and_at_shutdown(now, ended, figures):
    def attests(method, path, headers, body):
        said = {"/v1/attestation": {"digest_at_load": "a" * 64, "digest": now * 64}, "/openapi.json": {"paths": {}}}
        return (200, said[path]) if path in said else (404, {})

    outcome = tried(promises_same.weights_never_change, attests, ended=ended)
    assert [figure.value for figure in outcome.figures] == figures
    assert outcome.kept == (figures == [1, 0, 0])


STARTS = """
import os, socket, subprocess
from engine.text.template import Template
Template("{{ messages[0].content }}").render([{"role": "user", "content": "a"}])
socket.getaddrinfo("127.0.0.1", 0)
print("own", flush=True), input()
subprocess.run(["true"]), os.system("true"), os.waitpid(os.posix_spawnp("true", ["true"], {}), 0)
if (child := os.fork()) == 0:
    os.execlp("true", "true")
os.waitpid(child, 0), socket.getaddrinfo("127.0.0.2", 0)
"""


def test_every_way_to_start_a_program_is_heard_and_the_templates_own_is_told_apart(tmp_path):
    log = tmp_path / "heard"
    command = [sys.executable, "-c", promises_life.hook(log) + STARTS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"own\n"
        assert log.read_text().count("template_worker.py") == 1
        assert promises_life.foreign(log) == []
        process.communicate(b"\n", 20)
    assert process.returncode == 0
    events = {event for event, _ in promises_life.foreign(log)}
    assert events == {"subprocess.Popen", "os.system", "os.posix_spawn", "os.fork", "os.exec", "socket.getaddrinfo"}


# The commands


@pytest.fixture
def tiny_folder(tmp_path):
    """A model that `--model` takes: the tiny one, with a tokenizer that has ChatML's control tokens."""
    from chat_models import chat_tokenizer

    tokenizer = chat_tokenizer()
    cfg = tiny_config(vocab=tokenizer.vocab)
    huggingface.save_folder(tmp_path, cfg, lively_params(cfg), {"eos_token_id": tokenizer.end}, dtype="float32")
    tokenizer.save(tmp_path)
    return tmp_path


def test_a_promise_of_a_real_server_is_tried_and_told(tiny_folder, capsys):
    code = serving.main(["--promises", "--quick", "--only", "X4,S3", "--slots", "2", "--model", str(tiny_folder)])
    said, notes = capsys.readouterr()
    assert code == 0, notes
    document = json.loads(said.splitlines()[-1])
    assert (document["kept"], document["of"], document["slots"]) == (2, 2, 2), notes
    assert [(line["promise"], line["kept"]) for line in document["promises"]] == [("S3", True), ("X4", True)]
    assert all(figure["met"] for line in document["promises"] for figure in line["figures"])
    assert "2 of 2 promises kept. With --quick" in said
    assert [line.split()[:2] for line in notes.splitlines()[-2:]] == [["X4", "kept"], ["S3", "kept"]]


def test_a_model_that_is_not_there_is_a_sentence(capsys):
    assert serving.main(["--promises", "--only", "S1", "--model", "no-such-model"]) == 2
    assert "There is no model at no-such-model" in capsys.readouterr().err
    assert serving.main(["--promises", "--only", "S99"]) == 2
    assert "no promise S99" in capsys.readouterr().err


def test_what_was_measured_is_shown_and_what_falls_short_is_said(capsys):
    found = {
        "model": "m", "device": "d", "weights": "int8", "slots": 8, "ready_met": False, "ready_seconds": 9.5,
        "first_ready_seconds": 40.0, "resident_bytes": 5e8,
        "throughput": [{"streams": 8, "tokens_per_second": 250.0, "usd_per_million_tokens": 0.11}],
        "rows": [{"name": "a", "tokens_per_second": 200.0, "peer_tokens_per_second": 250.0, "ratio": 0.8, "spread": 0.01,
                  "met": False}],
        "capacity": {"requests_per_second": 6.0},
        "load": [{"load": 0.5, "answered": 9, "requests": 9, "tokens_per_second": 99.0, "ttft_p50": 0.1, "ttft_p99": 0.4,
                  "token_p50": 0.02, "token_p99": 0.05}],
        "parts": [{"part": "batching", "measured": "x", "on": 200.0, "off": 50.0, "gain": 4.0}],
    }  # fmt: skip
    serving._show(found)
    said = capsys.readouterr().out
    for words_ in ("ready after 9.5 s, at most 8   ** not met **", "0.80 ± 0.01", "4.00x", "50%", "9 of 9", "6.0 requests/s"):
        assert words_ in said
    assert said.count("** not met **") == 2
