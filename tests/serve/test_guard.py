"""The guard: with a key set only the page, /live and /health are open (X3), and no page elsewhere drives the server (X4)."""

import httpx
import pytest

from stages.serve.api import guard
from stages.serve.api.routes import ROUTES
from tests.serve.tiny_server import OPEN, PATIENCE, TinyServer, ask, good, read_all, refused

KEYS = ("sk-first", "second-kéy-…")
APP = "https://app.example"


@pytest.fixture(scope="module")
def locked():
    """A server with two keys, whose engine is not even warm: nobody gets that far."""
    with TinyServer(keys=KEYS, warm=False) as server:
        yield server


@pytest.fixture(scope="module")
def listed():
    """A server with these keys that pages of APP may use."""
    with TinyServer(keys=KEYS, origins=(APP,)) as server:
        yield server


def every_route() -> list[tuple[str, str]]:
    return [
        (route.method, route.path.replace("{model}", "tiny")) for route in ROUTES if route.path not in OPEN
    ]


def send(server: TinyServer, method: str, target: str, headers: dict[str, str]) -> tuple[int, bytes]:
    """The status and the reply to a request that is sent as it is written, with a prompt as its
    body where it is a POST.
    """
    body = b'{"prompt":"a"}' if method == "POST" else b""
    lines = [f"{name}: {value}" for name, value in headers.items()]
    return server.raw(f"{method} {target} HTTP/1.1", *lines, f"Content-Length: {len(body)}", body=body)


@pytest.mark.parametrize("key", KEYS)
def test_each_key_opens_all(locked, key):
    for name, value in (
        ("authorization", f"Bearer {key}"),
        ("authorization", f"bearer  {key}"),
        ("x-api-key", key),
    ):
        for method, path in every_route():
            reply = httpx.request(
                method, locked.url + path, headers={name.encode(): value.encode()}, timeout=PATIENCE
            )
            empty = (
                400 if path.startswith("/api/") else 415
            )  # without a body, whose type only Ollama's routes take for granted
            assert reply.status_code in (200, empty, 503, 404 if method == "DELETE" else 200), (
                method,
                path,
                reply.text,
            )


def test_the_page_live_and_health_need_no_key(locked):
    assert "<html" in httpx.get(f"{locked.url}/", timeout=PATIENCE).text
    assert httpx.get(f"{locked.url}/live", timeout=PATIENCE).json() == {"status": "ok"}
    assert httpx.get(f"{locked.url}/health", timeout=PATIENCE).json()["status"] == "warming"
    for path in OPEN:
        assert (
            httpx.get(locked.url + path, headers={"Host": "evil.example"}, timeout=PATIENCE).status_code
            == 403
        )


@pytest.mark.parametrize("is_open", [True, False])
def test_metrics_need_no_key_where_a_flag_says_so(is_open):
    with TinyServer(keys=KEYS, warm=False, open_metrics=is_open) as server:
        status = 200 if is_open else 401
        assert httpx.get(f"{server.url}/metrics", timeout=PATIENCE).status_code == status
        assert httpx.get(f"{server.url}/v1/models", timeout=PATIENCE).status_code == 401


