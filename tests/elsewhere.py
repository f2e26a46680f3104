"""Requests that a server must refuse, as (method, target, headers): without its key, and from a web page elsewhere."""

import base64
from collections.abc import Iterable, Iterator

Attempt = tuple[str, str, dict[str, str]]
KEY = "sk-tests-3b1f0a"
OPEN = ("/live", "/health")  # for whoever starts and stops servers
# Ways to write a path so that it might be taken for liveness, or for none of the routes that need a key.
SPELLINGS = (
    "/{}", "//{}", "///{}", "/{}/", "/{}//", "/.{}", "/./{}", "/x/../{}", "/live/../{}", "/live/%2e%2e/{}", "/live;/../{}",
    "/live%2f..%2f{}", "/%2e/{}", "/%2e%2e/{}", "/{}%20", "/{}%00", "/{}%2f", "/{};a=b", "/{}?live", "/{}?key=" + KEY, "/{}#",
    "live/{}", "/%6cive/{}", "\\{}", "http://localhost/{}", "http://localhost//{}", "http://localhost/live/../{}", "http://x/{}",
)  # fmt: skip
METHODS = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "CONNECT", "BREW")
_basic = lambda text: "Basic " + base64.b64encode(text.encode()).decode()
WRONG_KEYS = (
    "", "Bearer", "Bearer ", "Bearer wrong", f"Bearer {KEY[:-1]}", f"Bearer {KEY}x", f"Bearer {KEY.upper()}", "Bearer é", KEY,
    f"Bearer {KEY},", f"Bearer\t{KEY}", f"Bearer {KEY[::-1]}", f"Digest {KEY}", f"Basic {KEY}", "Basic !!!", _basic(KEY),
    _basic(f"{KEY}:"), _basic("x:wrong"),
)  # fmt: skip
JSON = "application/json"
# What a page may send without a preflight.
SIMPLE_TYPES = (
    "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", "text/plain; application/json",
)  # fmt: skip


def without_the_key(routes: Iterable[tuple[str, str]], port: int) -> Iterator[Attempt]:
    """Every route, a method and a path, written in every way, without the key or with almost the key."""
    own = {"host": f"127.0.0.1:{port}"}
    almost: list[dict[str, str]] = [
        *({"authorization": key} for key in WRONG_KEYS), {"x-original-url": "/live"}, {"x-forwarded-for": "127.0.0.1"},
        {"x-rewrite-url": "/live"}, {"x-http-method-override": "GET"}, {"cookie": f"key={KEY}"}, {"api-key": KEY},
    ]  # fmt: skip
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
    """What a browser would send for a page of another origin, under another name for this host, or as a simple POST."""
    own, chat, models = f"127.0.0.1:{port}", "/v1/chat/completions", "/v1/models"
    origins = (
        "http://evil.example", "https://evil.example", f"http://evil.example:{port}", "null", "http://127.0.0.1", "file://", "",
        "http://127.0.0.1:1", f"http://localhost:{port + 1}", f"https://{own}", f"http://{own}.evil.example", f"http://evil@{own}",
        f"http://{own}/",
    )  # fmt: skip
    for origin in origins:
        for kind in (JSON, *SIMPLE_TYPES):
            yield "POST", chat, {"host": own, "origin": origin, "content-type": kind}
        preflight = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
        yield "OPTIONS", chat, {"host": own, "origin": origin, **preflight}
        yield "GET", models, {"host": own, "origin": origin}
    hosts = (  # a page whose name was pointed at 127.0.0.1 after it was loaded
        "evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", f"localhost.evil.example:{port}", "169.254.169.254",
        "0.0.0.0", "[::2]", "127.0.0.1@evil.example", "evil.example#127.0.0.1", "127.0.0.1:80:80", "localhost:port",
        "127.0.0.1 evil", "",
    )  # fmt: skip
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
