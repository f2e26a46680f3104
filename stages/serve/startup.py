"""Loads a model to serve: lays its weights out in slots, starts its chat template, and prints the banner."""

import contextlib
import datetime
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

from engine.device import Device
from engine.errors import UserError
from engine.format import size
from engine.inference.slots import Slots
from engine.model.config import ModelConfig
from engine.storage.assets import MODELS
from engine.storage.digest import digest
from engine.storage.find import LoadedModel, load_model, with_adapters
from engine.text.chat import Chat
from engine.text.template import read_template
from stages.cli.console import Console
from stages.serve.layout import REMEDY, CompileAhead, Layout
from stages.serve.state import ServerState


def load_state(
    model_name: str | None, layout: Layout, device: Device, console: Console, *, name: str | None = None,
    adapter: Path | None = None, template: Path | None = None, queue: int = 32, price: float | None = None,
) -> tuple[ServerState, CompileAhead]:  # fmt: skip
    """Loads a model, with the adapter in a folder and the template in a file, and prints the banner.

    Returns the state of the routes, and the compilation that goes on. `name`, `queue` and `price` are those of
    `ServerState`. Raises UserError.
    """
    source = read_template(template)
    ahead = CompileAhead(layout)

    def on_config(cfg: ModelConfig) -> None:
        if (layout.capacity or 0) <= cfg.context:  # else `Slots` refuses it
            if device.backend == "cpu":
                layout.check_room(cfg)
            ahead.begin(cfg)

    try:
        with console.task(f"loading {model_name or 'the newest run'}") as report:
            model = load_model(model_name, report=report, on_config=on_config)
        console.warn_damaged(model.damaged, model.checkpoint)
        now = datetime.datetime.now().isoformat(timespec="seconds")
        make_chat = lambda: Chat(model.tokenizer, source, now)
        with ThreadPoolExecutor(1) as beside:  # the template's process starts while weights are laid out
            making = beside.submit(make_chat)
            try:
                slots = _make_slots(model, adapter, layout)
                sha256 = digest(slots.params)
            except BaseException:
                with contextlib.suppress(UserError):
                    making.result().close()
                raise
            chat = making.result()
    except BaseException:
        ahead.stop()
        raise
    own_name = re.sub(r"[^A-Za-z0-9_.:-]+", "-", model.name).strip("-")  # as a path may spell it: /v1/models/NAME
    name = name or (model_name if model_name in MODELS else own_name) or "model"
    weights = size(sum(leaf.nbytes for leaf in jax.tree.leaves(slots.params)))
    console.print_rows([
        ("model", f"{name}: {model.checkpoint}" + (f" with {adapter}" if adapter else "")),
        ("device", str(device)),
        ("weights", f"{layout.weights}, {weights}, SHA-256 {sha256[:16]}"),
        ("slots", f"{layout.slots} of {slots.capacity:,} tokens, KV cache in {layout.kv_dtype}, {size(slots.cache_bytes)}"),
        ("queue", f"{queue} more wait; prefix cache of {layout.prefix_cache_bytes / 1e6:g} MB"),
        ("template", chat.template_name),
    ])  # fmt: skip
    return ServerState(name, model, slots, sha256, chat, make_chat, queue, price), ahead


def _make_slots(model: LoadedModel, adapter: Path | None, layout: Layout) -> Slots:
    cfg = layout.config(model.cfg)
    params = with_adapters(model.cfg, model.params, [adapter]) if adapter else model.params
    params = jax.block_until_ready(layout.params(cfg, params))
    try:
        return Slots(cfg, params, speculate=layout.speculate, **layout.slot_options(cfg))
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(f"There is not enough memory for {layout.slots} slots. {REMEDY}") from error
