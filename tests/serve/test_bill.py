"""A reply says what it has cost where its request asks for that, in every dialect; equal requests cost equally in company."""

import concurrent.futures
import json

import pytest

from engine.counting.request_flops import RequestFlops, training_step_flops
from tests.serve.tiny_server import ask, events, good, say

HEADER = {"X-Usage-Cost": "1"}
PRICE = 0.25  # of the tiny server, dollars an hour
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hello there"}]}
DIALECTS = {
    "completions": ("/v1/completions", ask(), "usage"),
    "chat": ("/v1/chat/completions", say(), "usage"),
    "responses": (
        "/v1/responses",
        {"model": "tiny", "input": "Hello there", "max_output_tokens": 16},
        "usage",
    ),
    "messages": ("/v1/messages", CHAT | {"max_tokens": 5}, "usage"),
    "score": ("/v1/score", {"prompt": "Hello there", "candidates": [" one", " two"]}, "usage"),
    "embeddings": ("/v1/embeddings", {"model": "tiny", "input": "Hello there"}, "usage"),
    "ollama chat": ("/api/chat", CHAT | {"stream": False, "options": {"num_predict": 5}}, None),
    "ollama embed": ("/api/embed", {"model": "tiny", "input": "Hello there"}, None),
}


def cost_of(reply, place):
    return (reply[place] if place else reply).get("cost")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_reply_has_its_cost_where_it_is_asked_for(client, dialect):
    path, body, place = DIALECTS[dialect]
    assert cost_of(good(client.post(path, json=body)), place) is None
    cost = cost_of(good(client.post(path, json=body, headers=HEADER)), place)
    assert cost["flop"] == cost["prompt"]["flop"] + cost["completion"]["flop"] > 0
    assert cost["seconds"] == cost["prompt"]["seconds"] + cost["completion"]["seconds"] > 0
    assert cost["dollars"] == pytest.approx(PRICE * cost["seconds"] / 3600)


def test_the_cost_is_of_the_tokens_that_were_read_and_written(client, tiny_server):
    flops = RequestFlops(tiny_server.model.cfg)
    usage = good(client.post("/v1/completions", json=ask("one two", 7, cache_salt="new"), headers=HEADER))[
        "usage"
    ]
    last = usage["prompt_tokens"] - 1
    cost = usage["cost"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0
    assert cost["prompt"]["flop"] == flops.prefilled(0, last)
    assert cost["completion"]["flop"] == flops.decoded(last, last + usage["completion_tokens"])
    assert cost["training_steps"] == cost["flop"] / training_step_flops(tiny_server.model.cfg)


def test_what_the_prefix_cache_held_costs_no_operations(client):
    body = ask("one two three " * 10, 5, cache_salt="again")
    first, second = (
        good(client.post("/v1/completions", json=body, headers=HEADER))["usage"] for _ in range(2)
    )
    assert second["prompt_tokens_details"]["cached_tokens"] > 0
    assert second["cost"]["prompt"]["flop"] < first["cost"]["prompt"]["flop"]
    assert second["cost"]["completion"]["flop"] == first["cost"]["completion"]["flop"]


@pytest.mark.law("batch invariance")
def test_equal_requests_cost_equally_in_any_company(client):
    """After a stop string too, though a dispatch in company has another length."""
    text = good(client.complete("one two", 20))["choices"][0]["text"]
    bodies = [ask("one two", 20, stop=[text[5:8]], cache_salt=f"alone {n}") for n in range(6)]

    def cost(body):
        return good(client.post("/v1/completions", json=body, headers=HEADER))["usage"]["cost"]["flop"]

    alone = {cost(body) for body in bodies[:2]}
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        together = {*pool.map(cost, bodies[2:])}
    assert len(alone) == 1
    assert together == alone


@pytest.mark.parametrize("options", [{}, {"stream_options": {"include_usage": True}}])
def test_a_stream_ends_with_its_cost(client, options):
    reply = client.post("/v1/chat/completions", json=say(stream=True, **options), headers=HEADER)
    *_, last = events(reply.text)
    whole = good(client.post("/v1/chat/completions", json=say(), headers=HEADER))["usage"]
    assert last["usage"]["cost"]["completion"]["flop"] == whole["cost"]["completion"]["flop"]


def test_a_stream_of_messages_has_its_cost_at_the_end_alone(client):
    reply = client.post("/v1/messages", json=CHAT | {"max_tokens": 5, "stream": True}, headers=HEADER)
    parts = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: ")]
    assert "cost" not in parts[0]["message"]["usage"]
    (end,) = [part for part in parts if part["type"] == "message_delta"]
    assert end["usage"]["cost"]["flop"] > 0


def test_the_server_says_what_it_has_computed(client, tiny_server):
    meter = tiny_server.engine.meter
    good(client.complete())
    metrics = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if line[0] != "#")
    served = {
        name: float(value) for name, value in metrics.items() if name.startswith("thrice_serving_flops")
    }
    assert served['thrice_serving_flops_total{what_for="requests"}'] == meter.request_flops > 0
    assert served['thrice_serving_flops_total{what_for="idle rows"}'] == meter.idle_flops > 0
    assert float(metrics["thrice_engine_busy_seconds_total"]) == pytest.approx(meter.seconds)
    (card,) = good(client.get("/v1/models"))["data"]
    assert card["served_flops"] == meter.request_flops
    assert card["training_flops"] is None
