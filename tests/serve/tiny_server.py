"""A server of a tiny random model, in threads of this process: uvicorn on a free port of loopback, and the real engine."""

import asyncio
import functools
import json
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import httpx

from tests.text.chat_models import chat_tokenizer
from tests.tiny import lively_params, tiny_config

PATIENCE = 300.0  # seconds that a test waits for a server, on a busy machine too
SLOTS, QUEUE, CAPACITY = 3, 4, 150
SCRIPTS = ("drawing.js", "export.js", "temml.min.js", "highlight.min.js")  # that the page may fetch
OPEN = ("/", "/live", "/health", *(f"/page/{name}" for name in SCRIPTS))  # what needs no key


@functools.cache
def tiny_model(context: int = CAPACITY) -> Any:
    """As `load_model` gives it: ChatML's control tokens, 334 tokens in all."""
    from engine.storage.model_loader import LoadedModel

    tokenizer = chat_tokenizer()
    cfg = tiny_config(vocab=tokenizer.vocab, context=context)
    return LoadedModel("tiny", cfg, lively_params(cfg), tokenizer, (tokenizer.eos_id,), Path("tiny"))


class TinyServer:
    """Listens while its block lasts. `state` is what its routes share, `url` where they are."""

    def __init__(
        self,
        *,
        keys: tuple[str, ...] = (),
        warm: bool = True,
        origins: tuple[str, ...] = (),
        log: str = "off",
        context: int = CAPACITY,
        adapter_folder: Path | None = None,
        documents: Any = None,
        open_metrics: bool = False,
    ) -> None:
        from engine.inference import decode
        from engine.inference.config import EngineConfig
        from engine.inference.engine import Engine
        from engine.inference.request import SamplingParams
        from engine.storage.adapter import base_digest
        from engine.storage.digest import digest
        from engine.text.chat_tokenizer import ChatTokenizer
        from stages.serve.state import ServerState

        self.keys, self._warm, self._origins, self._log = keys, warm, frozenset(origins), log
        self._open_metrics = open_metrics
        self.model = model = tiny_model(context)
        params = decode.prepare_params(model.cfg, model.params)
        config = EngineConfig(
            SLOTS,
            context,
            kv_dtype="float32",
            prefix_cache_bytes=10**7,
            chunk=16,
            tail=8,
            embeds=True,
            adapters=2 * bool(adapter_folder),
            adapter_rank=3,
        )
        self.engine = engine = Engine(model.cfg, params, config)
        chat = ChatTokenizer(model.tokenizer)
        base = base_digest(model.params) if adapter_folder else ""
        sampling, sha256 = SamplingParams(), digest(params)
        self.state = ServerState(
            ["tiny"], model, sampling, engine, sha256, chat, QUEUE, 0.25, base, adapter_folder, documents
        )
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(PATIENCE)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self._thread.join(30)
        self.state.engine.stop()
        self.state.tokenizer.close()

    @property
    def load(self) -> tuple[int, int, int]:
        """Requests that run, that wait, and places that are reserved."""
        return self.engine.running, self.state.engine.waiting, self.state.admission.reserved

    def client(self, **options: Any) -> "Client":
        return Client(**{"base_url": self.url, "timeout": PATIENCE, "verify": False, **options})

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), PATIENCE)

    def raw(self, *lines: str, body: bytes = b"") -> tuple[int, bytes]:
        """The status and all of the reply to a request written by hand."""
        with self.connect() as connection:
            connection.sendall("\r\n".join([*lines, "Connection: close", "", ""]).encode("latin-1") + body)
            reply = read_all(connection)
        return int(reply.split()[1]), reply

    async def listen(
        self, keys: Sequence[str] = (), root_path: str = "", client_header: str = ""
    ) -> tuple[Any, int, "asyncio.Task[None]"]:
        """Opens a port to the state, which needs one of the keys: uvicorn's server, the port, and
        the task to wait for.
        """
        from stages.serve import server
        from stages.serve.api.app import Api
        from stages.serve.api.guard import LOCAL_HOSTS, Guard

        api, count = Api(self.state, "1.2.3", root_path, client_header), self.state.metrics.count_response
        app = Guard(api, keys, LOCAL_HOSTS, self._origins, self._log, count, root_path, self._open_metrics)
        bound = server.bind("127.0.0.1", 0)
        server.listen(bound)
        http = server.make_server(app)
        return http, bound.getsockname()[1], asyncio.create_task(http.serve([bound]))

    async def _run(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.server, self.port, serving = await self.listen(self.keys)
        self.app = self.server.config.app
        self.url = f"http://127.0.0.1:{self.port}"
        if self._warm:
            ready = asyncio.Event()
            self.state.engine.start(ready.set)
            await ready.wait()
            assert self.state.engine.error is None, self.state.engine.error
        self._started.set()
        await serving


class Client(httpx.Client):
    """Sends what `ask` and `say` make, and bytes as JSON."""

    def complete(self, *arguments: Any, **more: Any) -> httpx.Response:
        return self.post("/v1/completions", json=ask(*arguments, **more))

    def chat(self, *arguments: Any, **more: Any) -> httpx.Response:
        return self.post("/v1/chat/completions", json=say(*arguments, **more))

    def tokens(self, prompt: str | None = None, **more: Any) -> list[int]:
        return good(self.post("/tokenize", json=({"prompt": prompt} if prompt else {}) | more))["tokens"]

    def post_bytes(self, path: str, content: Any, **headers: str) -> httpx.Response:
        return self.post(path, content=content, headers={"Content-Type": "application/json"} | headers)


def ask(text: str = "Hello there", most: int = 5, **more: Any) -> dict[str, Any]:
    """The body of a completion."""
    return {"model": "tiny", "prompt": text, "max_tokens": most, "temperature": 0, **more}


def say(text: str = "Hello there", most: int = 5, **more: Any) -> dict[str, Any]:
    """The body of a chat completion."""
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": most,
        "temperature": 0,
        **more,
    }


def good(reply: httpx.Response) -> Any:
    assert reply.status_code == 200, reply.text
    return reply.json()


def refused(reply: httpx.Response, status: int = 400) -> dict[str, Any]:
    """The error object of a reply of that status. Ollama's clients read a sentence."""
    assert reply.status_code == status, reply.text
    problem = reply.json()["error"]
    if reply.url.path.startswith("/api/"):
        return {"message": problem}
    assert set(problem) == {"message", "type", "param", "code"}
    assert problem["message"]
    return problem


def events(text: str) -> list[Any]:
    """Returns the data of server-sent events, without the `[DONE]` that must end them."""
    parts = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
    assert parts.pop() == "[DONE]"
    return [json.loads(part) for part in parts]


def post_head(path: str, length: int, **headers: str) -> bytes:
    """The head of a POST with a JSON body of that length."""
    headers = {
        "Host": "localhost",
        "Content-Type": "application/json",
        "Content-Length": str(length),
    } | headers
    return "\r\n".join(
        [f"POST {path} HTTP/1.1", *(": ".join(each) for each in headers.items()), "", ""]
    ).encode()


def read_all(connection: socket.socket) -> bytes:
    """Receives until the server hangs up."""
    content = b""
    while part := connection.recv(65536):
        content += part
    return content


def until(true: Callable[[], Any], seconds: float = PATIENCE) -> bool:
    """Waits until it is true, and says whether it came to be. The limit is for what never comes,
    not for what is slow.
    """
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.002)
    return bool(true())
