"""Loads what is served: weights, adapter, tokenizer and template, while the programs are compiled beside the reading."""

import contextlib
import datetime
import queue
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from engine.counting.hardware import free_memory_bytes, require_memory
from engine.counting.params import leaf_shapes
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
from engine.model.weights.matmul import weight_types
from engine.storage.adapter import base_digest
from engine.storage.digest import digest
from engine.storage.model_loader import LoadedModel, load_model, with_adapters
from engine.storage.tensor_layout import describe_kinds
from engine.text.chat_tokenizer import ChatTokenizer
from engine.text.documents import Documents
from engine.text.template import read_template
from stages.cli.console import Console
from stages.cli.flags import PLAIN_NAME, choose_sampling
from stages.serve.adapters import read
from stages.serve.state import ServerState


class CompileAhead:
    """Compiles the serving programs in a thread while the weights are read.

    Iterating it, once, yields what `compile_ahead` yields. A failure is silent: a missing program is compiled when needed.
    """

    def __init__(self) -> None:
        self._thread, self._stopping = ThreadPoolExecutor(1, "ahead"), False
        self._compiled: queue.SimpleQueue[tuple[str, int] | None] = queue.SimpleQueue()

    def begin(self, config: EngineConfig, cfg: ModelConfig, blocks: dict[str, Any]) -> None:
        self._thread.submit(self._run, config, config.model_config(cfg), blocks, layout.current_mesh())

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return iter(self._compiled.get, None)

    def stop(self) -> None:
        self._stopping = True
        self._thread.shutdown()

    def _run(self, config: EngineConfig, cfg: ModelConfig, blocks: dict[str, Any], mesh: Any) -> None:
        with contextlib.suppress(Exception), jax.set_mesh(mesh):
            loaded: dict[str, Any] = {path: jax.ShapeDtypeStruct(shape, "float32") for path, shape in leaf_shapes(cfg).items()}
            shapes = jax.eval_shape(lambda params: config.prepare_params(cfg, params, mesh is None), unflatten(loaded | blocks))
            for program in compile_ahead(cfg, shapes, config):
                self._compiled.put(program)
                if self._stopping:
                    break
        self._compiled.put(None)


