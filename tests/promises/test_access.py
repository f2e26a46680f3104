"""X3 and X4: with a key set every route but two needs it, and a web page elsewhere cannot drive the local server."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from figures import at_least, at_most, exactly

from bench.serving.completions import completion_request
from bench.serving.http_client import Client, Response
from engine.errors import UserError

pytestmark = pytest.mark.anyio

Attempt = tuple[str, str, dict[str, str]]  # method, target, headers
KEY = "sk-promises-3b1f0a"
LIVENESS, OPEN = "/live", ("/live", "/health")  # for whoever starts and stops servers
LIVENESS_BODY = b'{"status":"ok"}'  # all that it says
REQUEST = completion_request("a", 1, stream=False)
# Ways to write a path so that it might be taken for liveness, or for none of the routes that need a key.
PATH_TRICKS = (
    "/{}", "//{}", "/%2e/{}", "/./{}", "/live/../{}", "/live/%2e%2e/{}", "/live;/../{}", "/{}/", "/{}?live", "/{}%00",
    "/live%2f..%2f{}",
)  # fmt: skip
WRONG_KEYS = (
    "", "Bearer", "Bearer ", f"Bearer {KEY[:-1]}", f"Bearer {KEY}x", f"Bearer {KEY.upper()}", f"Basic {KEY}", f"Bearer {KEY},",
    f"Bearer {KEY[::-1]}", "Bearer é", KEY, f"Digest {KEY}",
)  # fmt: skip
SIMPLE_TYPES = ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data")  # that need no preflight


async def _attempt(port: int, method: str, target: str, headers: dict[str, str]) -> Response:
    """The response to a request written by hand, with a small completion as its body where it is a POST."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    body = json.dumps(REQUEST).encode() if method == "POST" else b""
    head = f"{method} {target} HTTP/1.1\r\n{lines}content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    client = Client(port)
    protocol, _ = client.encode(method, "/", None, {})
    return await client.exchange(Response(0.0), protocol, head.encode("latin-1") + body, 10.0)


@pytest.mark.promises("X3", "with a key set, every route but liveness and health needs it")
async def test_every_route_needs_the_key(make_server, expect):
    """Every route, every method, written in every way, without the key or with almost the key."""
    async with make_server(key=KEY) as server:
        routes = (await server.client.get("/openapi.json")).json()["paths"]
        attempts = list(_without_the_key(routes, server.port))
        responses = [await _attempt(server.port, *attempt) for attempt in attempts]
        status = (await server.client.post("/v1/completions", REQUEST)).status
    leaked = sum(100 <= response.status < 400 and response.body != LIVENESS_BODY for response in responses)
    sources = (Path(__file__).parents[2] / "stages" / "serve").rglob("*.py")
    compared = sum(source.read_text(encoding="utf-8").count("compare_digest(") for source in sources)
    expect(
        at_most("answers without the key", leaked, 0),
        exactly("status with the key", status, 200),
        at_least("places that compare the key in constant time", compared, 1),
        over=f"{len(attempts)} requests to {len(routes)} routes",
    )


def _without_the_key(routes: dict[str, Any], port: int) -> Iterator[Attempt]:
    """The requests that are to be refused."""
    own = f"127.0.0.1:{port}"
    almost: list[dict[str, str]] = [
        {}, *({"authorization": key} for key in WRONG_KEYS), {"x-original-url": LIVENESS}, {"x-forwarded-for": "127.0.0.1"},
        {"x-rewrite-url": LIVENESS}, {"x-http-method-override": "GET"}, {"cookie": f"key={KEY}"}, {"api-key": KEY},
    ]  # fmt: skip
    hosts = ("localhost", f"localhost:{port}", "127.0.0.1", f"[::1]:{port}", "live", "127.0.0.1/live", "127.0.0.1:0", "")
    for route in routes:
        if route in OPEN:
            continue
        path = route.lstrip("/").replace("{model}", "default").replace("{model:path}", "default")
        for trick in PATH_TRICKS:
            for method in ("GET", "POST", "HEAD", "OPTIONS"):
                yield method, trick.format(path), {"host": own}
        for headers in almost:
            yield ("POST" if "post" in routes[route] else "GET"), route, {"host": own, **headers}
        for target in (f"http://{own}/{path}", f"http://{own}//{path}", f"http://localhost/live/../{path}", f"http://x/{path}"):
            yield "GET", target, {"host": own}
        for host in hosts:
            yield "GET", route, {"host": host}


@pytest.mark.promises("X4", "a web page elsewhere cannot drive the local server")
async def test_a_page_elsewhere_is_refused(server, make_server, expect):
    """Sends what a browser would for a page elsewhere: other origins, other names for this host, simple POSTs."""
    own = f"http://127.0.0.1:{server.port}"
    attempts = list(_from_elsewhere(server.port))
    accepted = 0
    for attempt in attempts:
        response = await _attempt(server.port, *attempt)
        allowed = response.headers.get("access-control-allow-origin")
        accepted += 200 <= response.status < 300 or (allowed is not None and allowed != own)
    same_origin = await server.client.post("/v1/completions", REQUEST, headers={"origin": own})
    try:
        async with make_server("--host", "0.0.0.0"):
            exit_code = 0.0
    except UserError as error:
        exit_code = float(str(error).partition("ended with ")[2].partition(":")[0] or "nan")
    expect(
        at_most("accepted", accepted, 0),
        exactly("status from its own page", same_origin.status, 200),
        exactly("exit code of a public bind without a key", exit_code, 2),
        over=f"{len(attempts)} combinations of Origin, Host, fetch metadata and simple bodies",
    )


def _from_elsewhere(port: int) -> Iterator[Attempt]:
    """The requests that are to be refused."""
    own, json_type = f"127.0.0.1:{port}", "application/json"
    origins = (
        "http://evil.example", "https://evil.example", "null", f"http://evil.example:{port}", "http://127.0.0.1", "file://",
        f"http://{own}.evil.example", f"https://{own}", f"http://localhost:{port + 1}", "http://127.0.0.1:1", "",
    )  # fmt: skip
    hosts = (
        "evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", f"169.254.169.254:{port}", "localhost.evil.example",
    )  # fmt: skip
    for origin in origins:
        for kind in (json_type, *SIMPLE_TYPES):
            yield "POST", "/v1/completions", {"host": own, "origin": origin, "content-type": kind}
        preflight = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
        yield "OPTIONS", "/v1/completions", {"host": own, "origin": origin, **preflight}
        if origin:
            yield "GET", "/v1/models", {"host": own, "origin": origin}
    for host in hosts:
        yield "POST", "/v1/completions", {"host": host, "content-type": json_type}
        yield "GET", "/v1/models", {"host": host}
        yield "GET", "/", {"host": host}
    for site in ("cross-site", "same-site"):
        for kind in (json_type, "text/plain"):
            yield "POST", "/v1/completions", {"host": own, "sec-fetch-site": site, "content-type": kind}
        yield "GET", "/v1/models", {"host": own, "sec-fetch-site": site, "sec-fetch-mode": "no-cors"}
    for kind in (*SIMPLE_TYPES[:2], "multipart/form-data; boundary=x", "text/plain; application/json"):
        yield "POST", "/v1/completions", {"host": own, "content-type": kind}  # a simple POST, its Origin lost on the way
