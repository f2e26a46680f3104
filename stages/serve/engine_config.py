"""Configures the engine: number types and slots. That suffices to compile the programs before the weights are read."""

import contextlib
import dataclasses
import queue
import threading
from collections.abc import Iterator
from typing import Any

import jax

from engine.counting import hardware
from engine.counting.params import count_params, leaf_shapes
from engine.inference import decode
from engine.inference.engine import CHUNK, compile_ahead
from engine.inference.runner import MIN_ROWS
from engine.mesh import layout
from engine.model.cache.segmented import KVDtype, make_kv_segments
from engine.model.config import ModelConfig
from engine.model.paths import unflatten
from engine.model.weights.int8 import quantize
from engine.model.weights.lora import merge_lora

REMEDY = "give fewer --slots, a smaller --capacity, or --keys-values int8."
SMALL_CAPACITY = 2048  # tokens that a slot has by default even where they take more than the SHARE
SMALL_PREFIX_CACHE = 64 * 10**6  # bytes
SHARE = 0.5  # of free memory that weights and slots take at most by default


def default_weights(backend: str) -> str:
    """Returns the type of the weights' matrices where the flags name none."""
    return "int8" if backend == "cpu" else "bfloat16"


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """The options of an engine. `weights`: int8, bfloat16 or float32. The other fields are those of `Engine`.

    `capacity`: tokens of a slot. It and `prefix_cache_bytes` may be None until `with_capacity`.
    """

    weights: str
    slots: int = 8
    capacity: int | None = None
    kv_dtype: KVDtype = "bfloat16"
    prefix_cache_bytes: int | None = 0
    speculate: bool = True

    def model_config(self, cfg: ModelConfig) -> ModelConfig:
        """Returns cfg with `weights` as the compute dtype; as it is for int8."""
        return cfg if self.weights == "int8" else dataclasses.replace(cfg, dtype=self.weights)  # type: ignore[arg-type]

    def prepare_params(self, cfg: ModelConfig, params: Any, whole: bool = True) -> Any:
        """Returns params as the programs use them, `whole` on one device: adapters merged, and quantized for int8."""
        if self.weights == "int8":
            params = quantize(merge_lora(params, cfg.dtype))
        return decode.prepare_params(cfg, params, whole)

    @property
    def slot_options(self) -> dict[str, Any]:
        """The slots, capacity, kv_dtype and prefix_cache_bytes, which shape the programs of `Engine`; not `speculate`."""
        return {
            "slots": self.slots, "capacity": self.capacity, "kv_dtype": self.kv_dtype,
            "prefix_cache_bytes": self.prefix_cache_bytes,
        }  # fmt: skip

    def with_capacity(self, cfg: ModelConfig, free: int) -> "EngineConfig":
        """Returns this config with a capacity: its own, else the model's context, or, where weights and slots would take more
        than a SHARE of the `free` bytes, the largest power of two that does not, but at least SMALL_CAPACITY.

        Without a size of its own the prefix cache holds a slot's text, and at least SMALL_PREFIX_CACHE.
        """
        capacity, prefix = self.capacity or cfg.context, self.prefix_cache_bytes
        while not self.capacity and capacity > SMALL_CAPACITY and self._bytes(cfg, capacity) > SHARE * free:
            capacity = 1 << (capacity - 1).bit_length() - 1
        if prefix is None:
            prefix = max(SMALL_PREFIX_CACHE, self._slot_bytes(cfg, capacity))
        return dataclasses.replace(self, capacity=capacity, prefix_cache_bytes=prefix)

    def check_memory(self, cfg: ModelConfig) -> None:
        """Raises UserError when weights and slots are more than a CPU's memory holds. Allocates nothing."""
        assert self.capacity
        what = f"The weights and {self.slots:,} slots of {self.capacity:,} tokens take"
        hardware.require_memory(self._bytes(cfg, self.capacity), what, REMEDY)

    def _bytes(self, cfg: ModelConfig, capacity: int) -> int:
        slot, weights = self._slot_bytes(cfg, capacity), {"int8": 1, "bfloat16": 2, "float32": 4}[self.weights]
        prefix = slot if self.prefix_cache_bytes is None else self.prefix_cache_bytes
        return max(self.slots, MIN_ROWS) * slot + prefix + count_params(cfg).total * weights

    def _slot_bytes(self, cfg: ModelConfig, capacity: int) -> int:
        chunk = jax.eval_shape(lambda: make_kv_segments(cfg, 1, (0, CHUNK), self.kv_dtype))
        return -(-capacity // CHUNK) * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(chunk))


class CompileAhead:
    """Compiles the serving programs in a thread while the weights are read.

    Iterating it, once, yields what `compile_ahead` yields. A failure is silent: a missing program is compiled when needed.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._compiled: queue.SimpleQueue[tuple[str, int] | None] = queue.SimpleQueue()

    def begin(self, config: EngineConfig, cfg: ModelConfig) -> None:
        arguments = config, config.model_config(cfg), layout.current_mesh()
        self._thread = threading.Thread(target=self._run, args=arguments, daemon=True, name="ahead")
        self._thread.start()

    def __iter__(self) -> Iterator[tuple[str, int]]:
        while self._thread and (program := self._compiled.get()):
            yield program

    def stop(self) -> None:
        """Ends after the program that is being compiled."""
        self._stopping = True
        if self._thread:
            self._thread.join()

    def _run(self, config: EngineConfig, cfg: ModelConfig, mesh: Any) -> None:
        with contextlib.suppress(Exception), jax.set_mesh(mesh):
            loaded = {path: jax.ShapeDtypeStruct(shape, "float32") for path, shape in leaf_shapes(cfg).items()}
            shapes = jax.eval_shape(lambda params: config.prepare_params(cfg, params, mesh is None), unflatten(loaded))
            for program in compile_ahead(cfg, shapes, **config.slot_options):
                self._compiled.put(program)
                if self._stopping:
                    break
        self._compiled.put(None)
