"""Loads what is served: weights, adapters, tokenizer and template, while the programs are compiled."""

import contextlib
import dataclasses
import datetime
import queue
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from engine.counting import hardware
from engine.device import Device, host_memory
from engine.errors import UserError
from engine.format import format_bytes
from engine.inference.config import EngineConfig
from engine.inference.engine import Engine
from engine.inference.request import SamplingParams
from engine.inference.runner import compile_ahead
from engine.mesh import layout
from engine.model.config import ModelConfig
from engine.model.ops import kernels_note
from engine.model.paths import unflatten
from engine.model.shapes import leaf_shapes
from engine.model.weights.convert import weight_types
from engine.storage.adapter import base_digest
from engine.storage.digest import digest
from engine.storage.model_loader import LoadedModel, load_model, with_adapters
from engine.storage.tensor_layout import describe_kinds
from engine.text.chat_tokenizer import ChatTokenizer
from engine.text.documents import Documents
from engine.text.template import read_template
from stages.cli.console import Console
from stages.cli.flags import PLAIN_NAME
from stages.cli.sampling import choose_sampling
from stages.serve.adapters import read
from stages.serve.state import ServerState

DEFAULT_SAMPLING = {"temperature": 1.0}  # as OpenAI has it, where neither a flag nor the model says it


