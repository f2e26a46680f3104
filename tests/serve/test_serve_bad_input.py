"""Bad input: each gets an error in OpenAI's form that names the field, never a 500 or a hang."""

import contextlib
import gc
import json
import re
import socket
import time
from typing import Any

import pytest

from stages.serve import server
from stages.serve.api import requests
from stages.serve.api.fields import AnswerRequest
from stages.serve.api.routes import ROUTES
from tests.serve.tiny_server import CAPACITY, ask, events, good, post_head, read_all, refused, say, until

PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
DEEP = b"[" * 100_000
LARGE = b"9" * 5000


def nested(depth: int) -> dict[str, Any]:
    return {"type": "array", "items": nested(depth - 1)} if depth else {}


# By the kind of field; each value is refused by the field's name.
BAD_FIELDS: list[dict[str, Any]] = [
    *({"max_tokens": value} for value in (0, "5", 1.5, True, 2**31, 10**40)),
    {"temperature": 2.1},
    {"temperature": "hot"},
    {"top_p": -0.1},
    {"top_p": 1.1},
    {"min_p": 1.1},
    {"top_k": -2},
    {"presence_penalty": 2.1},
    {"frequency_penalty": -2.1},
    {"repetition_penalty": 0},
    {"seed": 2**63},
    {"n": 0},
    {"n": 17},
    {"stop": 5},
    {"stop": ["a"] * 17},
    {"stop": "a" * 257},
    {"stop_token_ids": [9999]},
    {"stream": "yes"},
    {"stream_options": {}},
    {"model": 5},
    {"min_tokens": 6},
    {"temprature": 1},
    {"stream_options": {"include_usage": True}, "stream": False},
    {"skip_special_tokens": False},
    {"use_beam_search": True},
    {"length_penalty": 0.5},
    {"bad_words": ["a"]},
    {"priority": -1},
    {"include_reasoning": False},
    {"return_token_ids": True},
    {"return_hidden_states": True},
    {"truncate_prompt_tokens": 5},
    {"cache_salt": ""},
    *({"logit_bias": value} for value in ([], {"x": 1}, {"333333": 1}, {"07": 1}, {"7\n": 1}, {"00": 1})),
]
BAD_COMPLETION = [
    {"logprobs": 21},
    {"logprobs": True},
    {"echo": "yes"},
    {"best_of": 2},
    {"suffix": "end"},
    {"messages": []},
    *(
        {"prompt": value}
        for value in (None, [], [[]], ["a", 1], [334], [[1], [334]], "", {"a": 1}, ["a"] * 65)
    ),
]
BAD_CHAT: list[dict[str, Any]] = [
    {"messages": []},
    {"messages": "hi"},
    {"functions": []},
    {"top_logprobs": 3},
    {"logprobs": 3},
    {"reasoning_effort": 1},
    {"max_completion_tokens": 0},
    {"prompt": "a"},
    {"echo": True},
    {"add_special_tokens": True},
    {"max_completion_tokens": 3},
    {"metadata": []},
    {"store": "yes"},
    {"web_search_options": {}},
]
BAD_GRAMMARS: list[dict[str, Any]] = [
    {"response_format": {"type": "json_schema"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}},
    *(
        {"guided_json": schema}
        for schema in ({"type": "integer", "minimum": 5, "maximum": 3}, {"$ref": "#"}, nested(120))
    ),
    {"guided_regex": "(a"},
    {"guided_choice": []},
    {"grammar": "b", "guided_regex": "a"},
    {"guided_grammar": "b"},
]
BAD_MESSAGES: list[tuple[str, dict[str, Any]]] = [
    ("role", {"role": "root", "content": "a"}),
    ("content", {"role": "user"}),
    ("content", {"role": "user", "content": []}),
    ("content", {"role": "user", "content": [{"type": "image_url"}]}),
    ("tool_calls", {"role": "assistant", "content": "a", "tool_calls": [{}]}),
]


