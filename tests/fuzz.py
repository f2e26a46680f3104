"""Makes requests that nobody should send, and a few that somebody would: sound ones damaged at random."""

import json
import random
from typing import Any, NamedTuple

from openai_like import chat_request

from bench.serving.client import completion_request, random_text

NUMBERS = (
    -1, 0, 1, 2, 17, 2**31, 2**32, 2**63, 2**64, 10**40, -(2**63), 0.0, -0.0, 0.5, 1e308, 1e-320, float("nan"), float("inf"),
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    *NUMBERS, None, True, False, "", "0", "default", "no-such-model", "\x00", "𝔘nicode ☃", "a" * 5000, [], [[]], [None],
    [1, "a"], [-1], [10**9], {}, {"a": {}}, {"content": 1}, {"50256": -100}, {"-1": 1}, {"a": 1},
)  # fmt: skip
FIELDS = (
    "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p",
    "seed", "n", "stop", "stream", "stream_options", "logprobs", "top_logprobs", "logit_bias", "presence_penalty",
    "frequency_penalty", "echo", "best_of", "suffix", "tools", "tool_choice", "functions", "user", "response_format",
    "metadata", "modalities", "audio", "reasoning_effort", "ignore_eos", "stop_token_ids", "adapter", "weights",
    "__proto__",
)  # fmt: skip
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD", "BREW")
PATHS = (
    "/v1/completions /v1/chat/completions /v1/models /v1/models/default /tokenize /detokenize /health /live /metrics "
    "/v1/attestation /openapi.json / /v1 /v1/embeddings /favicon.ico /../etc/passwd /%00 /%ff // /v1/completions/ "
    "/v1/completions?x=1 /?q=" + "a" * 3000
).split()


class FuzzedRequest(NamedTuple):
    """A request: its body is bytes as they go out. `method` and `path` are ones a client could send."""

    method: str
    path: str
    body: bytes | None
    headers: dict[str, str]


def fuzzed_request(rng: random.Random) -> FuzzedRequest:
    """One request, damaged in one way or several; one of eight is sound and small."""
    kind = rng.randrange(16)
    if kind < 2:
        return _as_post(_sound_request(rng))
    if kind < 9:
        body = _sound_request(rng)
        for _ in range(rng.randint(1, 3)):
            _damage(body, rng)
        return _as_post(body)
    if kind == 9:
        return FuzzedRequest(rng.choice(METHODS), rng.choice(PATHS), rng.choice((None, b"{}", b"")), {})
    if kind == 10:
        return FuzzedRequest("POST", rng.choice(PATHS[:6]), _bad_bytes(rng), {})
    if kind == 11:
        return FuzzedRequest("POST", rng.choice(("/tokenize", "/detokenize")), json.dumps(_tokenize_request(rng)).encode(), {})
    if kind == 12:
        return FuzzedRequest("POST", rng.choice(PATHS[:2]), _nested_prompt(rng), {})
    if kind == 13:
        kinds = ("text/plain", "application/xml", "multipart/form-data; boundary=x", "", "application/json; charset=utf-16")
        return _as_post(_sound_request(rng))._replace(headers={"content-type": rng.choice(kinds)})
    if kind == 14:
        fields = {f"x-{n}": "v" * rng.randint(0, 300) for n in range(rng.randint(1, 40))}
        return _as_post(_sound_request(rng))._replace(headers=fields | {"accept": rng.choice(("*/*", "image/png", "\xff"))})
    text = json.dumps(_sound_request(rng), ensure_ascii=False).encode()
    return FuzzedRequest("POST", rng.choice(PATHS[:2]), text[: rng.randrange(len(text))], {})


def _sound_request(rng: random.Random) -> dict[str, Any]:
    tokens, stream = rng.randint(1, 3), rng.random() < 0.5
    if rng.random() < 0.5:
        text = random_text(rng, rng.randint(1, 20))
        return chat_request(text, tokens, stream=stream, seed=rng.randrange(99), temperature=rng.choice((0, 1)))
    logprobs, stop = rng.choice((None, 2)), rng.choice((None, "a"))
    return completion_request(random_text(rng, rng.randint(1, 60)), tokens, stream=stream, logprobs=logprobs, stop=stop)


def _damage(body: dict[str, Any], rng: random.Random) -> None:
    """One field is lost, invented, or becomes what it should not be."""
    way = rng.randrange(4)
    if way == 0:
        body.pop(rng.choice(list(body)), None)
    elif way == 1 and "messages" in body:
        body["messages"] = _random_messages(rng)
    else:
        body[rng.choice(FIELDS) if way < 3 else rng.choice(list(body) or ["prompt"])] = rng.choice(VALUES)
    if body.get("max_tokens", 0) is None or "max_tokens" not in body:
        body.setdefault("max_tokens", 2)  # a request that is sound all the same stays a small one


def _random_messages(rng: random.Random) -> Any:
    roles = ("user", "assistant", "system", "tool", "developer", "root", "", None, 3)
    contents: tuple[Any, ...] = (
        "hello", "", None, 5, [], ["a"], [{"type": "text", "text": "hi"}], [{"type": "image_url"}], "<|im_start|>system\n",
        {"a": 1},
    )  # fmt: skip
    return [{"role": rng.choice(roles), "content": rng.choice(contents)} for _ in range(rng.randint(0, 4))]


def _tokenize_request(rng: random.Random) -> dict[str, Any]:
    body = {"model": "default", "prompt": random_text(rng, 5), "tokens": [rng.randrange(60000) for _ in range(4)]}
    _damage(body, rng)
    return body


def _bad_bytes(rng: random.Random) -> bytes:
    lone = b'{"model":"default","prompt":"\\ud800 \\udfff","max_tokens":1}'
    bare = (
        b"", b"null", b"[]", b'"a"', b"{", b"\xff\xfe\x00", b"NaN", b'{"prompt":NaN}', b'{"a":1}{"b":2}',
        b"\xef\xbb\xbf{}", lone,
    )  # fmt: skip
    huge = b'{"prompt":"a","max_tokens":' + b"9" * rng.randint(1, 5000) + b"}"
    twice = b'{"prompt":"a","prompt":"b","max_tokens":1,"max_tokens":2}'
    return rng.choice((*bare, huge, twice, rng.randbytes(rng.randint(0, 400))))


def _nested_prompt(rng: random.Random) -> bytes:
    depth = rng.choice((30, 300, 3000, 30000))
    left, right = rng.choice((("[", "]"), ('{"a":', "}")))
    middle = "1" if left != "[" else ""
    return ('{"model":"default","max_tokens":1,"prompt":' + left * depth + middle + right * depth + "}").encode()


def _as_post(body: dict[str, Any]) -> FuzzedRequest:
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    return FuzzedRequest("POST", path, json.dumps(body).encode(), {})
