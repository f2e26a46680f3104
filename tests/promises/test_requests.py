"""S3, S6, S7, X3 and X4: no request harms a server: damaged ones, large ones, those without its key and from pages elsewhere.

The last file of this folder, since S3 ends the server.
"""

import asyncio
import base64
import json
import random
import re
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from bench.serving.client import Client, Response, completion_request, random_text
from bench.serving.measure import percentile
from engine.counting.hardware import clock
from stages.serve.api.routes import ROUTES
from stages.serve.api.unsupported import UNSUPPORTED
from tests.openai_like import chat_request
from tests.promises.figures import at_least, at_most, exactly, milliseconds, none_of, servers, slowest
from tests.serve.tiny_server import OPEN, TinyServer

pytestmark = pytest.mark.anyio

PROBES = 20  # of /health, a second
MEGABYTE = 1 << 20
NUMBERS = (-1, 0, 1, 17, 2**31, 2**63, 10**40, -(2**63), -0.0, 0.5, 1e308, 1e-320, float("nan"), float("inf"))
VALUES: tuple[Any, ...] = (
    *NUMBERS,
    None,
    True,
    False,
    "",
    "0",
    "default",
    "\x00",
    "𝔘nicode ☃",
    "a" * 5000,
    [],
    [[]],
    [None],
    [1, "a"],
    [-1],
    [10**9],
    ["a"],
    {},
    {"a": {}},
    {"content": 1},
    {"50256": -100},
    {"-1": 1},
    {"type": "text", "text": "hi"},
    "<|im_start|>system\n",
    [{"role": "user"}],
    [{"role": "user", "content": [{"type": "image", "source": {}}]}],
    {"num_predict": "a"},
)
KNOWN = {field for route in ROUTES if route.body for field in route.body.__struct_encode_fields__}
FIELDS = sorted(KNOWN | {*UNSUPPORTED, "adapter", "weights", "__proto__"})
ROLES = ("user", "assistant", "system", "tool", "root", "", None, 3)
POSTS = ("/v1/completions", "/v1/chat/completions", *(route.path for route in ROUTES if route.body))
PATHS = (
    *(route.path for route in ROUTES),
    "/v1/none",
    "/../etc/passwd",
    "/%00",
    "/%ff",
    "//",
    POSTS[0] + "/",
    "/?q=" + "a" * 3000,
)
METHODS = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "CONNECT", "BREW")
BODIES = (
    b"",
    b"null",
    b"[]",
    b'"a"',
    b"{",
    b"\xff\xfe\x00",
    b'{"prompt":NaN}',
    b'{"a":1}{"b":2}',
    b"\xef\xbb\xbf{}",
    b'{"prompt":"\\ud800 \\udfff","max_tokens":1}',
    b'{"prompt":"a","max_tokens":' + b"9" * 5000 + b"}",
    b'{"prompt":"a","prompt":"b","max_tokens":1,"max_tokens":2}',
    *(
        b'{"prompt":' + left * 30_000 + right * 30_000 + b"}"
        for left, right in ((b"[", b"]"), (b'{"a":', b"}"))
    ),
)


HELLO = [{"role": "user", "content": "Hello there"}]
SOUND: dict[str, dict[str, Any]] = {
    "/v1/responses": {"input": HELLO, "max_output_tokens": 1},
    "/v1/messages": {"messages": HELLO, "max_tokens": 1, "system": "Be brief."},
    "/v1/messages/count_tokens": {"messages": HELLO},
    "/api/chat": {"messages": HELLO, "options": {"num_predict": 1}, "stream": False},
    "/api/generate": {"prompt": "Hello there", "options": {"num_predict": 1}, "stream": False},
}


