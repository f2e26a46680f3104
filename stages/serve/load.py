"""Loads what is served: weights, adapters, tokenizer and template, while the programs are compiled."""

import contextlib
import dataclasses
import datetime
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from engine.device import Device, host_memory
from engine.errors import UserError
from engine.format import format_bytes
from engine.inference.config import EngineConfig
from engine.inference.engine import Engine
from engine.inference.request import SamplingParams
from engine.mesh import layout
from engine.model.config import ModelConfig
from engine.model.ops import kernels_note
from engine.model.weights.convert import describe_weights
from engine.storage import run_folder
from engine.storage.adapter import base_digest
from engine.storage.digest import digest
from engine.storage.kinds_in_words import describe_kinds
from engine.storage.model_loader import LoadedModel, load_model, with_adapters
from engine.text.chat_tokenizer import ChatTokenizer
from engine.text.documents import Documents
from engine.text.template import read_template
from stages.cli.console import Console
from stages.cli.flags import PLAIN_NAME
from stages.cli.sampling import choose_sampling
from stages.serve.adapters import read_shared_adapter
from stages.serve.compile_ahead import CompileAhead
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
    merged_folders: Sequence[Path]
    # The trees of the adapters that have a name.
    adapters: Mapping[str, Any]
    # To print below the banner, of the adapters that are part of the model, and of those that have
    # a name.
    merge_notes: Sequence[str]
    adapter_notes: Sequence[str]


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
        names=loaded.names,
        model=loaded.model,
        sampling=SamplingParams(**sampling),
        engine=loaded.engine,
        digest=loaded.digest,
        chat=loaded.chat,
        queue=options.queue,
        price=options.price,
        base_digest=loaded.base_digest,
        adapter_folder=options.adapter_folder,
        documents=options.documents,
        adapters=loaded.adapters,
        training_flops=_training_flops(loaded.model.run),
    )
    return state, ahead


def _training_flops(run: Path | None) -> int | None:
    """Returns what it took to train a run, by its record; None without one, and of an older one."""
    if run is None:
        return None
    result = run_folder.read_json(run / "run.json").get("result")
    if not isinstance(result, dict):
        return None
    flops = result.get("training_flops")
    return flops if type(flops) is int else None


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
    merged_folders = [folder for name, folder in options.adapters if not name]
    folders = {name: folder for name, folder in options.adapters if name}
    keep_kinds = engine_config.kept_kinds
    if merged_folders:
        keep_kinds = ()  # an adapter is merged into weights in a float type
    ahead = CompileAhead(engine_config, device)
    with contextlib.ExitStack() as on_error:
        on_error.callback(ahead.stop)
        model = _load_weights(model_name, engine_config.dtype_of_file, keep_kinds, ahead, console)
        planned_config = ahead.config  # `engine_config` with a capacity, as loading had it planned
        console.print_notes(*model.notes)
        names = options.names or [_own_name(model)]
        _check_names(names, folders)
        now = datetime.datetime.now().isoformat(timespec="seconds")
        with ThreadPoolExecutor(1) as beside:  # while the weights are laid out
            making = beside.submit(ChatTokenizer, model.tokenizer, template, now)
            on_error.callback(_close_chat, making)
            base = _base_digest(model) if planned_config.adapters else ""
            trees, adapter_notes = _read_adapters(model.cfg, folders, base, planned_config.adapter_rank)
            engine, merge_notes = _make_engine(model, merged_folders, planned_config)
            sha256 = digest(engine.params)
            chat = making.result()
        on_error.pop_all()
    loaded = Loaded(
        model=model,
        engine=engine,
        chat=chat,
        names=names,
        digest=sha256,
        base_digest=base,
        merged_folders=merged_folders,
        adapters=trees,
        merge_notes=merge_notes,
        adapter_notes=adapter_notes,
    )
    return loaded, ahead