@pytest.mark.parametrize(
    ("path", "change", "param"),
    [
        *((PATHS[0], change, next(iter(change))) for change in (*BAD_FIELDS, *BAD_COMPLETION)),
        *((PATHS[1], change, next(iter(change))) for change in (*BAD_FIELDS, *BAD_CHAT, *BAD_GRAMMARS)),
        *((PATHS[1], {"messages": [message]}, f"messages[0].{field}") for field, message in BAD_MESSAGES),
        *(
            (
                path,
                {"stream": True, "stream_options": {"include_obfuscation": True}},
                "stream_options.include_obfuscation",
            )
            for path in PATHS[:2]
        ),
        (PATHS[0], {"logit_bias": {"1": 101}}, "logit_bias[0]"),
        (PATHS[0], {"stop": [""]}, "stop[0]"),
        (PATHS[0], {"prompt": [-1]}, "prompt[0]"),
        (PATHS[0], {"x" * 1000: 1}, "x" * 80 + "..."),
        (PATHS[0], {"stream_options": {"usage": True}}, "stream_options.usage"),
        (PATHS[1], {"response_format": {"type": "xml"}}, "response_format.type"),
        (PATHS[1], {"modalities": ["audio"]}, "modalities[0]"),
    ],
)
def test_a_field_that_cannot_be_granted_is_named(client, path, change, param):
    body = say() if path == PATHS[1] else ask()
    named = refused(client.post(path, json=body | change))["param"].replace("[...]", "[0]")
    assert named.startswith(param)


# What vLLM and SGLang take a field for that is left out, and what no field of this server's is.
USUAL: dict[str, Any] = {
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "use_beam_search": False,
    "length_penalty": 1.0,
    "bad_words": [],
    "priority": 0,
    "include_reasoning": True,
    "thinking_token_budget": -1,
    "include_stop_str_in_output": False,
    "return_token_ids": False,
    "return_tokens_as_token_ids": False,
    "routed_experts_prompt_start": 0,
    "return_token_offsets": False,
    "return_mm_kwargs": True,
    "truncate_prompt_tokens": None,
    "prompt_logprobs": None,
    "allowed_token_ids": None,
    "vllm_xargs": None,
    "separate_reasoning": True,
    "stream_reasoning": True,
    "return_hidden_states": False,
    "return_routed_experts": False,
    "routed_experts_start_len": 0,
    "return_cached_tokens_details": False,
    "return_prompt_token_ids": False,
    "return_meta_info": False,
    "no_stop_trim": False,
    "min_tokens": 0,
    "stop": [],
    "stop_token_ids": [],
    "stream_options": {"include_usage": False, "continuous_usage_stats": False},
}


@pytest.mark.parametrize(
    ("path", "more"),
    [
        (PATHS[0], {"echo": False, "add_special_tokens": True}),
        (
            PATHS[1],
            {"echo": False, "add_special_tokens": False, "logprobs": False, "top_logprobs": 0, "tools": None},
        ),
    ],
)
def test_fields_of_other_engines_at_their_usual_values_change_nothing(client, path, more):
    body = (say if path == PATHS[1] else ask)(stream=True)
    plain, full = (client.post(path, json=body | fields) for fields in ({}, USUAL | more))
    assert full.status_code == 200, full.text
    assert "x-ignored-fields" not in full.headers
    texts = [[chunk["choices"] for chunk in events(reply.text)] for reply in (plain, full)]
    assert texts[0] == texts[1]


def test_a_field_of_another_engine_at_another_value_is_refused_with_the_reason(client):
    for fields, reason in (
        ({"skip_special_tokens": False}, "No text shows control tokens"),
        ({"priority": 3}, "the order in which they came"),
        ({"bad_words": ["a"]}, "Use logit_bias"),
        ({"prompt_logprobs": 1}, "Use echo with logprobs"),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "Only the last chunk"),
    ):
        assert reason in refused(client.complete(**fields))["message"]
    schema = good(client.get("/openapi.json"))["components"]["schemas"]["ChatRequest"]["properties"][
        "priority"
    ]
    assert "order" in schema["description"]