def fuzzed_request(rng: random.Random) -> tuple[str, str, bytes | None, dict[str, str]]:
    """Returns (method, path, body, headers): a sound and small request (one of four), or one
    damaged in one way or several.
    """
    path, kind, headers = rng.choice((*POSTS[:2] * 2, *SOUND)), rng.randrange(8), {}
    text, fields = (
        random_text(rng, rng.randint(1, 12)),
        {"stream": rng.random() < 0.5, "temperature": rng.choice((0, 1))},
    )
    make = chat_request if "chat" in path else completion_request
    body: dict[str, Any] = (
        dict(SOUND[path]) if path in SOUND else make(text, 2, seed=rng.randrange(99), **fields)
    )
    if kind == 0:
        return rng.choice(METHODS[:-3]), rng.choice(PATHS), rng.choice((None, b"{}", b"")), {}
    if kind == 1:
        return "POST", rng.choice(POSTS), rng.choice((*BODIES, rng.randbytes(rng.randint(0, 400)))), {}
    if kind < 6:
        for _ in range(rng.randint(1, 3)):
            _damage(body, rng)
        path = rng.choice((path, path, path, *POSTS))
    elif rng.random() < 0.2:
        headers = {
            rng.choice(("content-type", "accept", "x-a")): rng.choice(("text/plain", "", "\xff", "v" * 9000))
        }
    data = json.dumps(body).encode()
    return (
        "POST",
        path,
        data[: rng.randrange(len(data))] if kind < 6 and rng.random() < 0.1 else data,
        headers,
    )


def _damage(body: dict[str, Any], rng: random.Random) -> None:
    """One field is lost, invented, or becomes what it should not be; a request that is sound all
    the same stays a small one.
    """
    way = rng.randrange(4)
    if way == 0:
        body.pop(rng.choice([*body, "prompt"]), None)
    elif way == 1:
        body["messages"] = [
            {"role": rng.choice(ROLES), "content": rng.choice(VALUES)} for _ in range(rng.randint(0, 4))
        ]
    else:
        body[rng.choice(FIELDS) if way == 2 else rng.choice([*body, "prompt"])] = rng.choice(VALUES)
    if body.keys() & {"prompt", "messages"} and not body.get("options") and body.get("max_tokens") is None:
        body["max_tokens"] = 2


@pytest.mark.law("immutable weights", "no compiles")
@servers("S6")
async def test_nothing_disturbs_the_server(client, slots, quick, rng, expect):
    """Each request has an answer, and each refusal OpenAI's form; no program is compiled, and
    /health answers meanwhile.
    """
    requests = [fuzzed_request(rng) for _ in range(800 if quick else 10_000)]
    compiles = (await client.get("/health")).json()["compiles_after_ready"]
    responses, probes = await beside_probes(client, requests, slots)
    compiles = (await client.get("/health")).json()["compiles_after_ready"] - compiles
    sound = sum(response.status == 200 for response in responses)
    bad = [
        request for request, response in zip(requests, responses) if not is_in_form(*request[:2], response)
    ]
    expect(
        at_most("compiles after ready", compiles, 0),
        at_most("5xx", sum(response.status >= 500 for response in responses), 0),
        at_most("unanswered", sum(response.error is not None for response in responses), 0),
        none_of("refusals of another form", bad),
        at_least("sound ones", sound, len(responses) / 10),
        slowest("/health", probes, 100),
        over=f"{len(responses):,} fuzzed requests of which {sound:,} were sound, {len(probes)} probes of /health",
    )


def is_in_form(method: str, path: str, response: Response) -> bool:
    """Whether a refusal is as OpenAI's clients read it, or Ollama's, who read a sentence."""
    if (
        response.status == 200 or response.error or method in ("HEAD", "OPTIONS")
    ):  # those unanswered count by themselves
        return True
    problem = response.json().get("error", {})
    is_known = (
        isinstance(problem, str)
        if path.startswith("/api/")
        else problem.keys() == {"message", "type", "param", "code"}
    )
    return is_known and response.status in (400, 404, 405, 413, 415, 429, 431)


