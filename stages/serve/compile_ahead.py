"""Compiles the serving programs in a thread while the weights are read: the architecture and the options suffice."""

import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import Any

import jax

from engine.counting.params import leaf_shapes
from engine.inference.config import EngineConfig
from engine.inference.runner import compile_ahead
from engine.mesh import layout
from engine.model.config import ModelConfig
from engine.model.paths import unflatten


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
            for program in compile_ahead(cfg, shapes, config):
                self._compiled.put(program)
                if self._stopping:
                    break
        self._compiled.put(None)
