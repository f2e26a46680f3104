"""ServerState: the engine of one model and everything else that the routes share."""

import asyncio
import hashlib
import importlib.metadata
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from engine.counting.hardware import machine_identity
from engine.counting.request_flops import training_step_flops
from engine.inference.engine import Engine
from engine.inference.request import Adapter, SamplingParams
from engine.model.native.library import native_digest
from engine.storage.digest import digest
from engine.storage.model_loader import LoadedModel
from engine.text.chat_tokenizer import ChatTokenizer
from engine.text.documents import Documents
from stages.serve.adapters import AdapterTable
from stages.serve.admission import Admission
from stages.serve.engine_thread import EngineThread
from stages.serve.errors import ApiError
from stages.serve.metrics import ServerMetrics
from stages.serve.tokenizer_pool import TokenizerPool

# Those beside JAX, whose version `machine_identity` has.
LIBRARIES = ("thrice", "jaxlib", "llguidance", "numpy", "tokenizers", "jinja2")
MAX_NAMED = 20  # models, in an error
Status = Literal["ok", "warming", "stuck", "failed", "draining"]


class ServedModel(NamedTuple):
    """A model that a request may name: the base, or it with an adapter; its names are as in replies."""

    name: str
    fingerprint: str
    adapter: Adapter | None = None


class ServerState:
    """The engine, admission, tokenizer and metrics of one model.

    `names`: by which clients ask for the model; replies have the first. `sampling`: of a request
    that leaves its fields out. `digest`: of the weights at load. `queue`: requests that may wait.
    `price`: of the machine, dollars an hour. `training_flops`: that the run took to train, None where
    no run says it. `base_digest`, `adapter_folder`, `adapters`: as of
    AdapterTable.
    """

    def __init__(
        self,
        names: Sequence[str],
        model: LoadedModel,
        sampling: SamplingParams,
        engine: Engine,
        digest: str,
        chat: ChatTokenizer,
        queue: int,
        price: float | None,
        base_digest: str = "",
        adapter_folder: Path | None = None,
        documents: Documents | None = None,
        adapters: Mapping[str, Any] | None = None,
        training_flops: int | None = None,
    ) -> None:
        self.name = names[0]
        self.names = names
        self.digest = digest
        self.price = price
        self.step_flops = training_step_flops(engine.cfg)
        self.training_flops = training_flops
        self.loaded_at = int(time.time())
        self.engine = EngineThread(engine)
        self.admission = Admission(engine.config.slots, queue)
        self.tokenizer = TokenizerPool(chat, engine.capacity, engine.cfg.vocab, model.eos_ids, documents)
        self.sampling = sampling
        self.stop_token_ids = frozenset(model.eos_ids)
        self.adapters = AdapterTable(self.engine, base_digest, adapter_folder, adapters or {})
        self.metrics = ServerMetrics(self.name, self.engine, self.adapters.adapters, training_flops)
        self._hashing: asyncio.Task[str] | None = None
        # All that is in every fingerprint of how text becomes tokens, and tokens a text.
        self._text_facts: dict[str, Any] = {
            "tokenizer": model.tokenizer.digest,
            "template": chat.source,
            "now": chat.now if "strftime_now" in chat.source else "",
            "eos": sorted(model.eos_ids),
            "sampling": repr(sampling),
            "documents": documents and documents.digest,
        }
        self._fingerprints: dict[str, str] = {}  # by the adapter's digest, empty for the base's

    def fingerprint(self, adapter: Adapter | None) -> str:
        """Returns the system_fingerprint of completions with an adapter, or of the base's.

        It is computed once.
        """
        key = adapter.digest if adapter else ""
        if key not in self._fingerprints:
            facts = dict(self._text_facts)
            if adapter:
                facts["adapter"] = adapter.digest
            self._fingerprints[key] = system_fingerprint(self.digest, self.engine.engine, **facts)
        return self._fingerprints[key]

    @property
    def served_names(self) -> list[str]:
        """All names that a request may give, but for `default`."""
        return [*self.names, *self.adapters.adapters]

    def find_model(self, name: str) -> ServedModel:
        """Returns the model of this name, or `default`. Ollama's clients may add `:latest`.

        Raises ApiError for any other.
        """
        for plain in (name, name.removesuffix(":latest")):
            adapter = self.adapters.adapters.get(plain)
            if adapter:
                return ServedModel(plain, self.fingerprint(adapter), adapter)
            if plain in (*self.names, "default"):
                return ServedModel(self.name, self.fingerprint(None))
        names = ", ".join(map(repr, self.served_names[:MAX_NAMED]))
        served = f"{names} is served, also as 'default': ask for that, or see --name"
        message = f"There is no model {name[:100]!r} here; {served}."
        raise ApiError(404, message, param="model", code="model_not_found")

    def adapter_of(self, model: ServedModel) -> Adapter | None:
        """Returns a model's adapter, for requests that are submitted at once.

        Raises ApiError if it has been removed since.
        """
        if model.adapter and self.adapters.adapters.get(model.name) != model.adapter:
            raise ApiError(
                404, f"The adapter {model.name!r} has been removed.", param="model", code="model_not_found"
            )
        return model.adapter

    def check_ready(self) -> None:
        """Raises ApiError where a request cannot be answered, but for want of a place."""
        messages = {"warming": "The server is not ready yet.", "failed": "The engine has failed."}
        status = self.status
        message = messages.get(status)
        if message:
            raise ApiError(503, message, code=status, headers={"Retry-After": "2"})
        self.admission.check_open()

    @property
    def status(self) -> Status:
        """Whether requests are answered, or why not: ok only if nothing else is the case."""
        if self.engine.error:
            return "failed"
        if not self.engine.ready:
            return "warming"
        wait = self.engine.wait
        if wait.seconds > wait.stuck_after:
            return "stuck"
        if self.admission.draining:
            return "draining"
        return "ok"

    async def hash_weights(self) -> str:
        """Returns a new digest of all weights; requests that come meanwhile share it."""
        if self._hashing is None or self._hashing.done():
            self._hashing = asyncio.create_task(asyncio.to_thread(digest, self.engine.engine.params))
        return await asyncio.shield(self._hashing)


def system_fingerprint(digest: str, engine: Engine, **text: Any) -> str:
    """Returns one name for all that can change a completion, beside the request: OpenAI's system_fingerprint.

    `digest`: of the weights as served. `text`: how text becomes tokens, is sampled by default, and
    ends; the adapter's digest. The prefix cache, speculative decoding and the number of adapters
    are not in it: they change no bit.
    """
    options = vars(engine.config).copy()
    for name in ("backend", "speculate", "prefix_cache_bytes", "embeds", "adapters"):
        del options[name]
    if not engine.config.adapters:
        del options["adapter_rank"]
    inputs = {
        "weights": digest,
        "config": repr(engine.cfg),
        "engine": options,
        "devices": engine.devices,
        "kernels in C": engine.config.backend.in_c and native_digest(),
        "machine": machine_identity(),
        "flags": os.environ.get("XLA_FLAGS"),
        "versions": [importlib.metadata.version(name) for name in LIBRARIES],
        **text,
    }
    return "fp_" + hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]
