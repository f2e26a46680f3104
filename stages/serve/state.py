"""ServerState: the engine of one model, and everything else that the routes share."""

import asyncio
import time
from collections.abc import Callable
from typing import Literal

from engine.inference.slots import Slots
from engine.storage.digest import digest
from engine.storage.loaded_model import LoadedModel
from engine.text.chat import Chat
from stages.serve.admission import Admission
from stages.serve.engine import Engine
from stages.serve.errors import ApiError
from stages.serve.metrics import Metrics
from stages.serve.tokenize import TokenizerPool

STUCK = 4.0  # seconds without a tick after which the engine counts as stuck; 503 is promised within 5
Status = Literal["ok", "warming", "stuck", "failed", "draining"]


class ServerState:
    """`name`: by which clients ask for the model. `digest`: of the weights at load. `make_chat` makes a chat beside `chat`,
    in another process. `queue`: completions that may wait. `price`: dollars an hour."""

    def __init__(
        self, name: str, model: LoadedModel, slots: Slots, digest: str, chat: Chat, make_chat: Callable[[], Chat], queue: int,
        price: float | None,
    ) -> None:  # fmt: skip
        self.name, self.digest, self.price, self.loaded_at = name, digest, price, int(time.time())
        self.engine, self.admission = Engine(slots), Admission(slots.slots, queue)
        self.tokenizer = TokenizerPool(model.tokenizer, chat, make_chat, slots.capacity)
        self.stop_token_ids = frozenset(model.ends)
        self.metrics = Metrics(name, self.engine)
        self._hashing: asyncio.Task[str] | None = None

    def check_model(self, name: str) -> None:
        """Raises ApiError unless the name is the model's or `default`."""
        if name not in (self.name, "default"):
            short = name if len(name) <= 100 else name[:100] + "..."
            message = f"There is no model {short!r} here; {self.name!r} is served, also as 'default'."
            raise ApiError(404, message, param="model", code="model_not_found")

    def check_ready(self) -> None:
        """Raises ApiError while no completion can be admitted."""
        messages = {"warming": "The server is not ready yet.", "failed": "The engine has failed."}
        if message := messages.get(status := self.status):
            raise ApiError(503, message, code=status, headers={"Retry-After": "2"})
        self.admission.check()

    @property
    def status(self) -> Status:
        """Whether requests are answered now, or why not."""
        if self.engine.failed or not self.engine.ready:
            return "failed" if self.engine.failed else "warming"
        if self.engine.idle_seconds > STUCK:
            return "stuck"
        return "draining" if self.admission.draining else "ok"

    async def hash_weights(self) -> str:
        """Returns a new digest of all weights, made in a thread; requests that come meanwhile share it."""
        if self._hashing is None or self._hashing.done():
            self._hashing = asyncio.create_task(asyncio.to_thread(digest, self.engine.slots.params))
        return await asyncio.shield(self._hashing)