def load_state(
    model_name: str | None,
    engine_config: EngineConfig,
    device: Device,
    console: Console,
    *,
    names: Sequence[str] = (),
    adapters: Sequence[tuple[str, Path]] = (),
    adapter_folder: Path | None = None,
    template: Path | None = None,
    documents: Documents | None = None,
    queue: int = 32,
    price: float | None = None,
    sampling: Mapping[str, float | None] | None = None,
) -> tuple[ServerState, CompileAhead]:
    """Loads a model, with the adapters in folders and the template in a file, and prints the banner.

    Adapters without a name become part of the model. `sampling`: by flags. Returns the state, and the compilation that goes on.
    Raises UserError.
    """
    source = read_template(template)
    ahead, mesh = CompileAhead(), layout.current_mesh()
    # What an adapter is merged into is a block no more.
    blocks: dict[str, Any] | None = {} if engine_config.keeps_blocks and all(name for name, _ in adapters) else None

    def on_config(cfg: ModelConfig) -> None:
        nonlocal engine_config
        with jax.set_mesh(mesh):
            layout.check_inference(cfg, mesh)
            devices = layout.column_shards() if device.backend != "cpu" else 1  # virtual devices share one memory
            engine_config = engine_config.with_capacity(cfg, devices * free_memory_bytes())
            capacity = engine_config.capacity or 0
            if capacity > cfg.context:
                return  # `Engine` refuses it
            if device.backend == "cpu":
                what = f"The weights and {engine_config.slots:,} slots of {capacity:,} tokens take"
                remedy = "give fewer --slots, a smaller --capacity, or --keys-values int8."
                require_memory(engine_config.bytes(cfg, capacity), what, remedy)
            ahead.begin(engine_config, cfg, blocks or {})

    with contextlib.ExitStack() as on_error:
        on_error.callback(ahead.stop)
        loading = console.task(f"loading {model_name or 'the newest finished run'}")
        with loading as report, host_memory(mesh is not None):
            model = load_model(model_name, report=report, on_config=on_config, blocks=blocks)
        console.print_notes(*model.notes)
        own_name = re.sub(r"[^A-Za-z0-9_.:-]+", "-", model.name).strip("-")  # as a path may spell it: /v1/models/NAME
        names = names or [own_name if re.fullmatch(PLAIN_NAME, own_name) else "model"]
        if taken := [name for name, _ in adapters if name in names]:
            raise UserError(f"{taken[0]} is the model's own name: give the adapter another, or the model by --name.")
        now = datetime.datetime.now().isoformat(timespec="seconds")
        with ThreadPoolExecutor(1) as beside:  # while the weights are laid out
            making = beside.submit(ChatTokenizer, model.tokenizer, source, now)
            on_error.callback(lambda: None if making.exception() else making.result().close())
            dtype = "float32" if model.run else model.cfg.dtype  # of matrices, as `load_model` has them for training
            base = base_digest(model.params, dtype) if engine_config.adapters else ""
            merged, named = ([folder for name, folder in adapters if bool(name) == is_named] for is_named in (False, True))
            trees = [read(model.cfg, folder, base, engine_config.adapter_rank) for folder in named]
            engine, notes = _make_engine(model, merged, engine_config)
            sha256, chat = digest(engine.params), making.result()
        on_error.pop_all()
    less = "" if engine.capacity == model.cfg.context else f" (the model's context is {model.cfg.context:,})"
    default = {"temperature": 1.0}  # as OpenAI has it
    fields, origins = choose_sampling(model.sampling, sampling or {}, default, console, penalties=True)
    weights = format_bytes(sum(leaf.nbytes for leaf in jax.tree.leaves(engine.params)))
    along = f"; {engine.devices} of them along tensor" if engine.devices > 1 else ""
    own, bounds = ", ".join(name for name, _ in adapters), f"at most {engine_config.adapters} at once, of rank"
    console.print_rows(
        [
            ("model", f"{', '.join(names)}: {model.checkpoint}" + "".join(f" with {folder}" for folder in merged)),
            ("adapters", f"{own or 'none yet'}; {bounds} {engine_config.adapter_rank}" if engine_config.adapters else ""),
            ("device", f"{device}{along}{kernels_note()}"),
            ("weights", f"{weight_types(engine.params)}, {weights}, SHA-256 {sha256[:16]}"),
            ("file", describe_kinds(model.kinds, engine.params)),
            (
                "slots",
                f"{engine_config.slots} of {engine.capacity:,} tokens{less}, KV cache in {engine_config.kv_dtype}, "
                f"{format_bytes(engine.runner.cache_bytes)}",
            ),
            ("queue", f"{queue} more wait; prefix cache of {engine.prefix_cache.limit / 1e6:.0f} MB"),
            ("template", chat.template_name),
            ("documents", documents.summary if documents else ""),
            ("sampling", f"{origins}; what a request says wins"),
        ]
    )
    console.print_notes(*notes, documents.note if documents else None, *(note for _, more in trees for note in more))
    state = ServerState(
        names, model, SamplingParams(**fields), engine, sha256, chat, queue, price, base, adapter_folder, documents
    )
    for index, ((name, _), (tree, _)) in enumerate(zip(adapters, trees), 1):
        state.adapters.adapters[name] = state.adapters.put(index, tree)
    return state, ahead


def _make_engine(model: LoadedModel, adapters: Sequence[Path], engine_config: EngineConfig) -> tuple[Engine, tuple[str, ...]]:
    cfg = engine_config.model_config(model.cfg)
    is_whole = layout.current_mesh() is None
    with host_memory(not is_whole):
        params, notes = with_adapters(model.cfg, model.params, adapters)
        params = engine_config.prepare_params(cfg, params, is_whole)
    return Engine(cfg, jax.block_until_ready(layout.place(params)), engine_config), notes
