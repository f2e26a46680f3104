"""X3 and X4: every route but two needs the key that is set, and a web page elsewhere cannot drive the local server."""

import json

import pytest
from elsewhere import KEY, from_elsewhere, without_the_key
from figures import at_most, exactly

from bench.serving.client import Client, Response, completion_request
from engine.errors import UserError

pytestmark = pytest.mark.anyio

LIVENESS_BODY = b'{"status":"ok"}'  # all that it says
REQUEST = completion_request("a", 1, stream=False)


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
        paths = [(each.upper(), path.replace("{model}", "default")) for path, methods in routes.items() for each in methods]
        attempts = list(without_the_key(paths, server.port))
        responses = [await _attempt(server.port, *attempt) for attempt in attempts]
        status = (await server.client.post("/v1/completions", REQUEST)).status
    leaked = sum(100 <= response.status < 400 and response.body != LIVENESS_BODY for response in responses)
    expect(
        at_most("answers without the key", leaked, 0),
        exactly("status with the key", status, 200),
        over=f"{len(attempts)} requests to {len(routes)} routes",
    )


@pytest.mark.promises("X4", "a web page elsewhere cannot drive the local server")
async def test_a_page_elsewhere_is_refused(server, make_server, expect):
    """Sends what a browser would for a page elsewhere: other origins, other names for this host, simple POSTs."""
    own = f"http://127.0.0.1:{server.port}"
    attempts = list(from_elsewhere(server.port))
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