def test_fields_of_other_engines_that_are_granted(client, tiny_server, monkeypatch):
    text = good(client.complete("Hello there", 12))["choices"][0]["text"]
    stop = text[3:5]
    for name in ("include_stop_str_in_output", "no_stop_trim"):
        for stream in (False, True):
            reply = client.complete("Hello there", 12, stop=[stop], stream=stream, **{name: True})
            parts = events(reply.text) if stream else [good(reply)]
            assert (
                "".join(part["choices"][0]["text"] for part in parts) == text[: text.index(stop) + len(stop)]
            )
    (choice,) = good(
        client.complete("Hello there", 3, logprobs=1, return_tokens_as_token_ids=True, echo=True)
    )["choices"]
    prompt = client.tokens("Hello there")
    names = [int(name.removeprefix("token_id:")) for name in choice["logprobs"]["tokens"]]
    assert (names[: len(prompt)], len(names)) == (prompt, len(prompt) + 3)
    (choice,) = good(client.chat(logprobs=True, top_logprobs=2, return_tokens_as_token_ids=True))["choices"]
    assert choice["logprobs"]["content"][0]["top_logprobs"][0]["token"].startswith("token_id:")
    tokenizer = tiny_server.model.tokenizer
    monkeypatch.setattr(tokenizer, "bos_ids", (tokenizer.eos_id,))
    counts = [
        good(client.complete(add_special_tokens=wish))["usage"]["prompt_tokens"]
        for wish in (True, False, None)
    ]
    assert counts == [len(prompt) + 1, len(prompt), len(prompt) + 1]


def test_a_cache_salt_keeps_the_prefix_cache_apart(client):
    """Another salt finds nothing of a prompt in the cache, and the same one all that no salt would."""
    cached = lambda salt: good(client.complete("salted " * 8, 1, cache_salt=salt))["usage"][
        "prompt_tokens_details"
    ]
    assert [cached(salt)["cached_tokens"] > 0 for salt in (None, None, "a", "a", "b", None)] == [
        False,
        True,
        False,
        True,
        False,
        True,
    ]


def test_special_tokens_of_a_conversation_are_its_templates(client):
    fields = {"messages": say()["messages"]}
    for wish in (True, False):
        assert (
            refused(client.post("/tokenize", json=fields | {"add_special_tokens": wish}))["param"]
            == "add_special_tokens"
        )
    assert client.post("/tokenize", json=fields).status_code == 200


def test_fields_that_change_nothing_are_accepted_and_named(client):
    ignored = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "flex",
        "safety_identifier": "x",
        "prompt_cache_key": "y",
        "prompt_cache_retention": "24h",
        "prediction": {"type": "content", "content": "a"},
        "reasoning_effort": "low",
        "verbosity": "high",
        "request_id": "a",
        "rid": "b",
        "session_id": "c",
        "stream_interval": 4,
        "guided_decoding_backend": "outlines",
    }
    granted = {
        "tools": [],
        "tool_choice": "none",
        "parallel_tool_calls": True,
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "logit_bias": {},
        "stop": None,
        "seed": None,
        "n": None,
        "stream_options": None,
        "top_k": None,
    }
    for stream in (False, True):
        reply = client.post("/v1/chat/completions", json=say(stream=stream) | ignored | granted)
        assert reply.status_code == 200, reply.text
        assert reply.headers["x-ignored-fields"] == ", ".join(ignored)
    assert (
        good(client.post("/v1/chat/completions", json=say() | ignored))["choices"]
        == good(client.chat())["choices"]
    )
    reply = client.complete(echo=False, suffix="", best_of=1, logprobs=None, user=None)
    assert (reply.status_code, reply.headers.get("x-ignored-fields")) == (200, None)
    assert client.complete(user="me").headers["x-ignored-fields"] == "user"
    options = {"num_predict": 1, "num_ctx": 64, "repeat_last_n": None}
    reply = client.post("/api/generate", json={"prompt": "a", "options": options, "stream": False})
    assert reply.headers["x-ignored-fields"] == "options.num_ctx"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b'"a"',
        b"1",
        b"{",
        b"}",
        b"\xff\xfe\x00",
        b"NaN",
        b'{"prompt":NaN}',
        b'{"temperature":Infinity}',
        b"{}{}",
        b"\xef\xbb\xbf{}",
        b'{"prompt":"\\ud800"}',
        b'{"prompt":"\\udfff\\ud800"}',
        b'{"prompt":"\xed\xa0\x80"}',
        b'{"prompt":"\xff"}',
        b'{"max_tokens":' + LARGE + b"}",
        b'{"temperature":' + LARGE + b"}",
        b'{"temperature":1e999}',
        b'{"temperature":-1e999}',
        DEEP,
        b'{"prompt":' + DEEP,
        b'{"prompt":' + DEEP + b"]" * 100_000 + b"}",
        b'{"a":' * 50_000,
        b'{"user":' * 50_000,
        b'{"prompt":"a",}',
        b"{'prompt':'a'}",
        b'{"prompt":"a"',
        b'{"prompt":"\x00"}',
        b'{"prompt":"a\n"}',
    ],
)
def test_invalid_json(client, path, content):
    refused(client.post_bytes(path, content))


