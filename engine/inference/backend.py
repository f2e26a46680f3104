"""Where an engine computes: InC, by the kernels in C beside XLA's programs, or ByXla, by XLA alone."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from engine.inference.sampling import TokenCounts
from engine.mesh import layout
from engine.model.cache import in_c, segmented
from engine.model.cache.in_c import KVInC
from engine.model.cache.segmented import KVDtype, KVSegments, make_kv_segments, segment_edges
from engine.model.config import ModelConfig
from engine.model.ops import computes_in_c
from engine.model.paths import Params
from engine.model.weights.blocks import has_only_blocks

# of a decoding program, for one slot too: with one row a CPU's products take a slower path
MIN_ROWS = 2
Cache = tuple[KVSegments, TokenCounts]


def _clear_slot(segments: KVSegments, slot: Any, max_positions: Any) -> KVSegments:
    return layout.pin_cache(segmented.clear_slot(segments, slot, max_positions))


def _copy_slot(segments: KVSegments, slot: Any, targets: Any, max_positions: Any) -> KVSegments:
    return layout.pin_cache(segmented.copy_slot(segments, slot, targets, max_positions))


clear_slot = jax.jit(_clear_slot, donate_argnames="segments")
copy_slot = jax.jit(_copy_slot, donate_argnames="segments")


@dataclasses.dataclass(frozen=True)
class ByXla:
    """XLA attends to whole segments, by row and slot alike, and unpacks blocks before it multiplies
    by them.
    """

    in_c = False
    # whether a row may read any slot: a single sequence's drafts need no copies then
    shares_slots = False
    clears_slots = True  # what an old text left in a segment is multiplied by 0, and must be no NaN

    def edges(self, capacity: int, first: int, chunk: int) -> tuple[int, ...]:
        """Returns where segments for `capacity` tokens start, and where the last ends: at a
        multiple of `chunk`.
        """
        return segment_edges(capacity, first, chunk)

    def make_segments(self, cfg: ModelConfig, slots: int, edges: Sequence[int], dtype: KVDtype) -> KVSegments:
        return make_kv_segments(cfg, slots, edges, dtype)

    def make_cache(self, make: Callable[[], Cache]) -> Cache:
        """Returns what `make` returns: segments and counts, all zeros."""
        return make()

    def few_rows(self, rows: int, params: Params) -> int:
        """Returns the rows of a second decoding program, beside that of all `rows`, for when few
        are in use; 0 for none.
        """
        return 0

    def slot_programs(self, segments: KVSegments, drafts: int) -> dict[str, Any]:
        """Returns programs that clear and copy slots, each with arguments that change none; at most
        `drafts` copies at once.
        """
        nowhere = np.int32(segments.slots)
        targets = np.full(drafts, nowhere, np.int32)
        return {
            "clear_slot": (clear_slot, (segments, nowhere, np.int32(1))),
            "copy_slot": (copy_slot, (segments, nowhere, targets, np.int32(1))),
        }


@dataclasses.dataclass(frozen=True)
class InC:
    """Kernels in C attend to a row's own text, in any slot, and multiply by blocks as they are."""

    in_c = True
    shares_slots = True
    clears_slots = False

    def edges(self, capacity: int, first: int, chunk: int) -> tuple[int, ...]:
        """Returns the ends of one segment."""
        return segment_edges(capacity, capacity, chunk)

    def make_segments(self, cfg: ModelConfig, slots: int, edges: Sequence[int], dtype: KVDtype) -> KVSegments:
        return make_kv_segments(cfg, slots, edges, dtype, KVInC)

    def make_cache(self, make: Callable[[], Cache]) -> Cache:
        """As of ByXla, without the memory, which is taken as it is written."""
        segments, counts = jax.eval_shape(make)
        return in_c.empty_cache(segments), jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), counts)

    def few_rows(self, rows: int, params: Params) -> int:
        """Blocks give a row the same bits among any number of rows."""
        if rows <= MIN_ROWS or not has_only_blocks(params):
            return 0
        return MIN_ROWS

    def slot_programs(self, segments: KVSegments, drafts: int) -> dict[str, Any]:
        return {}


Backend = ByXla | InC


def choose_backend() -> Backend:
    """Returns InC on one CPU where the kernels can be built, else ByXla. Starts JAX, and asks for this
    thread's mesh.
    """
    if computes_in_c():
        return InC()
    return ByXla()
