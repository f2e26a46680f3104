"""Plans the engine once the architecture is known; compiles its programs while the weights are read."""

import contextlib
import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from engine.counting import hardware
from engine.device import Device
from engine.inference.config import EngineConfig
from engine.inference.runner import compile_ahead
from engine.mesh import layout
from engine.model.config import ModelConfig
from engine.model.paths import unflatten
from engine.model.shapes import leaf_shapes


class CompileAhead:
    """Plans the engine as soon as the architecture is known, and compiles its programs in a thread.

    The weights are read meanwhile. Iterating it, once, yields what `compile_ahead` yields. A failure
    to compile is silent: a missing program is compiled when needed.
    """

    def __init__(self, config: EngineConfig, device: Device) -> None:
        # As planned, once `begin` has been called.
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
