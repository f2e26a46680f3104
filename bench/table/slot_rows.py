"""The rows of a prompt as it is served: prefilled into a slot chunk by chunk, and copied there from the prefix cache."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.table.row import Row, compiled
from engine.counting.flops import Flops, Part, prefill_flops
from engine.counting.memory import inference_memory
from engine.counting.traffic import prefill_bytes
from engine.inference.programs import prefill_chunk, read_chunk, write_chunk
from engine.inference.slots import CHUNK
from engine.model.cache.segmented import make_kv_segments
from engine.model.config import ModelConfig

SLOTS = 8
CHUNKED_PREFILL, PREFIX_CACHE_HIT = "chunked prefill into a slot", "prefix-cache hit"


def served_rows(cfg: ModelConfig, params: Any, tokens: np.ndarray) -> Iterator[Row]:
    """Yields the rows of a prompt, tokens (T,) int32 with T a multiple of 64, in one slot of a server of SLOTS: computed,
    and copied from the prefix cache. Neither samples a token."""
    (T,) = tokens.shape
    size = CHUNK if T % CHUNK == 0 else 64
    starts = range(0, T, size)
    pieces = [jnp.asarray(tokens[None, start : start + size]) for start in starts]
    at = [np.int32(start) for start in starts]
    slot = np.int32(SLOTS - 1)
    cache = make_kv_segments(cfg, SLOTS, T, size, "float32" if cfg.dtype == "float32" else "bfloat16")
    S = cache.edges[-1]
    prompt_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(cache)) // SLOTS * T // S

    chunks = len(pieces)
    prefill_program, cost = compiled(prefill_chunk, (cfg,), params, cache, pieces[0], slot, at[0], calls=chunks)

    def prefill() -> Any:
        nonlocal cache
        for piece, start in zip(pieces, at):
            cache = prefill_program(params, cache, piece, slot, start)
        return cache

    # A chunk meets every place of its slot. Only keys and values are wanted, so the last layer ends with them.
    parts = prefill_flops(cfg, size, attention="full", cached=S - size).parts
    blocks = {name: Part(part.forward // cfg.layers * (cfg.layers - 1)) for name, part in parts.items()}
    formula = Flops(blocks | {"qkv": parts["qkv"], "head": Part()})
    predicted = inference_memory(cfg, SLOTS, S, tokens=size)
    yield Row(
        CHUNKED_PREFILL, "inference", prefill, lambda: params, tokens=T,
        formula=formula * chunks, dtype=cfg.dtype, **cost,
        memory={"params": predicted.params, "cache": predicted.cache, "activations": predicted.working // SLOTS},
        moved=prefill_bytes(cfg, 1, size, S).total * chunks,
    )  # fmt: skip

    cached = [read_chunk(cache, slot, start, size) for start in at]
    copy_program, cost = compiled(write_chunk, (), cache, cached[0], slot, at[0], calls=chunks)

    def copy() -> Any:
        nonlocal cache
        for chunk, start in zip(cached, at):
            cache = copy_program(cache, chunk, slot, start)
        return cache

    yield Row(
        PREFIX_CACHE_HIT, "inference", copy, lambda: params, tokens=T, formula=Flops({}),
        memory={"cache": predicted.cache + prompt_bytes // chunks}, moved=2 * prompt_bytes, dtype=cfg.dtype, **cost,
    )  # fmt: skip