def test_integers_in_any_spelling(client):
    result = client.post_bytes(
        "/v1/completions", b'{"prompt":[5.0,6e0],"max_tokens":2.0,"temperature":0}'
    ).json()
    assert result["choices"] == client.complete([5, 6], 2).json()["choices"]
    refused(client.post_bytes("/v1/completions", b'{"prompt":[5.5]}'))


def with_nulls(value: Any, names: list[str]) -> Any:
    """The body with those fields, null, in each of its objects."""
    if isinstance(value, list):
        return [with_nulls(inner, names) for inner in value]
    if not isinstance(value, dict):
        return value
    return {name: with_nulls(inner, names) for name, inner in value.items()} | dict.fromkeys(names)


@pytest.mark.parametrize(
    "names", [["async"], ["caller", "of a newer client", "q`. -"], [f"new_{n}" for n in range(8)]]
)
def test_an_unknown_field_that_is_null_asks_for_nothing(client, names):
    """In every object of the body, as newer clients send their own fields; with any other value it
    is refused by name.
    """
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "Hello"}, {"type": "text", "text": " there"}]}
    ]
    turns += [{"role": "assistant", "content": "Hi"}, {"role": "user", "content": "there"}]
    body = say(messages=turns, stream_options=None, response_format={"type": "text"})
    plain = good(client.post("/v1/chat/completions", json=body))["choices"]
    assert good(client.post("/v1/chat/completions", json=with_nulls(body, names)))["choices"] == plain
    body["messages"][2] |= {names[0]: False}
    assert refused(client.post("/v1/chat/completions", json=body))["param"] == f"messages[2].{names[0]}"


def test_null_within_what_a_client_wrote_stays(client):
    """A schema's null is a value, and no field of the body."""
    schema = {"const": {"a": None}}
    body = ask("Hello", 30, guided_json=schema, of_a_newer_client=None)
    assert json.loads(good(client.post("/v1/completions", json=body))["choices"][0]["text"]) == {"a": None}
    assert refused(client.complete(guided_json={"not": {}}, of_a_newer_client=None))["param"] == "guided_json"


def test_unknown_null_fields_are_bounded(client):
    body = ask() | {f"new_{n}": None for n in range(1000)}
    assert refused(client.post("/v1/completions", json=body))["code"] == "unknown_parameter"


def test_context_overflow_names_both_counts(client):
    text = "Hello there " * 100
    count = client.post("/tokenize", json={"prompt": text}).json()["count"]
    problem = refused(client.complete(text))
    assert (problem["code"], problem["param"]) == ("context_length_exceeded", "prompt")
    assert f"{count:,}" in problem["message"]
    assert f"{CAPACITY:,}" in problem["message"]
    problem = refused(client.post("/v1/chat/completions", json=say(text) | {"max_tokens": None}))
    assert (problem["code"], problem["param"]) == ("context_length_exceeded", "messages")
    assert client.complete([5] * (CAPACITY - 1), 1).status_code == 200
    refused(client.complete([5] * CAPACITY, 1))
    refused(client.complete([5] * 400_000, 1))


def test_a_long_conversation_is_counted_before_it_is_rendered(client):
    """A template renders a conversation once for each of its answers; for this one that would take
    minutes.
    """
    turns = [
        {"role": ("user", "assistant")[n % 2], "content": "Hello there, how are you? " * 150}
        for n in range(801)
    ]
    problem = refused(client.post("/v1/chat/completions", json=say() | {"messages": turns}, timeout=300))
    assert problem["code"] == "context_length_exceeded"


def test_an_unknown_model_gets_a_404_that_names_the_served_one(client):
    for path, fields in (
        ("/v1/completions", ask()),
        ("/v1/chat/completions", say()),
        ("/tokenize", {"prompt": "a"}),
    ):
        problem = refused(client.post(path, json=fields | {"model": "gpt-5" * 50}), 404)
        assert problem["code"] == "model_not_found"
        assert problem["param"] == "model"
        assert "'tiny'" in problem["message"]
        assert client.post(path, json=fields | {"model": "default"}).status_code == 200