async def beside_probes(
    client: Client, requests: Iterable[Any], streams: int
) -> tuple[list[Response], list[float]]:
    """Sends requests, `streams` at a time -> their responses in order, and seconds of each GET of
    /health meanwhile; one that is not 200 counts as never answered.
    """
    free, stop = asyncio.Semaphore(streams), asyncio.Event()

    async def send(method: str, path: str, body: Any, headers: dict[str, str]) -> Response:
        async with free:
            # One without a limit may fill the context, which takes several of them at once more
            # than a minute.
            return await client.request(method, path, body, headers=headers, timeout=300)

    async def probe() -> list[float]:
        seconds, at = [], clock()
        while not stop.is_set():
            response = await client.get("/health", sent_at=at, timeout=10)
            seconds.append(response.seconds if response.status == 200 else float("inf"))
            at = max(at + 1 / PROBES, clock())
            await asyncio.sleep(max(0.0, at - clock()))
        return seconds

    probes = asyncio.create_task(probe())
    responses = await asyncio.gather(*(send(*request) for request in requests))
    stop.set()
    return responses, await probes


@servers("S7")
async def test_a_megabyte_is_tokenized_in_a_second(client, rng, expect):
    """Through /tokenize, the way there and back included; the loop answers meanwhile."""
    emoji = "🙂👩‍🚀🏳️‍🌈".encode()
    texts = {
        "a": b"a" * MEGABYTE,
        "^": b"^" * MEGABYTE,
        "emoji": emoji * (MEGABYTE // len(emoji)),
        "base64": base64.b64encode(rng.randbytes(MEGABYTE * 3 // 4)),
    }
    bodies = [json.dumps({"prompt": text.decode()}, ensure_ascii=False).encode() for text in texts.values()]
    responses, probes = await beside_probes(client, [("POST", "/tokenize", body, {}) for body in bodies], 1)
    figures = [
        at_most(f"1 MB of {name}", response.seconds * MEGABYTE / len(text), 1, " s")
        for (name, text), response in zip(texts.items(), responses)
    ]
    counted = sum(response.status == 200 and response.json()["count"] > 0 for response in responses)
    expect(
        exactly("counted", counted, 4), *figures, milliseconds("/health p50", percentile(probes, 0.5), 100)
    )


# Requests that a server must refuse, as (method, target, headers)
Attempt = tuple[str, str, dict[str, str]]
KEY = "sk-tests-3b1f0a"
# the page, which asks for the key; and for whoever starts and stops servers
# Ways to write a path so that it might be taken for liveness, or for none of the routes that need a
# key.
SPELLINGS = (
    "/{}",
    "//{}",
    "///{}",
    "/{}/",
    "/{}//",
    "/.{}",
    "/./{}",
    "/x/../{}",
    "/live/../{}",
    "/live/%2e%2e/{}",
    "/live;/../{}",
    "/live%2f..%2f{}",
    "/%2e/{}",
    "/%2e%2e/{}",
    "/{}%20",
    "/{}%00",
    "/{}%2f",
    "/{};a=b",
    "/{}?live",
    "/{}?key=" + KEY,
    "/{}#",
    "live/{}",
    "/%6cive/{}",
    "\\{}",
    "http://localhost/{}",
    "http://localhost//{}",
    "http://localhost/live/../{}",
    "http://x/{}",
)
_basic = lambda text: "Basic " + base64.b64encode(text.encode()).decode()
WRONG_KEYS = (
    "",
    "Bearer",
    "Bearer ",
    "Bearer wrong",
    f"Bearer {KEY[:-1]}",
    f"Bearer {KEY}x",
    f"Bearer {KEY.upper()}",
    "Bearer é",
    KEY,
    f"Bearer {KEY},",
    f"Bearer\t{KEY}",
    f"Bearer {KEY[::-1]}",
    f"Digest {KEY}",
    f"Basic {KEY}",
    "Basic !!!",
    _basic(KEY),
    _basic(f"{KEY}:"),
    _basic("x:wrong"),
)
JSON = "application/json"
# What a page may send without a preflight.
SIMPLE_TYPES = (
    "text/plain",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x",
    "",
    "text/plain; application/json",
)


def without_the_key(routes: Iterable[tuple[str, str]], port: int) -> Iterator[Attempt]:
    """Every route, a method and a path, written in every way, without the key or with almost the
    key.
    """
    own = {"host": f"127.0.0.1:{port}"}
    almost: list[dict[str, str]] = [
        *({"authorization": key} for key in WRONG_KEYS),
        {"x-original-url": "/live"},
        {"x-forwarded-for": "127.0.0.1"},
        {"x-rewrite-url": "/live"},
        {"x-http-method-override": "GET"},
        {"cookie": f"key={KEY}"},
        {"api-key": KEY},
    ]
    for method, path in routes:
        if path not in OPEN:
            yield from ((each, spelling.format(path[1:]), own) for spelling in SPELLINGS for each in METHODS)
            yield from ((method, path, own | headers) for headers in almost)
            hosts = (
                "localhost",
                f"localhost:{port}",
                "127.0.0.1",
                f"[::1]:{port}",
                "live",
                "127.0.0.1/live",
                "127.0.0.1:0",
                "",
            )
            yield from ((method, path, {"host": host}) for host in hosts)


def from_elsewhere(port: int) -> Iterator[Attempt]:
    """What a browser would send for a page of another origin, under another name for this host, or
    as a simple POST.
    """
    own, chat, models = f"127.0.0.1:{port}", "/v1/chat/completions", "/v1/models"
    origins = (
        "http://evil.example",
        "https://evil.example",
        f"http://evil.example:{port}",
        "null",
        "http://127.0.0.1",
        "file://",
        "",
        "http://127.0.0.1:1",
        f"http://localhost:{port + 1}",
        f"https://{own}",
        f"http://{own}.evil.example",
        f"http://evil@{own}",
        f"http://{own}/",
    )
    for origin in origins:
        for kind in (JSON, *SIMPLE_TYPES):
            yield "POST", chat, {"host": own, "origin": origin, "content-type": kind}
        preflight = {
            "access-control-request-method": "POST",
            "access-control-request-headers": "content-type",
        }
        yield "OPTIONS", chat, {"host": own, "origin": origin, **preflight}
        yield "GET", models, {"host": own, "origin": origin}
    hosts = (  # a page whose name was pointed at 127.0.0.1 after it was loaded
        "evil.example",
        f"evil.example:{port}",
        "127.0.0.1.evil.example",
        f"localhost.evil.example:{port}",
        "169.254.169.254",
        "0.0.0.0",
        "[::2]",
        "127.0.0.1@evil.example",
        "evil.example#127.0.0.1",
        "127.0.0.1:80:80",
        "localhost:port",
        "127.0.0.1 evil",
        "",
    )
    for host in hosts:
        yield from (("GET", path, {"host": host}) for path in ("/", models, "/live"))
        yield "POST", chat, {"host": host, "content-type": JSON}
    for site in ("cross-site", "same-site"):
        fetch = {"host": own, "sec-fetch-site": site}
        yield from (("POST", chat, fetch | {"content-type": kind}) for kind in (JSON, "text/plain"))
        yield from (("GET", path, fetch | {"sec-fetch-mode": "no-cors"}) for path in (models, "/"))
        yield "GET", "/v1/attestation", fetch | {"sec-fetch-mode": "navigate"}
    for path in ("/v1/completions", chat, "/tokenize", "/detokenize"):  # its Origin lost on the way
        yield from (("POST", path, {"host": own, "content-type": kind}) for kind in SIMPLE_TYPES)


async def attempt(port: int, method: str, target: str, headers: dict[str, str]) -> Response:
    """The response to a request written by hand, with a small completion as its body where it is a
    POST.
    """
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    body = json.dumps(completion_request("a", 1, stream=False)).encode() if method == "POST" else b""
    head = f"{method} {target} HTTP/1.1\r\n{lines}content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    client = Client(port)
    return await client.exchange(Response(0.0), head.encode("latin-1") + body, 10.0)


@pytest.fixture
async def locked(anyio_backend, make_server, request):
    """A server with a key; the tiny one is not even warm: nobody gets that far."""
    if request.param == "tiny":
        with TinyServer(keys=(KEY,), warm=False) as tiny:
            yield SimpleNamespace(port=tiny.port, client=Client(tiny.port))
    else:
        async with make_server("--api-key", KEY) as server:
            yield server


@servers("X3", "locked")
async def test_without_the_key_nothing_but_liveness_and_health_is_open(locked, expect):
    """Every route, every method, written in every way, without the key or with almost the key."""
    routes = [
        (route.method, route.path.replace("{model}", "default")) for route in ROUTES if route.path not in OPEN
    ]
    attempts = list(without_the_key(routes, locked.port))
    responses = [await attempt(locked.port, *each) for each in attempts]
    wrong = [
        each for each, response in zip(attempts, responses) if response.status not in (400, 401, 403, 404)
    ]
    opened = await locked.client.get("/v1/models", headers={"authorization": f"Bearer {KEY}"})
    expect(
        none_of("answers without the key", wrong),
        at_least(
            "that the key would have opened", sum(response.status == 401 for response in responses), 100
        ),
        exactly("status with the key", opened.status, 200),
        over=f"{len(attempts)} requests to {len(routes)} routes",
    )


@servers("X4")
async def test_a_page_elsewhere_is_refused(server, expect):
    """What a browser would send for a page elsewhere: other origins, other names for this host,
    simple POSTs.
    """
    attempts = list(from_elsewhere(server.port))
    responses = [await attempt(server.port, *each) for each in attempts]
    wrong = [
        each
        for each, response in zip(attempts, responses)
        if response.status not in (400, 403, 415) or "access-control-allow-origin" in response.headers
    ]
    own = {"origin": f"http://127.0.0.1:{server.port}"}
    same_origin = await server.client.post("/v1/completions", completion_request("a", 1), headers=own)
    expect(
        none_of("accepted", wrong),
        exactly("status from its own page", same_origin.status, 200),
        over=f"{len(attempts)} combinations of Origin, Host, fetch metadata and simple bodies",
    )


UPDATE_ROUTES = (
    "/update_weights",
    "/v1/update_weights",
    "/update_weights_from_disk",
    "/load_weights",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/init_weight_update",
    "/collective_rpc",
    "/sleep",
    "/wake_up",
    "/reset_prefix_cache",
    "/pause",
    "/v1/models/load",
    "/v1/fine_tuning/jobs",
    "/v1/files",
    "/admin",
    "/debug",
    "/shutdown",
)


@servers("S3")
async def test_the_digest_is_that_of_load(server, client, slots, quick, rng, expect):
    """On demand, and at the end of a real server, which prints its first 16 digits."""
    await beside_probes(client, [fuzzed_request(rng) for _ in range(100 if quick else 500)], slots)
    paths = [route.path.replace("{model}", "default") for route in ROUTES]
    attempts = [(method, path) for path in paths for method in ("PUT", "PATCH", "DELETE")]
    attempts += [(method, path) for path in UPDATE_ROUTES for method in ("GET", "POST", "PUT")]
    accepted = [each for each in attempts if (await client.request(*each, {})).status < 400]
    attestation = (await client.get("/v1/attestation")).json()
    digests, code = {attestation["digest_at_load"], attestation["digest"]}, 0
    if server.process:
        server.process.terminate()
        code = await server.wait(20)
        last = re.search(r"Weights \w+.*: SHA-256 ([0-9a-f]{16})", server.output())
        digests.add((last[1] if last else "nothing") + attestation["digest"][16:])
    expect(
        exactly("digests at load, on demand and at shutdown", len(digests), 1),
        exactly("exit code", code, 0),
        none_of("requests to change weights that are not refused", accepted),
    )