@dataclasses.dataclass(frozen=True)
class ServerOptions:
    """What a server is told beside its model and its engine."""

    # By which clients ask for the model; its own without any.
    names: Sequence[str] = ()
    # Names and folders of adapters; those without a name become part of the model.
    adapters: Sequence[tuple[str, Path]] = ()
    # From below which clients may add adapters; none if None.
    adapter_folder: Path | None = None
    # A chat template's file, in place of the model's.
    template: Path | None = None
    documents: Documents | None = None
    # Requests that may wait.
    queue: int = 32
    # Of the machine, dollars an hour.
    price: float | None = None
    # Fields of SamplingParams by flags, for requests that leave them out.
    sampling: Mapping[str, float | None] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model in its engine, and what came with it."""

    model: LoadedModel
    engine: Engine
    chat: ChatTokenizer
    # By which clients ask for the model.
    names: Sequence[str]
    # SHA-256 of the weights as served.
    digest: str
    # Of the model that adapters are for; empty where none are served by name.
    base_digest: str
    # The folders of the adapters that are part of the model.
    merged: Sequence[Path]
    # The trees of the adapters that have a name.
    adapters: Mapping[str, Any]
    # To print below the banner, of the adapters that are part of the model, and of those that have
    # a name.
    merge_notes: Sequence[str]
    adapter_notes: Sequence[str]


class CompileAhead:
    """Plans the engine as soon as the architecture is known, and compiles its programs in a thread.

    The weights are read meanwhile. Iterating it, once, yields what `compile_ahead` yields. A failure
    to compile is silent: a missing program is compiled when needed.
    """

    def __init__(self, config: EngineConfig, device: Device) -> None:
        # As planned once `begin` has been called.
        self.config = config
        self.blocks: dict[str, Any] = {}  # the leaves of a file's blocks that stay so
        self._device = device
        self._mesh = layout.current_mesh()
        self._thread = ThreadPoolExecutor(1, "ahead")
        self._stopping = False
        self._compiled: queue.SimpleQueue[tuple[str, int] | None] = queue.SimpleQueue()

    def begin(self, cfg: ModelConfig) -> None:
        """Plans and begins to compile, on the mesh of the constructor. Raises UserError as `plan_engine`."""
        with jax.set_mesh(self._mesh):
            layout.check_inference(cfg, self._mesh)
            free = hardware.free_memory_bytes()
            limit = None
            if self._device.backend == "cpu":
                limit = hardware.memory_limit_bytes()
            else:  # where devices are virtual they share one memory
                free *= layout.column_shards()
            self.config = plan_engine(self.config, cfg, free, limit)
        if (self.config.capacity or 0) <= cfg.context:  # `Engine` refuses a larger one
            self._thread.submit(self._run, self.config, self.config.model_config(cfg), self.blocks)

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return iter(self._compiled.get, None)

    def stop(self) -> None:
        self._stopping = True
        self._thread.shutdown()

    def _run(self, config: EngineConfig, cfg: ModelConfig, blocks: dict[str, Any]) -> None:
        with contextlib.suppress(Exception), jax.set_mesh(self._mesh):
            shapes = _served_shapes(config, cfg, blocks, whole=self._mesh is None)
            for program in compile_ahead(cfg, shapes, config):
                self._compiled.put(program)
                if self._stopping:
                    break
        self._compiled.put(None)


def plan_engine(config: EngineConfig, cfg: ModelConfig, free: int, limit: int | None) -> EngineConfig:
    """Returns the config with a capacity for a model, as `with_capacity` has it for so many free bytes.

    Raises UserError when weights and slots take more bytes than `limit`, if there is one.
    """
    config = config.with_capacity(cfg, free)
    capacity = config.capacity or 0
    if limit is not None and capacity <= cfg.context:
        what = f"The weights and {config.slots:,} slots of {capacity:,} tokens take"
        remedy = "give fewer --slots, a smaller --capacity, or --keys-values int8."
        hardware.require_memory(config.bytes(cfg, capacity), what, remedy, limit=limit)
    return config


def load_state(
    model_name: str | None,
    engine_config: EngineConfig,
    device: Device,
    console: Console,
    options: ServerOptions = ServerOptions(),
) -> tuple[ServerState, CompileAhead]:
    """Loads a model, and prints the banner. Returns the state, and the compilation that goes on.

    Raises UserError.
    """
    loaded, ahead = load(model_name, engine_config, device, console, options)
    sampling, origins = choose_sampling(
        loaded.model.sampling, options.sampling, DEFAULT_SAMPLING, console, penalties=True
    )
    print_banner(loaded, device, console, options, origins)
    state = ServerState(
        loaded.names,
        loaded.model,
        SamplingParams(**sampling),
        loaded.engine,
        loaded.digest,
        loaded.chat,
        options.queue,
        options.price,
        base_digest=loaded.base_digest,
        adapter_folder=options.adapter_folder,
        documents=options.documents,
        adapters=loaded.adapters,
    )
    return state, ahead


def load(
    model_name: str | None,
    engine_config: EngineConfig,
    device: Device,
    console: Console,
    options: ServerOptions,
) -> tuple[Loaded, CompileAhead]:
    """Loads a model with its adapters and template. Returns it, and the compilation that goes on.

    Raises UserError.
    """
    template = read_template(options.template)
    merged = [folder for name, folder in options.adapters if not name]
    named = {name: folder for name, folder in options.adapters if name}
    on_mesh = layout.current_mesh() is not None
    # What an adapter is merged into is a block no more.
    keep_kinds = () if merged else engine_config.kept_kinds
    ahead = CompileAhead(engine_config, device)
    with contextlib.ExitStack() as on_error:
        on_error.callback(ahead.stop)
        loading = console.task(f"loading {model_name or 'the newest finished run'}")
        with loading as report, host_memory(on_mesh):
            model = load_model(
                model_name,
                report=report,
                on_config=ahead.begin,
                keep_kinds=keep_kinds,
                on_blocks=ahead.blocks.update,
            )
        console.print_notes(*model.notes)
        names = options.names or [_own_name(model)]
        _check_names(names, named)
        now = datetime.datetime.now().isoformat(timespec="seconds")
        with ThreadPoolExecutor(1) as beside:  # while the weights are laid out
            making = beside.submit(ChatTokenizer, model.tokenizer, template, now)
            on_error.callback(_close_chat, making)
            base = _base_digest(model) if ahead.config.adapters else ""
            trees = {}
            adapter_notes: list[str] = []
            for name, folder in named.items():
                trees[name], notes = read(model.cfg, folder, base, ahead.config.adapter_rank)
                adapter_notes += notes
            engine, merge_notes = _make_engine(model, merged, ahead.config)
            sha256 = digest(engine.params)
            chat = making.result()
        on_error.pop_all()
    return Loaded(model, engine, chat, names, sha256, base, merged, trees, merge_notes, adapter_notes), ahead


def print_banner(
    loaded: Loaded, device: Device, console: Console, options: ServerOptions, sampling_origins: str
) -> None:
    """Prints what is served, and how. `sampling_origins`: as of `choose_sampling`."""
    engine = loaded.engine
    config = engine.config
    context = loaded.model.cfg.context
    less = "" if engine.capacity == context else f" (the model's context is {context:,})"
    along = f"; {engine.devices} of them along tensor" if engine.devices > 1 else ""
    merged = "".join(f" with {folder}" for folder in loaded.merged)
    adapters = ""
    if config.adapters:
        own = ", ".join(loaded.adapters) or "none yet"
        adapters = f"{own}; at most {config.adapters} at once, of rank {config.adapter_rank}"
    documents_summary = ""
    documents_note = None
    if options.documents:
        documents_summary = options.documents.summary
        documents_note = options.documents.note
    weights = format_bytes(sum(leaf.nbytes for leaf in jax.tree.leaves(engine.params)))
    slots = f"{config.slots} of {engine.capacity:,} tokens{less}"
    console.print_rows(
        [
            ("model", f"{', '.join(loaded.names)}: {loaded.model.checkpoint}{merged}"),
            ("adapters", adapters),
            ("device", f"{device}{along}{kernels_note()}"),
            ("weights", f"{weight_types(engine.params)}, {weights}, SHA-256 {loaded.digest[:16]}"),
            ("file", describe_kinds(loaded.model.kinds, engine.params)),
            ("slots", f"{slots}, KV cache in {config.kv_dtype}, {format_bytes(engine.runner.cache_bytes)}"),
            ("queue", f"{options.queue} more wait; prefix cache of {engine.prefix_cache.limit / 1e6:.0f} MB"),
            ("template", loaded.chat.template_name),
            ("documents", documents_summary),
            ("sampling", f"{sampling_origins}; what a request says wins"),
        ]
    )
    console.print_notes(*loaded.merge_notes, documents_note, *loaded.adapter_notes)


def _own_name(model: LoadedModel) -> str:
    """Returns the model's name as a path may spell it: /v1/models/NAME."""
    name = re.sub(r"[^A-Za-z0-9_.:-]+", "-", model.name).strip("-")
    return name if re.fullmatch(PLAIN_NAME, name) else "model"