def test_more_completions_than_one_request_may_ask_for(client):
    assert "136 completions; at most 128" in refused(client.complete(["a"] * 17, n=8))["message"]


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE", "TRACE", "OPTIONS", "POST", "HEAD"])
def test_wrong_methods(client, method):
    for route in ROUTES:
        if method == route.method or (method, route.method) == ("HEAD", "GET"):
            continue
        reply = client.request(method, route.path.replace("{model}", "tiny"))
        assert reply.status_code == 405
        assert route.method in reply.headers["allow"].split(", ")
        if method != "HEAD":
            refused(reply, 405)


def test_unknown_routes(client):
    for path in (
        "/v1",
        "/v1/",
        "/favicon.ico",
        "/v1/completions/",
        "/v1/models/",
        "/docs",
        "/static/x",
        "/update_weights",
    ):
        assert refused(client.get(path), 404)["code"] in ("not_found", "model_not_found")


def test_a_body_that_is_too_large(client, tiny_server):
    large = b'{"prompt":"' + b"a" * requests.MAX_BYTES + b'"}'
    refused(client.post_bytes("/v1/completions", large), 413)
    refused(
        client.post_bytes("/v1/completions", iter([large[: 1 << 20]] * 6)), 413
    )  # in chunks, of unknown length
    # Only announced: nothing of it is read before it is refused.
    with tiny_server.connect() as connection:
        connection.sendall(post_head("/tokenize", 99999999999))
        assert b" 413 " in connection.recv(1000)


@pytest.mark.law("backpressure")
def test_bodies_of_all_requests_together_are_bounded(client, tiny_server, monkeypatch):
    """By received bytes, not by Content-Length; however a request ends, its bytes are subtracted
    again.
    """
    admission = tiny_server.state.admission
    monkeypatch.setattr(admission, "max_body_bytes", 1000)
    sound = b'{"prompt":"' + b"a" * 388 + b'"}'
    with tiny_server.connect() as first:
        first.sendall(post_head("/tokenize", 10**5) + b" " * 600)
        assert until(lambda: admission.body_bytes == 600)
        assert client.post_bytes("/tokenize", sound[:-3] + b'"}').status_code == 200
        with tiny_server.connect() as second:
            second.sendall(post_head("/tokenize", 10**5) + b" " * 300)
            assert until(lambda: admission.body_bytes == 900)
            second.sendall(b" " * 101)
            reply = read_all(second)
        assert reply.startswith(b"HTTP/1.1 429 ")
        assert b"\r\nretry-after: 1\r\n" in reply.lower()
        assert b"\r\nconnection: close\r\n" in reply.lower()
        assert json.loads(reply.partition(b"\r\n\r\n")[2])["error"]["code"] == "rate_limit_exceeded"
        assert until(lambda: admission.body_bytes == 600)
        assert refused(client.post_bytes("/tokenize", sound), 429)["type"] == "rate_limit_error"
    assert until(lambda: admission.body_bytes == 0)  # the first has left
    assert client.post_bytes("/tokenize", sound).status_code == 200
    refused(client.post_bytes("/tokenize", sound[1:]))
    monkeypatch.setattr(requests, "MAX_BYTES", 500)
    refused(client.post_bytes("/tokenize", iter([sound, sound])), 413)
    monkeypatch.setattr(requests, "BODY_SECONDS", 0.2)
    with tiny_server.connect() as slow:
        slow.sendall(post_head("/tokenize", 50) + b" " * 40)
        assert b" 408 " in slow.recv(65536)
    assert until(lambda: admission.body_bytes == 0)


