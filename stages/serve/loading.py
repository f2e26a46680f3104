"""The model as it is served: its weights laid out, its slots, its chat template, and the banner that tells of them."""

import dataclasses
import datetime
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import jax

from engine.allocator import prefer_huge_pages
from engine.errors import UserError
from engine.inference import decode
from engine.inference.quantize import quantize
from engine.inference.slots import Slots
from engine.storage.digest import digest
from engine.text.chat import Chat
from stages import device, words
from stages import load as models
from stages.compiles import Compiles
from stages.serve.admission import Door
from stages.serve.engine import Engine
from stages.serve.metrics import Metrics
from stages.serve.prompts import Prompts
from stages.serve.served import Served

if TYPE_CHECKING:
    from stages.console import Console
    from stages.serve.__main__ import Serve

USUAL_CAPACITY = 2048
MB = 10**6


@dataclasses.dataclass
class Loaded:
    """What does not depend on the event loop. `source`: a chat template given by hand."""

    model: models.Model
    name: str
    params: Any
    slots: Slots
    chat: Chat
    source: str | None
    now: str
    compiles: Compiles
    digest: str

    def served(self, given: "Serve", post: Callable[..., Any]) -> Served:
        """Everything the routes need; `post` runs a function on the event loop."""
        engine = Engine(self.slots, post, self.compiles)
        metrics = Metrics(self.name, engine)
        another = lambda: make_chat(self.model, self.source, self.now)
        prompts = Prompts(self.model.tokenizer, self.chat, another, self.model.start, self.slots.capacity)
        return Served(
            name=self.name, engine=engine, params=self.params, prompts=prompts, ends=frozenset(self.model.ends),
            door=Door(given.slots, given.queue), metrics=metrics, attested=self.digest,
            price=given.price,
        )  # fmt: skip


def load(given: "Serve", console: "Console") -> Loaded:
    """Reads and lays out what the flags name, and prints what it is. Raises UserError."""
    started = device.start(given.device)
    prefer_huge_pages()
    compiles = Compiles()
    source = _template(given)
    with console.task(f"loading {given.model or 'the newest run'}") as report:
        model = models.load_model(given.model, report=report)
    models.say_damaged(model, console)
    now = datetime.datetime.now().isoformat(timespec="seconds")
    with ThreadPoolExecutor(1) as beside:  # the template's process starts while weights are laid out
        making = beside.submit(make_chat, model, source, now)
        slots, weights = _laid_out(model, given, started)
        attested = digest(slots.params)
        chat = making.result()
    name = given.name or (given.model if given.model in models.MODELS else model.name) or "model"
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    rows = [
        ("model", f"{name}: {model.checkpoint}" + (f" with {given.adapter}" if given.adapter else "")),
        ("device", str(started)),
        ("weights", f"{weights}, {words.size(size(slots.params))}, SHA-256 {attested[:16]}"),
        (
            "slots",
            f"{given.slots} of {slots.capacity:,} tokens, keys and values in {given.keys_values}, {words.size(slots.bytes)}",
        ),
        ("queue", f"{given.queue} more wait; prefixes of prompts are kept in {given.prefix_cache} MB"),
        ("template", chat.named),
    ]
    console.rows(rows)
    return Loaded(model, name, slots.params, slots, chat, source, now, compiles, attested)


def _laid_out(model: models.Model, given: "Serve", started: device.Device) -> tuple[Slots, str]:
    """Slots around the weights as they are served, and what those are kept as."""
    weights = given.weights or ("int8" if started.backend == "cpu" else "bfloat16")
    params, cfg = model.params, model.cfg
    if given.adapter:
        from stages.adapters import with_adapters

        params = with_adapters(model, [given.adapter])
    if weights == "int8":
        params = quantize(params)
    else:
        cfg = dataclasses.replace(cfg, dtype=weights)  # type: ignore[arg-type]
    params = jax.block_until_ready(decode.for_inference(cfg, params))
    capacity = given.capacity or min(cfg.context, USUAL_CAPACITY)
    slots = Slots(
        cfg, params, slots=given.slots, capacity=capacity, kind=given.keys_values,  # type: ignore[arg-type]
        prefixes=given.prefix_cache * MB, guesses=not given.no_guesses,
    )  # fmt: skip
    return slots, weights


def make_chat(model: models.Model, source: str | None, now: str) -> Chat:
    """The model's tokenizer and template, with a process of its own. `now` is the moment that templates are told."""
    return Chat(model.tokenizer, source, now)


def _template(given: "Serve") -> str | None:
    if given.template is None:
        return None
    try:
        return given.template.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The template {given.template} cannot be read: {error}.") from error