def _check_names(names: Sequence[str], adapters: Iterable[str]) -> None:
    for name in adapters:
        if name in names:
            raise UserError(
                f"{name} is the model's own name: give the adapter another, or the model by --name."
            )


def _close_chat(making: Future[ChatTokenizer]) -> None:
    """Ends a chat tokenizer's process, once there is one."""
    if making.exception() is None:
        making.result().close()


def _base_digest(model: LoadedModel) -> str:
    dtype = "float32" if model.run else model.cfg.dtype  # of matrices, as `load_model` has them for training
    return base_digest(model.params, dtype)


def _served_shapes(config: EngineConfig, cfg: ModelConfig, blocks: dict[str, Any], *, whole: bool) -> Any:
    """Returns the shapes of a model's weights as the engine has them, `whole` on one device.

    `blocks`: those of its file.
    """
    shapes: dict[str, Any] = {}
    for path, shape in leaf_shapes(cfg).items():
        shapes[path] = jax.ShapeDtypeStruct(shape, "float32")
    return jax.eval_shape(
        lambda params: config.prepare_params(cfg, params, whole), unflatten(shapes | blocks)
    )


def _make_engine(
    model: LoadedModel, adapters: Sequence[Path], engine_config: EngineConfig
) -> tuple[Engine, tuple[str, ...]]:
    """Returns the engine of a model that adapters are merged into, and notes to print."""
    cfg = engine_config.model_config(model.cfg)
    is_whole = layout.current_mesh() is None
    with host_memory(not is_whole):
        params, notes = with_adapters(model.cfg, model.params, adapters)
        params = engine_config.prepare_params(cfg, params, is_whole)
    return Engine(cfg, jax.block_until_ready(layout.place(params)), engine_config), notes