def test_a_wrong_key_is_asked_for_again_after_all_were_compared_whole(locked, monkeypatch):
    """By hmac.compare_digest, whether or not one has matched."""
    compared: list[tuple[bytes, bytes]] = []
    real = guard.hmac.compare_digest
    monkeypatch.setattr(guard.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    for key in (*KEYS, "wrong"):
        httpx.get(
            locked.url + "/v1/models", headers={b"authorization": f"Bearer {key}".encode()}, timeout=PATIENCE
        )
    httpx.get(locked.url + "/v1/models", headers={"x-api-key": "wrong"}, timeout=PATIENCE)
    assert [len(side) for pair in compared for side in pair] == [32] * 16
    headers = {"host": "localhost", "authorization": "Bearer wrong"}
    status, reply = send(locked, "GET", "/v1/models", headers)
    assert (status, b"invalid_api_key" in reply, b"\r\nwww-authenticate: Bearer\r\n" in reply) == (
        401,
        True,
        True,
    ), reply
    right = f"Bearer {KEYS[0]}"
    for wrong in ({"x-api-key": ""}, {"x-api-key": KEYS[0], "authorization": "Bearer wrong"}):
        assert send(locked, "GET", "/v1/models", {"host": "localhost", **wrong})[0] == 401
    assert (
        send(
            locked, "GET", "/v1/models", {"host": "localhost", "authorization": right, "Authorization": right}
        )[0]
        == 401
    )


def test_pages_of_a_listed_origin(listed):
    """The preflight needs no key, and what follows it does; no other origin is let in beside it."""
    preflight = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,x-stainless-os",
    }
    asked = httpx.options(f"{listed.url}/v1/chat/completions", headers={"Origin": APP} | preflight)
    assert (asked.status_code, asked.content) == (200, b"OK")
    assert asked.headers["access-control-allow-headers"] == "authorization,x-stainless-os"
    assert {*asked.headers["access-control-allow-methods"].split(", ")} >= {"GET", "POST", "DELETE"}
    key, url = {"Authorization": f"Bearer {KEYS[0]}"}, f"{listed.url}/v1/completions"
    replies = [
        httpx.post(
            url, headers={"Origin": APP, **key, "Sec-Fetch-Site": "cross-site"}, json=ask(), timeout=PATIENCE
        ),
        httpx.post(url, headers={"Origin": APP}, json=ask(), timeout=PATIENCE),
        httpx.get(f"{url}/no", headers={"Origin": APP, **key}, timeout=PATIENCE),
        asked,
    ]
    assert [reply.status_code for reply in replies] == [200, 401, 404, 200]
    for reply in replies:
        assert reply.headers["access-control-allow-origin"] == APP
        assert "Origin" in reply.headers["vary"]
    for reply in replies[:-1]:
        assert "x-request-id" in reply.headers["access-control-expose-headers"]
    for origin in ("https://evil.example", "http://app.example", f"{APP}.evil.example", "null"):
        refusals = (
            httpx.options(url, headers={"Origin": origin} | preflight),
            httpx.post(url, headers={"Origin": origin} | key, timeout=PATIENCE),
        )
        for reply in refusals:
            assert refused(reply, 403)["code"] == "bad_origin"
            assert "access-control-allow-origin" not in reply.headers
    elsewhere = httpx.options(url, headers={"Origin": APP, "Host": "evil.example"} | preflight)
    assert refused(elsewhere, 403)["code"] == "bad_host"
    own = httpx.get(f"{listed.url}/v1/models", headers={"Origin": listed.url, **key}, timeout=PATIENCE)
    assert (own.status_code, own.headers.get("access-control-allow-origin")) == (200, None)


def test_the_prefix_cache_is_not_shared_between_keys_and_changes_no_bit(listed):
    text = "The assistant answers what the user asks; the system says how. 1234 "
    replies = []
    for key in (*KEYS, *KEYS[::-1]):
        with listed.client(headers={b"authorization": f"Bearer {key}".encode()}) as client:
            replies.append(good(client.complete(text, logprobs=1)))
    cached = [reply["usage"]["prompt_tokens_details"]["cached_tokens"] > 0 for reply in replies]
    assert cached == [False, False, True, True]
    assert all(reply["choices"] == replies[0]["choices"] for reply in replies)


def test_a_body_with_two_lengths_is_refused_and_its_connection_closed(tiny_server):
    """A proxy that goes by the other one would take the rest for the next request."""
    smuggled = b"0\r\n\r\nGET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    head = "POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for first, second in (
        ("Transfer-Encoding: chunked", "Content-Length: 5"),
        ("content-length: 5", "transfer-encoding: chunked"),
    ):
        with tiny_server.connect() as connection:
            connection.sendall(f"{head}{first}\r\n{second}\r\n\r\n".encode() + smuggled)
            reply = read_all(connection)
        assert reply.count(b"HTTP/1.1 ") == 1
        assert reply.startswith(b"HTTP/1.1 400 ")
        assert b"not both" in reply


def test_own_hosts(tiny_server):
    for host in (
        "localhost",
        "LOCALHOST:1234",
        "127.0.0.1",
        f"127.0.0.1:{tiny_server.port}",
        "[::1]:8000",
        "localhost.",
    ):
        assert tiny_server.raw("GET /v1/models HTTP/1.1", f"Host: {host}")[0] == 200
    assert tiny_server.raw("GET /v1/models HTTP/1.0")[0] == 400  # none at all
    assert tiny_server.raw("GET /v1/models HTTP/1.1", "Host: localhost", "Host: localhost")[0] == 400


def test_its_own_page_may_use_it(tiny_server):
    good(
        httpx.post(
            f"{tiny_server.url}/v1/completions",
            headers={"Origin": tiny_server.url},
            json=ask(),
            timeout=PATIENCE,
        )
    )
    for path, site, mode in (
        ("/", "cross-site", "navigate"),  # a link to the page
        ("/", "same-site", "navigate"),
        ("/", "none", "navigate"),
        ("/v1/models", "same-origin", "cors"),
    ):
        assert (
            send(
                tiny_server,
                "GET",
                path,
                {"host": "localhost", "sec-fetch-site": site, "sec-fetch-mode": mode},
            )[0]
            == 200
        )


def test_every_reply_has_security_headers(tiny_server):
    page = httpx.get(tiny_server.url, timeout=PATIENCE)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "<script" in page.text
    for path in ("/", "/nowhere", "/v1/models"):
        headers = httpx.get(tiny_server.url + path, timeout=PATIENCE).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-request-id"].startswith("req_")
        assert headers["x-frame-options"] == "DENY"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "server" not in headers
