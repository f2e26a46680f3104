"""The server behind a proxy: below a path that the proxy takes off or leaves on (`--root-path`), its page, routes and guard;
and for clients whom the proxy names (`--client-header`).
"""

import asyncio
import contextlib
import http.client
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from stages.serve.api.routes import ROUTES
from stages.serve.flags import _header_name, _root_path
from tests.serve.browser import Visit
from tests.serve.line import Line
from tests.serve.tiny_server import OPEN, PATIENCE, TinyServer, ask, good, refused

ROOT, KEY = "/llm", "secret"


@contextlib.contextmanager
def listening(tiny: TinyServer, root_path: str, *keys: str, client_header: str = "") -> Iterator[int]:
    """A second port of the tiny server, below a path."""
    listen = tiny.listen(keys, root_path, client_header)
    http, port, serving = asyncio.run_coroutine_threadsafe(listen, tiny.loop).result(30)
    yield port
    http.should_exit = True
    asyncio.run_coroutine_threadsafe(asyncio.wait_for(serving, 30), tiny.loop).result(30)


@contextlib.contextmanager
def proxy(port: int, strips: bool) -> Iterator[int]:
    """A proxy that passes on what lies below ROOT, which it `strips` or not, and refuses everything
    else.
    """

    class Handler(BaseHTTPRequestHandler):
        def pass_on(self) -> None:
            if not f"{self.path}/".startswith(f"{ROOT}/"):
                self.send_error(404)
                return
            path = self.path.removeprefix(ROOT) or "/"
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            server = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
            server.request(self.command, path if strips else self.path, body, dict(self.headers))
            reply = server.getresponse()
            self.send_response(reply.status)
            for name, value in reply.getheaders():
                if name.lower() not in ("connection", "transfer-encoding"):
                    self.send_header(name, value)
            self.end_headers()
            while part := reply.read1(65536):
                self.wfile.write(part)
            server.close()

        do_GET = do_POST = pass_on

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.mark.parametrize(
    ("strips", "root_path", "address"),
    [
        (True, "", "llm/"),
        (True, "", "llm"),
        (True, ROOT, "llm/"),
        (False, ROOT, "llm/"),
        (False, ROOT, "llm"),
    ],
)
def test_the_page_works_behind_a_proxy_with_a_prefix(tiny_server, browser, strips, root_path, address):
    with listening(tiny_server, root_path) as port, proxy(port, strips) as proxied, Line(proxied) as line:
        line.address += address
        visit = Visit(browser, line)
        visit.ask("Hello.")
        assert "12 tokens" in visit.text(".figures")
        assert visit.text("#weights") == "✓ unchanged since start"
        loaded = browser.execute_script(
            "return performance.getEntriesByType('resource').map(({name}) => new URL(name).pathname)"
        )
        assert {f"{ROOT}/v1/chat/completions", f"{ROOT}/v1/models", f"{ROOT}/health"} <= {*loaded}
        visit.leave()


def test_a_route_has_one_meaning_with_and_without_the_prefix(tiny_server):
    with (
        listening(tiny_server, ROOT, KEY) as port,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300) as client,
    ):
        for prefix in (ROOT, ""):
            for route in ROUTES:
                path = prefix + route.path.replace("{model}", "tiny")
                is_open = route.path in OPEN
                assert (client.request(route.method, path).status_code == 401) != is_open, path
        client.headers["Authorization"] = f"Bearer {KEY}"
        for prefix in (ROOT, ""):
            assert good(client.post(f"{prefix}/v1/completions", json=ask()))["choices"]
            assert good(client.post(f"{prefix}/api/generate", content=b"{}"))["done_reason"] == "load"
            assert good(client.get(f"{prefix}/v1/models/tiny"))["id"] == "tiny"
            assert good(client.get(f"{prefix}/openapi.json"))["servers"] == [{"url": ROOT}]
            assert "<html" in client.get(prefix or "/").text
        for path in (f"{ROOT}{ROOT}/live", f"{ROOT}x/live", "/LLM/live", "/%6clm/live", f"{ROOT}//live"):
            assert client.get(path).status_code == 404, path
        evil = {"Origin": "http://evil.example"}
        assert refused(client.get(f"{ROOT}/v1/models", headers=evil), 403)["code"] == "bad_origin"
        cross_site = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
        assert client.get(f"{ROOT}/", headers=cross_site).status_code == 200  # a link to the page
    assert "servers" not in good(httpx.get(f"{tiny_server.url}/openapi.json", timeout=PATIENCE))


@pytest.mark.parametrize(("client_header", "clients"), [("x-session-id", 2), ("", 1)])
def test_clients_whom_the_proxy_names_are_told_apart_where_a_flag_says_so(
    tiny_server, monkeypatch, client_header, clients
):
    """Two sessions, the first of which asks twice, over one connection of a proxy while the server is full."""
    admission = tiny_server.state.admission
    monkeypatch.setattr(admission, "refusals", {})
    monkeypatch.setattr(admission, "reserved", admission.limit)
    with (
        listening(tiny_server, "", client_header=client_header) as port,
        tiny_server.client(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        for session in ("sea", "land", "sea"):
            headers = {"X-Session-Id": session}
            assert refused(client.post("/v1/completions", json=ask(), headers=headers), 429)
    groups = {sender.group for sender in admission.refusals}
    assert len(admission.refusals) == len(groups) == clients
    assert "sea" not in str(groups), "what names a client is not remembered"


def test_a_header_is_named_by_its_name():
    assert _header_name(" X-Session-Id") == "x-session-id"
    for text in ("", "X Session", "X-Session-Id: 3", "ü"):
        with pytest.raises(ValueError, match="the name of a header"):
            _header_name(text)


def test_a_root_path_is_a_path():
    assert [_root_path(text) for text in ("/llm", "/llm/", " /a/b-c_1.2~ ")] == [
        "/llm",
        "/llm",
        "/a/b-c_1.2~",
    ]
    for text in ("", "/", "llm", "//llm", "/l m", "/llm?x", "http://a.example/llm", "/l%6c", "/ü"):
        with pytest.raises(ValueError, match="wanted the path"):
            _root_path(text)
