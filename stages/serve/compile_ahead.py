"""CompileAhead: compiles the serving programs in a thread while the weights load."""

import contextlib
import queue
import threading
from collections.abc import Iterator

import jax

from engine.counting.params import leaf_shapes
from engine.inference.slots import compile_ahead
from engine.model.config import ModelConfig
from engine.model.paths import unflatten
from stages.serve.layout import Layout


class CompileAhead:
    """Compiles what will be asked for, from the architecture alone, while another core reads the weights.

    Iterated, once, it yields what `compile_ahead` does, as that comes. Nothing depends on it: what it gets wrong or cannot
    do is done, or becomes an error, when the programs are wanted.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._compiled: queue.SimpleQueue[tuple[str, int] | None] = queue.SimpleQueue()

    def begin(self, cfg: ModelConfig) -> None:
        """Starts the thread."""
        self._thread = threading.Thread(target=self._run, args=(cfg,), daemon=True, name="ahead")
        self._thread.start()

    def __iter__(self) -> Iterator[tuple[str, int]]:
        while self._thread and (program := self._compiled.get()):
            yield program

    def stop(self) -> None:
        """Waits for the program that is being compiled, and compiles no other."""
        self._stop.set()
        if self._thread:
            self._thread.join()

    def _run(self, cfg: ModelConfig) -> None:
        try:
            with contextlib.suppress(Exception):
                cfg = self._layout.config(cfg)
                loaded = {path: jax.ShapeDtypeStruct(shape, "float32") for path, shape in leaf_shapes(cfg).items()}
                shapes = jax.eval_shape(lambda params: self._layout.params(cfg, params), unflatten(loaded))
                for program in compile_ahead(cfg, shapes, **self._layout.slot_options(cfg)):
                    self._compiled.put(program)
                    if self._stop.is_set():
                        break
        finally:
            self._compiled.put(None)
