"""The model as it is served: its weights laid out, its slots, its chat template, and the banner that tells of them."""

import contextlib
import dataclasses
import datetime
import gc
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import jax

from engine import format as words
from engine.device import Device, start_jax
from engine.errors import UserError
from engine.inference.slots import Slots
from engine.model.config import ModelConfig
from engine.storage.assets import MODELS
from engine.storage.digest import digest
from engine.storage.find import load_model, with_adapters
from engine.storage.loaded_model import LoadedModel
from engine.text.chat import Chat
from engine.text.template import read_template
from stages.cli.compile_counter import CompileCounter
from stages.serve.admission import Door
from stages.serve.compile_ahead import FEWER, Ahead, as_served, check_room, kept_as, options
from stages.serve.engine import Engine
from stages.serve.metrics import Metrics
from stages.serve.state import Served
from stages.serve.tokenize import Prompts

if TYPE_CHECKING:
    from stages.cli.console import Console
    from stages.serve.flags import Serve

HANDOVER = 0.0005  # seconds for which one thread may hold Python's lock while weights are read beside what compiles
UNCOLLECTED = 100_000  # objects more before Python looks for garbage: tracing makes many, nearly all of which stay


@dataclasses.dataclass
class Loaded:
    """What does not depend on the event loop. `source`: a chat template given by hand."""

    model: LoadedModel
    name: str
    params: Any
    slots: Slots
    chat: Chat
    source: str | None
    now: str
    compiles: CompileCounter
    digest: str
    ahead: Ahead | None = None

    def served(self, given: "Serve", post: Callable[..., Any]) -> Served:
        """Everything the routes need; `post` runs a function on the event loop."""
        engine = Engine(self.slots, post, self.compiles)
        metrics = Metrics(self.name, engine)
        another = lambda: make_chat(self.model, self.source, self.now)
        prompts = Prompts(self.model.tokenizer, self.chat, another, self.model.tokenizer.start, self.slots.capacity)
        return Served(
            name=self.name, engine=engine, params=self.params, prompts=prompts, ends=frozenset(self.model.ends),
            door=Door(given.slots, given.queue), metrics=metrics, attested=self.digest,
            price=given.price,
        )  # fmt: skip


def load(given: "Serve", console: "Console") -> Loaded:
    """Reads and lays out what the flags name, and prints what it is. Raises UserError."""
    usual, collected = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(HANDOVER)
    gc.set_threshold(UNCOLLECTED, *collected[1:])
    try:
        return _load(given, console)
    finally:
        sys.setswitchinterval(usual)
        gc.set_threshold(*collected)


def _load(given: "Serve", console: "Console") -> Loaded:
    started = start_jax(given.device, decodes=True)
    compiles = CompileCounter()
    source = read_template(given.template)
    ahead = Ahead(given, started)

    def known(cfg: ModelConfig) -> None:
        check_room(cfg, given, started)
        ahead.begin(cfg)

    try:
        with console.task(f"loading {given.model or 'the newest run'}") as report:
            model = load_model(given.model, report=report, on_config=known)
        console.warn_damaged(model.damaged, model.checkpoint)
        now = datetime.datetime.now().isoformat(timespec="seconds")
        with ThreadPoolExecutor(1) as beside:  # the template's process starts while weights are laid out
            making = beside.submit(make_chat, model, source, now)
            try:
                slots, weights = _laid_out(model, given, started)
                attested = digest(slots.params)
            except BaseException:
                with contextlib.suppress(UserError):
                    making.result().close()
                raise
            chat = making.result()
    except BaseException:
        ahead.stop()
        raise
    name = given.name or (given.model if given.model in MODELS else _spelt(model.name)) or "model"
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    rows = [
        ("model", f"{name}: {model.checkpoint}" + (f" with {given.adapter}" if given.adapter else "")),
        ("device", str(started)),
        ("weights", f"{weights}, {words.size(size(slots.params))}, SHA-256 {attested[:16]}"),
        (
            "slots",
            f"{given.slots} of {slots.capacity:,} tokens, keys and values in {given.keys_values}, "
            f"{words.size(slots.cache_bytes)}",
        ),
        ("queue", f"{given.queue} more wait; prefixes of prompts are kept in {given.prefix_cache} MB"),
        ("template", chat.named),
    ]
    console.print_rows(rows)
    return Loaded(model, name, slots.params, slots, chat, source, now, compiles, attested, ahead)


def _laid_out(model: LoadedModel, given: "Serve", started: Device) -> tuple[Slots, str]:
    """Slots around the weights as they are served, and what those are kept as."""
    weights, cfg = kept_as(model.cfg, given, started)
    params = model.params
    if given.adapter:
        params = with_adapters(params, [given.adapter])
    params = jax.block_until_ready(as_served(cfg, params, weights))
    try:
        slots = Slots(cfg, params, speculate=not given.no_guesses, **options(cfg, given))
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(f"There is not enough memory for {given.slots} slots. {FEWER}") from error
    return slots, weights


def _spelt(name: str) -> str:
    """A model's own name as a path can spell it, for clients ask for /v1/models/NAME."""
    return re.sub(r"[^A-Za-z0-9_.:-]+", "-", name).strip("-")


def make_chat(model: LoadedModel, source: str | None, now: str) -> Chat:
    """The model's tokenizer and template, with a process of its own. `now` is the moment that templates are told."""
    return Chat(model.tokenizer, source, now)
