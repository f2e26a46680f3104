"""What the routes serve: one model behind one engine, with all that stands around it."""

import asyncio
import dataclasses
import time
from typing import Any

from engine.storage.digest import digest
from stages.serve.admission import Door, draining
from stages.serve.api.body import Bodies
from stages.serve.api.reply_schema import Attestation, Health
from stages.serve.engine import Engine
from stages.serve.errors import Refused
from stages.serve.metrics import Metrics
from stages.serve.tokenize import Prompts

STUCK = 4.0  # seconds without a tick after which the engine counts as stuck; 503 is promised within 5


@dataclasses.dataclass
class Served:
    """`name`: what clients call the model. `ends`: ids that end a completion. `attested`: the weights' digest at load."""

    name: str
    engine: Engine
    params: Any
    prompts: Prompts
    ends: frozenset[int]
    door: Door
    metrics: Metrics
    attested: str
    price: float | None = None
    loaded_at: int = dataclasses.field(default_factory=lambda: int(time.time()))
    bodies: Bodies = dataclasses.field(default_factory=Bodies)
    _checking: "asyncio.Task[str] | None" = None

    @property
    def fingerprint(self) -> str:
        """What a reply names its weights by."""
        return f"fp_{self.attested[:16]}"

    def check_model(self, asked: str) -> None:
        """Raises Refused unless the name is that of the model, or `default`."""
        if asked not in (self.name, "default"):
            shown = asked if len(asked) <= 100 else asked[:100] + "..."
            raise Refused(
                404, f"There is no model {shown!r} here; {self.name!r} is served, also as 'default'.", param="model",
                code="model_not_found",
            )  # fmt: skip

    def check_ready(self) -> None:
        """Raises Refused while requests cannot be answered."""
        status = self.health().status
        if status in ("warming", "failed"):
            said = "The server is not ready yet." if status == "warming" else "The engine has failed."
            raise Refused(503, said, code=status, headers={"Retry-After": "2"})
        self.door.check()

    def check_open(self) -> None:
        """Raises Refused when the server is shutting down."""
        if self.door.draining:
            raise draining()

    def health(self) -> Health:
        """Whether requests are answered at this moment."""
        engine = self.engine
        since = time.monotonic() - engine.ticked
        if engine.failed:
            status = "failed"
        elif not engine.ready:
            status = "warming"
        elif since > STUCK:
            status = "stuck"
        else:
            status = "draining" if self.door.draining else "ok"
        return Health(status, *engine.state[:2], engine.compiled, round(since, 3))  # type: ignore[arg-type]

    async def attest(self) -> Attestation:
        """Hashes all weights anew, in a thread; those who ask meanwhile share the answer."""
        if self._checking is None or self._checking.done():
            self._checking = asyncio.create_task(asyncio.to_thread(digest, self.params))
        now = await asyncio.shield(self._checking)
        return Attestation(
            digest=now, digest_at_load=self.attested, unchanged=now == self.attested, loaded_at=self.loaded_at,
            checked_at=int(time.time()),
        )  # fmt: skip
