"""The model as it is served: its weights laid out, its slots, its chat template, and the banner that tells of them."""

import contextlib
import dataclasses
import datetime
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import jax

from engine.allocator import prefer_huge_pages
from engine.errors import UserError
from engine.inference import decode
from engine.inference.quantize import quantize
from engine.inference.slots import Slots, compile_ahead
from engine.model.config import ModelConfig
from engine.model.transformer import init_params
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
HANDOVER = 0.0005  # seconds for which one thread may hold Python's lock while weights are read beside what compiles
MB = 10**6


@dataclasses.dataclass
class Loaded:
    """What does not depend on the event loop. `source`: a chat template given by hand. `ahead` ends when what could be
    compiled beside the loading has been."""

    model: models.Model
    name: str
    params: Any
    slots: Slots
    chat: Chat
    source: str | None
    now: str
    compiles: Compiles
    digest: str
    ahead: threading.Thread | None = None

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
    usual = sys.getswitchinterval()
    sys.setswitchinterval(HANDOVER)
    try:
        return _load(given, console)
    finally:
        sys.setswitchinterval(usual)


def _load(given: "Serve", console: "Console") -> Loaded:
    started = device.start(given.device, decodes=True)
    prefer_huge_pages()
    compiles = Compiles()
    source = _template(given)
    ahead: list[threading.Thread] = []

    def known(cfg: ModelConfig) -> None:
        ahead.append(threading.Thread(target=_compile_ahead, args=(cfg, given, started), daemon=True, name="ahead"))
        ahead[-1].start()

    with console.task(f"loading {given.model or 'the newest run'}") as report:
        model = models.load_model(given.model, report=report, known=known)
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
    return Loaded(model, name, slots.params, slots, chat, source, now, compiles, attested, ahead[-1])


def _compile_ahead(cfg: ModelConfig, given: "Serve", started: device.Device) -> None:
    """Compiles from the architecture what will be asked for, while another core reads the weights.

    Nothing depends on it: what it gets wrong or cannot do is done, or said, when the programs are wanted.
    """
    with contextlib.suppress(Exception):
        weights, cfg = _kept_as(cfg, given, started)
        drawn = lambda: decode.for_inference(cfg, _as_served(init_params(cfg, jax.random.key(0)), weights))
        compile_ahead(cfg, jax.eval_shape(drawn), **_options(cfg, given))


def _kept_as(cfg: ModelConfig, given: "Serve", started: device.Device) -> tuple[str, ModelConfig]:
    """What matrices are kept as, and the config that computes so."""
    weights = given.weights or ("int8" if started.backend == "cpu" else "bfloat16")
    return weights, cfg if weights == "int8" else dataclasses.replace(cfg, dtype=weights)  # type: ignore[arg-type]


def _as_served(params: Any, weights: str) -> Any:
    return quantize(params) if weights == "int8" else params


def _options(cfg: ModelConfig, given: "Serve") -> dict[str, Any]:
    """Of the slots: what shapes their programs."""
    return {
        "slots": given.slots, "capacity": given.capacity or min(cfg.context, USUAL_CAPACITY), "kind": given.keys_values,
        "prefixes": given.prefix_cache * MB,
    }  # fmt: skip


def _laid_out(model: models.Model, given: "Serve", started: device.Device) -> tuple[Slots, str]:
    """Slots around the weights as they are served, and what those are kept as."""
    weights, cfg = _kept_as(model.cfg, given, started)
    params = model.params
    if given.adapter:
        from stages.adapters import with_adapters

        params = with_adapters(model, [given.adapter])
    params = jax.block_until_ready(decode.for_inference(cfg, _as_served(params, weights)))
    slots = Slots(cfg, params, guesses=not given.no_guesses, **_options(cfg, given))
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
