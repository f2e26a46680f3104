"""ServerState: everything that the routes share, around one model behind one engine."""

import asyncio
import dataclasses
import time
from typing import Literal

from engine.storage.digest import digest
from stages.serve.admission import Admission
from stages.serve.engine import Engine
from stages.serve.errors import ApiError
from stages.serve.metrics import Metrics
from stages.serve.tokenize import TokenizerPool

STUCK = 4.0  # seconds without a tick after which the engine counts as stuck; 503 is promised within 5
Status = Literal["ok", "warming", "stuck", "failed", "draining"]


@dataclasses.dataclass
class ServerState:
    """`name`: what clients call the model. `stop_token_ids` end a completion. `digest`: of the weights at load."""

    name: str
    engine: Engine
    tokenizer: TokenizerPool
    stop_token_ids: frozenset[int]
    admission: Admission
    metrics: Metrics
    digest: str
    price: float | None = None
    loaded_at: int = dataclasses.field(default_factory=lambda: int(time.time()))
    _hashing: "asyncio.Task[str] | None" = None

    def check_model(self, name: str) -> None:
        """Raises ApiError unless the name is that of the model, or `default`."""
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
        """Whether requests are answered at this moment, or why not."""
        if self.engine.failed or not self.engine.ready:
            return "failed" if self.engine.failed else "warming"
        if self.engine.idle_seconds > STUCK:
            return "stuck"
        return "draining" if self.admission.draining else "ok"

    async def hash_weights(self) -> str:
        """Hashes all weights anew, in a thread; requests that come meanwhile share the result."""
        if self._hashing is None or self._hashing.done():
            self._hashing = asyncio.create_task(asyncio.to_thread(digest, self.engine.slots.params))
        return await asyncio.shield(self._hashing)
