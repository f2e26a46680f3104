"""SlotState: what the programs of `slots.Slots` work on, the weights, the KV cache and the token counts, and their warm-up.

On a CPU a call on positions below `short` gets only the segments there: such programs load in half the time. Those for longer
texts, which have the same numbers to the bit, are compiled later, in any thread.
"""

import contextlib
import itertools
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from engine import placement
from engine.inference import programs
from engine.inference.sampling import TokenCounts, make_token_counts
from engine.model.cache.segmented import KVDtype, KVSegments, make_kv_segments, segment_edges
from engine.model.config import ModelConfig
from engine.model.ops import platform
from engine.model.transformer import Params

MIN_ROWS = 2  # of a program, for one slot too: with one row a CPU's products take a slower path


class SlotShapes(NamedTuple):
    """What shapes the programs: positions of a slot, of a chunk, of a tail and of a short text, and a prefix cache's copies."""

    slots: int
    capacity: int
    kv_dtype: KVDtype
    chunk: int
    tail: int
    short: int
    has_prefix_cache: bool

    @property
    def rows(self) -> int:
        return max(self.slots, MIN_ROWS)

    @property
    def edges(self) -> tuple[int, ...]:
        return segment_edges(self.capacity, self.chunk)

    @property
    def short_edges(self) -> tuple[int, ...]:
        """The edges of the segments of short texts, at least one. An accelerator has no other texts: its memory is taken at
        once or not at all, and equal bits of two programs were never tested there."""
        edges = self.edges
        return edges[: 1 + max(1, sum(0 < edge <= self.short for edge in edges))] if platform() == "cpu" else edges

    def make_segments(self, cfg: ModelConfig, edges: tuple[int, ...]) -> KVSegments:
        return make_kv_segments(cfg, self.rows, edges, self.kv_dtype)

    def idle_calls(self, cfg: ModelConfig, params: Params, segments: Any, counts: Any) -> dict[str, programs.Call]:
        return programs.idle_calls(cfg, params, segments, counts, self.chunk, self.tail, self.has_prefix_cache)

    def compile_ahead(self, cfg: ModelConfig, params: Any) -> Iterator[tuple[str, int]]:
        """Compiles the programs for short texts, as it is iterated, from the shapes of `params` alone."""
        state = lambda: (self.make_segments(cfg, self.short_edges), make_token_counts(cfg, self.rows))
        return programs.compile_programs(self.idle_calls(cfg, params, *jax.eval_shape(state)))


