"""How a model is laid out to be served, and the programs for that, compiled before its weights are there."""

import contextlib
import dataclasses
import queue
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax

from engine.counting import hardware
from engine.counting.params import count_params, leaf_shapes
from engine.device import Device
from engine.inference import decode
from engine.inference.quantize import quantize
from engine.inference.slots import CHUNK, compile_ahead
from engine.model.cache.segmented import make_kv_segments
from engine.model.config import ModelConfig
from engine.model.paths import map_paths, unflatten
from engine.model.weights.lora import LoRA
from engine.model.weights.matmul import dense

if TYPE_CHECKING:
    from stages.serve.flags import Serve

USUAL_CAPACITY = 2048
MB = 10**6
FEWER = "Give fewer --slots, a smaller --capacity, or --keys-values int8."


def kept_as(cfg: ModelConfig, given: "Serve", started: Device) -> tuple[str, ModelConfig]:
    """What matrices are kept as, and the config that computes so."""
    weights = given.weights or ("int8" if started.backend == "cpu" else "bfloat16")
    return weights, cfg if weights == "int8" else dataclasses.replace(cfg, dtype=weights)  # type: ignore[arg-type]


def as_served(cfg: ModelConfig, params: Any, weights: str) -> Any:
    """params as they are multiplied by: adapters folded, whole numbers where `weights` is int8."""
    if weights == "int8":
        fold = lambda _, leaf: dense(leaf).astype(cfg.dtype) if isinstance(leaf, LoRA) else leaf
        params = quantize(map_paths(fold, params))
    return decode.for_inference(cfg, params)


def options(cfg: ModelConfig, given: "Serve") -> dict[str, Any]:
    """Of the slots: what shapes their programs."""
    return {
        "slots": given.slots, "capacity": given.capacity or min(cfg.context, USUAL_CAPACITY), "kv_dtype": given.keys_values,
        "prefix_cache_bytes": given.prefix_cache * MB,
    }  # fmt: skip


def check_room(cfg: ModelConfig, given: "Serve", started: Device) -> None:
    """Raises UserError, before anything is taken, when weights and slots are more than a CPU's memory holds."""
    asked, weights = options(cfg, given), kept_as(cfg, given, started)[0]
    if started.backend != "cpu" or asked["capacity"] > cfg.context:  # which is refused for itself
        return
    room = jax.eval_shape(lambda: make_kv_segments(cfg, asked["slots"], asked["capacity"], CHUNK, asked["kv_dtype"]))
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(room)) + asked["prefix_cache_bytes"]
    needed += count_params(cfg).total * {"int8": 1, "bfloat16": 2, "float32": 4}[weights]
    what = f"The weights and {asked['slots']:,} slots of {asked['capacity']:,} tokens"
    hardware.check_room(what, needed, remedy=FEWER)


class Ahead:
    """Compiles from the architecture alone what will be asked for, while another core reads the weights.

    Iterated, once, it tells what `compile_ahead` does, as that comes. Nothing depends on it: what it gets wrong or cannot
    do is done, or said, when the programs are wanted.
    """

    def __init__(self, given: "Serve", started: Device) -> None:
        self._given, self._started = given, started
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._told: queue.SimpleQueue[tuple[str, int] | None] = queue.SimpleQueue()

    def begin(self, cfg: ModelConfig) -> None:
        """Starts, in a thread of its own; not for room that the model cannot use, which is refused once it is loaded."""
        if (self._given.capacity or 0) > cfg.context:
            return
        self._thread = threading.Thread(target=self._run, args=(cfg,), daemon=True, name="ahead")
        self._thread.start()

    def __iter__(self) -> Iterator[tuple[str, int]]:
        while self._thread and (told := self._told.get()):
            yield told

    def stop(self) -> None:
        """Waits for what is under way, and lets nothing follow it."""
        self._stop.set()
        if self._thread:
            self._thread.join()

    def _run(self, cfg: ModelConfig) -> None:
        try:
            with contextlib.suppress(Exception):
                weights, cfg = kept_as(cfg, self._given, self._started)
                read = {path: jax.ShapeDtypeStruct(shape, "float32") for path, shape in leaf_shapes(cfg).items()}
                shapes = jax.eval_shape(lambda params: as_served(cfg, params, weights), unflatten(read))
                for told in compile_ahead(cfg, shapes, **options(cfg, self._given)):
                    self._told.put(told)
                    if self._stop.is_set():
                        break
        finally:
            self._told.put(None)
