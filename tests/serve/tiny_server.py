"""A server of a tiny random model, in threads of this process: uvicorn on a free port of loopback, and the real engine."""

import asyncio
import dataclasses
import functools
import threading
from pathlib import Path
from typing import Any

import httpx
from chat_models import chat_tokenizer
from tiny import lively_params, tiny_config

SLOTS, QUEUE, CAPACITY, CHUNK, TAIL = 3, 4, 150, 16, 8


@functools.cache
def tiny_model() -> Any:
    """As `load_model` gives it: ChatML's control tokens, 334 tokens in all."""
    from engine.storage.loaded_model import LoadedModel

    tokenizer = chat_tokenizer()
    cfg = tiny_config(vocab=tokenizer.vocab)
    return LoadedModel("tiny", cfg, lively_params(cfg), tokenizer, (tokenizer.end,), Path("tiny"))


def loaded(**changes: Any) -> Any:
    """What `stages.serve.startup.load` would make of it; `changes` are Slots' options."""
    from engine.inference import decode
    from engine.inference.slots import Slots
    from engine.storage.digest import digest
    from engine.text.template import FIXED_DAY
    from stages.cli.compile_counter import CompileCounter
    from stages.serve.startup import Loaded, make_chat

    model = tiny_model()
    params = decode.for_inference(model.cfg, model.params)
    options = {
        "slots": SLOTS,
        "capacity": CAPACITY,
        "kv_dtype": "float32",
        "prefix_cache_bytes": 10**7,
        "chunk": CHUNK,
        "tail": TAIL,
    }
    slots = Slots(model.cfg, params, **{**options, **changes})
    return Loaded(
        model, "tiny", params, slots, make_chat(model, None, FIXED_DAY), None, FIXED_DAY, CompileCounter(), digest(params)
    )


class TinyServer:
    """Listens from `start` to `stop`. `served` is what its routes serve, `url` where they are."""

    def __init__(self, *, keys: tuple[str, ...] = (), warm: bool = True, queue: int = QUEUE, **changes: Any) -> None:
        self.keys, self.queue = keys, queue
        self.made = loaded(**changes)
        self._warm = warm
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def start(self) -> "TinyServer":
        self._thread.start()
        assert self._started.wait(120)
        return self

    def stop(self) -> None:
        self.server.should_exit = True
        self._thread.join(30)
        self.served.engine.stop()
        self.served.prompts.close()

    def client(self, **options: Any) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.keys[0]}"} if self.keys else {}
        return httpx.Client(**{"base_url": self.url, "timeout": 60, "headers": headers, **options})

    async def _run(self) -> None:
        from stages.serve import server as listen
        from stages.serve.api import guard
        from stages.serve.api.app import make_app
        from stages.serve.page import page

        self.loop = asyncio.get_running_loop()
        self.served = self.made.served(Given(queue=self.queue, slots=self.made.slots.slots), self.loop.call_soon_threadsafe)
        self.app = app = make_app(self.served, page(), keys=self.keys, hosts=guard.LOCAL, version="1.2.3")
        bound = listen.bind("127.0.0.1", 0)
        self.port = bound.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        listen.listen(bound)
        self.server = listen.make_server(app)
        serving = asyncio.create_task(self.server.serve([bound]))
        if self._warm:
            ready = asyncio.Event()
            self.served.engine.start(ready.set)
            await ready.wait()
            assert self.served.engine.failed is None, self.served.engine.failed
        self._started.set()
        await serving


@dataclasses.dataclass
class Given:
    """The flags that matter once a model is loaded."""

    slots: int
    queue: int
    price: float | None = 0.25


def ask(text: str = "Hello there", most: int = 5, **more: Any) -> dict[str, Any]:
    """The body of a completion."""
    return {"model": "tiny", "prompt": text, "max_tokens": most, "temperature": 0, **more}


def say(text: str = "Hello there", most: int = 5, **more: Any) -> dict[str, Any]:
    """The body of a chat completion."""
    return {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": most, "temperature": 0, **more}