class SlotState:
    """The weights, KV cache and token counts on the device, or on the mesh of the thread that makes them.

    A program gets the segments of `segments_below`, and `store` takes what it returns for them. `limit`: the
    positions of short texts. `has_long_programs`: whether longer ones have their segments and programs.
    """

    def __init__(self, cfg: ModelConfig, params: Params, shapes: SlotShapes) -> None:
        self.cfg, self.shapes, self.mesh = cfg, shapes, placement.current_mesh()
        edges, short = shapes.edges, shapes.short_edges
        self._short, self.limit, self.positions = len(short) - 1, short[-1], edges[-1]
        self.has_long_programs = False
        self._preparing = threading.Lock()
        self._prepared: tuple[KVSegments, dict[str, programs.Call]] | None = None
        self.params = self._device_put(params)
        self.segments, self.counts = self._make(lambda: (shapes.make_segments(cfg, short), make_token_counts(cfg, shapes.rows)))

    @property
    def cache_bytes(self) -> int:
        """Bytes of the KV cache, in use or not; those of segments that are still to be made count."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.segments)) * self.positions // self.segments.edges[-1]

    def segments_below(self, stop: int) -> KVSegments:
        """Returns the segments for a call on positions below `stop`: short texts', or all, after loading their programs."""
        if min(stop, self.positions) <= self.limit:
            return self.segments.part(0, self._short)
        self.load_long_programs()
        return self.segments

    def store(self, segments: KVSegments) -> None:
        """Keeps what a program returned for the segments that it got."""
        self.segments = segments.join(self.segments.part(len(segments.k[0]), None))

    def clear(self, slot: int, start: int, stop: int, reach: int) -> int:
        """Clears a slot's segments from `start` on that a call on positions below `stop` gets, if they begin below `reach`.

        Returns where the call's segments end.
        """
        segments = self.segments_below(stop)
        self.store(programs.clear_slot(segments, np.int32(slot), np.int32(start), np.int32(reach)))
        return segments.edges[-1]

    def warm(
        self, report: Callable[[int, int], None] | None, ahead: Iterable[tuple[str, int]], to_run_later: Collection[str]
    ) -> None:
        """Compiles every program for short texts and runs each once with no row in use, but for those `to_run_later`.

        `ahead` is what `compile_ahead` yields: a program that it compiled runs while the next is compiled.
        `report(ready, total)` counts programs.
        """
        with jax.set_mesh(self.mesh):
            # Compiled from shapes: a program that runs donates arrays while others are being compiled.
            calls = self._idle_calls(self.segments.part(0, self._short))
            pending = set(calls)
            with contextlib.closing(programs.compile_programs(calls)) as compiled:
                for name, count in itertools.chain(ahead, compiled):
                    if name in pending:
                        pending.remove(name)
                        if name not in to_run_later:
                            self._run_idle(*calls[name])
                        if report:
                            report(count - len(pending), count)
                    if not pending:
                        break

    def compile_long_programs(self) -> None:
        """Prepares what `load_long_programs` needs, in any thread; others may use the state meanwhile."""
        with self._preparing, jax.set_mesh(self.mesh):
            if self.has_long_programs or self._prepared:
                return
            edges = self.shapes.edges[self._short :]
            segments = self._make(lambda: self.shapes.make_segments(self.cfg, edges))
            calls = self._idle_calls(self.segments.join(segments)) if len(edges) > 1 else {}
            for _ in programs.compile_programs(calls):
                pass
            self._prepared = segments, calls

    def load_long_programs(self) -> None:
        """Adds the segments for longer texts, and runs each of their programs once with no row in use."""
        if self.has_long_programs:
            return
        self.compile_long_programs()
        assert self._prepared
        segments, calls = self._prepared
        self.segments = self.segments.join(segments)
        with jax.set_mesh(self.mesh):
            for call in calls.values():
                self._run_idle(*call)
        self.has_long_programs, self._prepared = True, None

    def _make(self, make: Callable[[], Any]) -> Any:
        return self._device_put(placement.make_sharded_cache(make))

    def _device_put(self, tree: Any) -> Any:
        """Puts arrays on a named device: for an unnamed one a program would be compiled once more."""
        return tree if self.mesh else jax.device_put(tree, jax.devices()[0])

    def _idle_calls(self, segments: KVSegments) -> dict[str, programs.Call]:
        return self.shapes.idle_calls(self.cfg, self.params, segments, self.counts)

    def _run_idle(self, program: Any, arguments: tuple[Any, ...]) -> None:
        """Runs a program on this state, with zeros for the other arrays, and keeps the state it returns."""
        zeros = lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding)
        real = lambda x: zeros(x) if isinstance(x, jax.ShapeDtypeStruct) else x

        def fill(argument: Any) -> Any:
            if isinstance(argument, KVSegments):
                return self.segments.part(0, len(argument.k[0]))
            return {dict: self.params, TokenCounts: self.counts}.get(type(argument)) or jax.tree.map(real, argument)

        results = program(*map(fill, arguments))
        # Only tuples: iterating over a JAX array would compile a program.
        for result in results if type(results) is tuple else (results,):
            if isinstance(result, KVSegments):
                self.store(result)
            elif isinstance(result, TokenCounts):
                self.counts = result
        jax.block_until_ready((results, self.segments))