def print_banner(
    loaded: Loaded, device: Device, console: Console, options: ServerOptions, sampling_origins: str
) -> None:
    """Prints what is served, and how. `sampling_origins`: as of `choose_sampling`."""
    params = loaded.engine.params
    prefix_cache = f"prefix cache of {loaded.engine.prefix_cache.limit / 1e6:.0f} MB"
    documents_summary = ""
    documents_note = None
    if options.documents:
        documents_summary = options.documents.summary
        documents_note = options.documents.note
    console.print_rows(
        [
            ("model", _model_row(loaded)),
            ("adapters", _adapters_row(loaded)),
            ("device", _device_row(loaded.engine, device)),
            ("weights", f"{describe_weights(params)}, SHA-256 {loaded.digest[:16]}"),
            ("file", describe_kinds(loaded.model.kinds, params)),
            ("slots", _slots_row(loaded)),
            ("queue", f"{options.queue} more wait; {prefix_cache}"),
            ("template", loaded.chat.template_name),
            ("documents", documents_summary),
            ("sampling", f"{sampling_origins}; what a request says wins"),
        ]
    )
    console.print_notes(*loaded.merge_notes, documents_note, *loaded.adapter_notes)


def _model_row(loaded: Loaded) -> str:
    merge_note = "".join(f" with {folder}" for folder in loaded.merged_folders)
    return f"{', '.join(loaded.names)}: {loaded.model.checkpoint}{merge_note}"


def _adapters_row(loaded: Loaded) -> str:
    """Returns the names of the adapters and how many fit; empty where none are served by name."""
    config = loaded.engine.config
    if not config.adapters:
        return ""
    adapter_names = ", ".join(loaded.adapters) or "none yet"
    return f"{adapter_names}; at most {config.adapters} at once, of rank {config.adapter_rank}"


def _device_row(engine: Engine, device: Device) -> str:
    mesh_note = ""
    if engine.devices > 1:
        mesh_note = f"; {engine.devices} of them along tensor"
    return f"{device}{mesh_note}{kernels_note()}"


def _slots_row(loaded: Loaded) -> str:
    engine = loaded.engine
    context = loaded.model.cfg.context
    context_note = ""
    if engine.capacity != context:
        context_note = f" (the model's context is {context:,})"
    slots = f"{engine.config.slots} of {engine.capacity:,} tokens{context_note}"
    cache = f"KV cache in {engine.config.kv_dtype}, {format_bytes(engine.runner.cache_bytes)}"
    return f"{slots}, {cache}"


def _load_weights(
    model_name: str | None,
    dtype: str | None,
    keep_kinds: Collection[str],
    ahead: CompileAhead,
    console: Console,
) -> LoadedModel:
    """Loads a model, into host memory where there is a mesh.

    Once the architecture is known it has `ahead` plan the engine, which replaces `ahead.config`, and
    begin to compile. Raises UserError.
    """
    on_mesh = layout.current_mesh() is not None
    loading = console.task(f"loading {model_name or 'the newest finished run'}")
    with loading as report, host_memory(on_mesh):
        return load_model(
            model_name,
            dtype=dtype,
            report=report,
            on_config=ahead.begin,
            keep_kinds=keep_kinds,
            on_blocks=ahead.blocks.update,
        )


def _own_name(model: LoadedModel) -> str:
    """Returns the model's name as a path may spell it: /v1/models/NAME."""
    name = re.sub(r"[^A-Za-z0-9_.:-]+", "-", model.name).strip("-")
    return name if re.fullmatch(PLAIN_NAME, name) else "model"


def _check_names(names: Sequence[str], adapters: Iterable[str]) -> None:
    """Raises UserError for an adapter with a name of the model."""
    for name in adapters:
        if name in names:
            raise UserError(
                f"{name} is the model's own name: give the adapter another, or the model by --name."
            )


def _read_adapters(
    cfg: ModelConfig, folders: Mapping[str, Path], base: str, rank: int
) -> tuple[dict[str, Any], list[str]]:
    """Returns the trees of adapters by their names, and notes to print. Raises UserError."""
    trees: dict[str, Any] = {}
    notes: list[str] = []
    for name, folder in folders.items():
        trees[name], own_notes = read_shared_adapter(cfg, folder, base, rank)
        notes += own_notes
    return trees, notes


def _close_chat(making: Future[ChatTokenizer]) -> None:
    """Ends a chat tokenizer's process, once there is one."""
    if making.exception() is None:
        making.result().close()


def _base_digest(model: LoadedModel) -> str:
    """Returns the digest by which an adapter names the model that it is for."""
    dtype = "float32" if model.run else model.cfg.dtype  # of matrices, as `load_model` has them for training
    return base_digest(model.params, dtype)


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