@pytest.mark.law("isolation")
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/score", b'{"prompt": "a", "candidates": ["b"]}'),
        ("/v1/embeddings", b'{"input": "a"}'),
        ("/v1/completions", b'{"prompt": "a", "max_tokens": 2}'),
    ],
)
def test_a_request_is_gone_with_its_answer(client, path, body):
    """With its body: what refers to itself is collected late. Requests of other tests, whose clients
    may have left a moment ago, do not count.
    """

    def living() -> set[int]:
        kinds = requests.ApiCall, AnswerRequest
        return {id(each) for each in gc.get_objects() if isinstance(each, kinds)}

    gc.collect()
    others = living()
    good(client.post_bytes(path, body))
    assert until(lambda: living() <= others, seconds=30)


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate, gzip"])
def test_a_compressed_body(client, encoding):
    refused(client.post_bytes("/v1/completions", b"{}", **{"Content-Encoding": encoding}), 415)
    refused(
        client.post_bytes("/v1/completions", b"{}", **{"Content-Type": "application/json; charset=utf-16"}),
        415,
    )


@pytest.mark.parametrize(
    "request_",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"hello\r\n\r\n",
        b"GET /\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET  / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nA b: c\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        *(
            b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\n" + rest
            for rest in (
                b"Content-Length: -1\r\n\r\n",
                b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
                b"Transfer-Encoding: chunked\r\n\r\nnot hex\r\n",
                b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
            )
        ),
        b"\r\n\r\n\r\n\x00",
    ],
)
def test_malformed_http(tiny_server, request_):
    with tiny_server.connect() as connection:
        connection.sendall(request_)
        connection.shutdown(socket.SHUT_WR)
        answer = read_all(connection)
    if answer:
        head, _, rest = answer.partition(b"\r\n\r\n")
        assert head.split()[1] in (b"400", b"415"), answer
        assert json.JSONDecoder().raw_decode(rest.decode())[0]["error"]["message"]


@pytest.mark.parametrize(
    "before", [b"", b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n", post_head("/none", 3) + b"{} "]
)
@pytest.mark.parametrize("end", [b"", b"\r\n\r\n"])
@pytest.mark.parametrize("padding", [b" ", b"\r\nA: b"])
def test_a_head_that_is_too_large(tiny_server, before, end, padding):
    """Refused by its own bytes, whether it comes at once, piece by piece, without an end, or behind
    another request.
    """
    start = b"GET /live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX: "
    for size, status in (
        (server.MAX_HEAD_BYTES - 10, b"200"),
        (server.MAX_HEAD_BYTES + 10, b"431"),
        (100_000, b"431"),
    ):
        if status == b"200" and not end:
            continue  # it may yet fit
        head = start + (padding * size)[: size - len(start) - 5] + (end or padding)
        for piece in (len(before + head), 9_000):
            with tiny_server.connect() as connection:
                with contextlib.suppress(OSError):  # it is refused before all of it is sent
                    for at in range(0, len(before + head), piece):
                        connection.sendall((before + head)[at : at + piece])
                        time.sleep(0.002 * (piece == 9_000))
                statuses = re.findall(rb"HTTP/1.1 (\d+) ", answer := read_all(connection))
            assert statuses == (
                [b"200", status] if b"/live" in before else [b"404", status] if before else [status]
            )
            assert (b"may have at most 32,768 bytes." in answer) == (status == b"431")


@pytest.mark.parametrize("before", [b"", b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n"])
def test_a_client_that_sends_no_http_reads_why_and_is_dropped_in_time(tiny_server, monkeypatch, before):
    monkeypatch.setattr(server, "HEAD_SECONDS", 1.5)
    with tiny_server.connect() as connection:
        begin = time.monotonic()
        connection.sendall(before + b"hello\r\n\r\n")
        assert b" 400 " in read_all(connection)  # to the end of what the server sends
        assert until(lambda: is_reset(connection))
        assert time.monotonic() - begin > 0.75


def is_reset(connection: socket.socket) -> bool:
    """Whether the server no longer takes what is sent."""
    try:
        return not connection.send(b"more")
    except OSError:
        return True


@pytest.mark.whole
def test_slow_clients(tiny_server, monkeypatch):
    monkeypatch.setattr(requests, "BODY_SECONDS", 1.5)
    monkeypatch.setattr(server, "HEAD_SECONDS", 1.5)
    head = post_head("/tokenize", 20)
    with tiny_server.connect() as connection:
        connection.sendall(head + b'{"prompt"')
        assert b" 408 " in connection.recv(65536)
    with tiny_server.connect() as connection:
        connection.sendall(head[:40])
        assert is_closed(connection)
    with tiny_server.connect() as connection:
        assert is_closed(connection)


def is_closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(65536) == b""
    except ConnectionResetError:
        return True
