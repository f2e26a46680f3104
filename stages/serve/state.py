"""Loads the model and makes the ServerState: its engine and everything else that the routes share."""

import asyncio
import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import os
import re
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax

from engine.counting.hardware import free_memory_bytes, machine_identity, require_memory
from engine.device import Device, host_memory
from engine.errors import UserError
from engine.format import format_bytes
from engine.inference.config import EngineConfig
from engine.inference.engine import Engine
from engine.inference.request import SamplingParams
from engine.mesh import layout
from engine.model.config import ModelConfig
from engine.model.native.library import native_problem
from engine.storage.digest import digest
from engine.storage.model_loader import LoadedModel, load_model, with_adapters
from engine.text.chat_tokenizer import ChatTokenizer
from engine.text.template import read_template
from stages.cli.console import Console
from stages.cli.sampling import choose_sampling
from stages.serve.admission import Admission
from stages.serve.compile_ahead import CompileAhead
from stages.serve.engine_thread import EngineThread
from stages.serve.errors import ApiError
from stages.serve.metrics import Metrics
from stages.serve.tokenizer_pool import TokenizerPool

REMEDY = "give fewer --slots, a smaller --capacity, or --keys-values int8."
STUCK_SECONDS = 4.0  # without a tick until the engine is stuck; 503 is promised within 5
LIBRARIES = ("thrice", "jaxlib", "numpy", "tokenizers", "jinja2")  # `machine_identity` has JAX's version
Status = Literal["ok", "warming", "stuck", "failed", "draining"]


class ServerState:
    """The engine, admission, tokenizer and metrics of one model. `digest`: of the weights at load. `price`: dollars an hour.

    `name`: by which clients ask for the model. `sampling`: of a request that leaves its fields out. `queue`: requests that
    may wait.
    """

    def __init__(
        self, name: str, model: LoadedModel, sampling: SamplingParams, engine: Engine, digest: str, chat: ChatTokenizer,
        queue: int, price: float | None,
    ) -> None:  # fmt: skip
        self.name, self.digest, self.price, self.loaded_at = name, digest, price, int(time.time())
        now = chat.now if "strftime_now" in chat.source else ""
        self.fingerprint = system_fingerprint(
            digest, engine, tokenizer=model.tokenizer.digest, template=chat.source, now=now, eos=sorted(model.eos_ids),
            sampling=repr(sampling),
        )  # fmt: skip
        self.engine, self.admission = EngineThread(engine), Admission(engine.config.slots, queue)
        self.tokenizer = TokenizerPool(chat, engine.capacity)
        self.sampling, self.stop_token_ids = sampling, frozenset(model.eos_ids)
        self.metrics = Metrics(name, self.engine)
        self._hashing: asyncio.Task[str] | None = None

    def check_model(self, name: str) -> None:
        """Raises ApiError unless the name is the model's or `default`."""
        if name not in (self.name, "default"):
            short = name if len(name) <= 100 else name[:100] + "..."
            message = f"There is no model {short!r} here; {self.name!r} is served, also as 'default'."
            raise ApiError(404, message, param="model", code="model_not_found")

    def check_ready(self) -> None:
        """Raises ApiError (503) while no completion can be admitted: when not ready, failed or draining."""
        messages = {"warming": "The server is not ready yet.", "failed": "The engine has failed."}
        if message := messages.get(status := self.status):
            raise ApiError(503, message, code=status, headers={"Retry-After": "2"})
        self.admission.check_open()

    @property
    def status(self) -> Status:
        """Whether requests are answered now, or why not."""
        if self.engine.error or not self.engine.ready:
            return "failed" if self.engine.error else "warming"
        if self.engine.seconds_since_tick > STUCK_SECONDS:
            return "stuck"
        return "draining" if self.admission.draining else "ok"

    async def hash_weights(self) -> str:
        """Returns a new digest of all weights, made in a thread; requests that come meanwhile share it."""
        if self._hashing is None or self._hashing.done():
            self._hashing = asyncio.create_task(asyncio.to_thread(digest, self.engine.engine.params))
        return await asyncio.shield(self._hashing)


def system_fingerprint(digest: str, engine: Engine, **text: Any) -> str:
    """Returns system_fingerprint, of OpenAI's API: one name for all that can change a completion, beside the request.

    `digest`: of the weights as served. `text`: how text becomes tokens, is sampled by default, and ends. The prefix cache and
    speculative decoding are not in it: they change no bit.
    """
    options = dataclasses.asdict(engine.config)
    for name in ("speculate", "prefix_cache_bytes", "short"):
        del options[name]
    facts = {
        "weights": digest, "config": repr(engine.cfg), "engine": options, "devices": engine.devices,
        "machine": machine_identity(), "flags": os.environ.get("XLA_FLAGS"),
        "versions": [importlib.metadata.version(name) for name in LIBRARIES], **text,
    }  # fmt: skip
    return "fp_" + hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def load_state(
    model_name: str | None, engine_config: EngineConfig, device: Device, console: Console, *, name: str | None = None,
    adapter: Path | None = None, template: Path | None = None, queue: int = 32, price: float | None = None,
    sampling: Mapping[str, float | None] | None = None,
) -> tuple[ServerState, CompileAhead]:  # fmt: skip
    """Loads a model, with the adapter in a folder and the template in a file, and prints the banner.

    `sampling`: by flags. Returns the state, which has `name`, `queue` and `price`, and the compilation that goes on. Raises
    UserError.
    """
    source = read_template(template)
    ahead, mesh = CompileAhead(), layout.current_mesh()

    def on_config(cfg: ModelConfig) -> None:
        with jax.set_mesh(mesh):
            configure(cfg)

    def configure(cfg: ModelConfig) -> None:
        nonlocal engine_config
        layout.check_inference(cfg, mesh)
        devices = layout.column_shards() if device.backend != "cpu" else 1  # virtual devices share one memory
        engine_config = engine_config.with_capacity(cfg, devices * free_memory_bytes())
        capacity = engine_config.capacity or 0
        if capacity <= cfg.context:  # else `Engine` refuses it
            if device.backend == "cpu":
                what = f"The weights and {engine_config.slots:,} slots of {capacity:,} tokens take"
                require_memory(engine_config.bytes(cfg, capacity), what, REMEDY)
            ahead.begin(engine_config, cfg)

    try:
        with (
            console.task(f"loading {model_name or 'the newest finished run'}") as report,
            host_memory(mesh is not None),
        ):
            model = load_model(model_name, report=report, on_config=on_config)
        console.print_notes(model.notes)
        now = datetime.datetime.now().isoformat(timespec="seconds")
        with ThreadPoolExecutor(1) as beside:  # while the weights are laid out
            making = beside.submit(ChatTokenizer, model.tokenizer, source, now)
            try:
                engine, notes = _make_engine(model, adapter, engine_config)
                sha256 = digest(engine.params)
            except BaseException:
                with contextlib.suppress(UserError):
                    making.result().close()
                raise
            chat = making.result()
    except BaseException:
        ahead.stop()
        raise
    own_name = re.sub(r"[^A-Za-z0-9_.:-]+", "-", model.name).strip("-")  # as a path may spell it: /v1/models/NAME
    name = name or own_name or "model"
    less = "" if engine.capacity == model.cfg.context else f" (the model's context is {model.cfg.context:,})"
    default = {"temperature": 1.0}  # as OpenAI has it
    fields, origins = choose_sampling(model.sampling, sampling or {}, default, console, penalties=True)
    weights = format_bytes(sum(leaf.nbytes for leaf in jax.tree.leaves(engine.params)))
    console.print_rows([
        ("model", f"{name}: {model.checkpoint}" + (f" with {adapter}" if adapter else "")),
        ("device", str(device) + (f"; {engine.devices} of them along tensor" if engine.devices > 1 else "")),
        ("weights", f"{engine_config.weights}, {weights}, SHA-256 {sha256[:16]}"),
        ("slots", f"{engine_config.slots} of {engine.capacity:,} tokens{less}, KV cache in {engine_config.kv_dtype}, "
                  f"{format_bytes(engine.cache_bytes)}"),
        ("queue", f"{queue} more wait; prefix cache of {engine.prefix_cache.limit / 1e6:.0f} MB"),
        ("template", chat.template_name),
        ("sampling", f"{origins}; what a request says wins"),
    ])  # fmt: skip
    console.print_notes(notes)
    if engine_config.weights == "int8" and device.backend == "cpu" and engine.devices == 1 and (problem := native_problem()):
        console.print_notes([f"A lone stream would be decoded about twice as fast with the kernel in C, but {problem}."])
    return ServerState(name, model, SamplingParams(**fields), engine, sha256, chat, queue, price), ahead


def _make_engine(model: LoadedModel, adapter: Path | None, engine_config: EngineConfig) -> tuple[Engine, tuple[str, ...]]:
    """Returns the engine, and notes on the adapter to print."""
    cfg = engine_config.model_config(model.cfg)
    is_whole = layout.current_mesh() is None
    with host_memory(not is_whole):
        params, notes = with_adapters(model.cfg, model.params, [adapter] if adapter else [])
        params = engine_config.prepare_params(cfg, params, is_whole)
    params = jax.block_until_ready(layout.place(cfg, params))
    try:
        return Engine(cfg, params, engine_config), notes
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(f"There is not enough memory for {engine_config.slots} slots; {REMEDY}") from error
