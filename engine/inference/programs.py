"""The compiled programs of `slots.Slots`: prefill a chunk of one prompt, decode a few tokens for all, move chunks.

Their shapes depend on the model, the slots and the segments they get, never on a request, so all can be compiled before the
first one. They donate the KV cache and the token counts, and no parameter.
"""

import functools
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from engine import placement, sharding
from engine.inference.request import MAX_LOGPROBS, SamplingParams
from engine.inference.sampling import (
    PenaltyArrays,
    SamplingArrays,
    TokenCounts,
    adjust_logits,
    count_prompt,
    penalty_arrays,
    sample,
    sampling_arrays,
    set_token_counts,
)
from engine.inference.scheduler import DRAFT_ROWS
from engine.inference.sequence import STEPS
from engine.model.cache import segmented
from engine.model.cache.segmented import CacheRows, KVSegments, segmented_cache
from engine.model.config import ModelConfig
from engine.model.transformer import Params, forward, hidden_states

Call = tuple[Any, tuple[Any, ...]]  # a program and its arguments
COMPILED_AT_ONCE = 2  # tracing holds Python's lock


def _compiled(move: Callable[..., Any], **options: Any) -> Any:
    """Compiles a function that moves chunks; on a mesh what it returns lies as the KV cache does."""
    return jax.jit(functools.wraps(move)(lambda *args: sharding.pin_cache(move(*args))), **options)


clear_slot = _compiled(segmented.clear_slot, donate_argnames="segments")
copy_slot = _compiled(segmented.copy_slot, donate_argnames="segments")
read_chunk = _compiled(segmented.read_chunk, static_argnames="length")
write_chunk = _compiled(segmented.write_chunk, donate_argnames="segments")


class SampledTokens(NamedTuple):
    """The samples of each step and row; X is MAX_LOGPROBS, or a smaller vocabulary."""

    token: Array  # (STEPS, R) int32
    finite: Array  # (STEPS, R) bool: whether its logits were numbers
    logprob: Array  # (STEPS, R) float32
    top_tokens: Array  # (STEPS, R, X) int32: the most probable ones
    top_logprobs: Array  # (STEPS, R, X) float32


@jax.jit(static_argnames="cfg", donate_argnames="segments")
def prefill_chunk(
    cfg: ModelConfig, params: Params, segments: KVSegments, tokens: Array, slot: Array, start: Array
) -> KVSegments:
    """Writes the keys and values of tokens (1, T) int32 into a slot, from position `start` on."""
    rows = CacheRows(start[None], jnp.zeros((1,), jnp.int32), slot[None])
    positions = start + jnp.arange(tokens.shape[1])
    cache = hidden_states(cfg, params, tokens, positions[None], segmented_cache(segments, rows))[1]
    return sharding.pin_cache(cache.segments)


@jax.jit(static_argnames="cfg", donate_argnames=("segments", "counts"))
def decode_slots(
    cfg: ModelConfig, params: Params, segments: KVSegments, counts: TokenCounts, token: Array, rows: CacheRows,
    sampling: SamplingArrays, penalties: PenaltyArrays, steps: Array, logprobs: Array,
) -> tuple[SampledTokens, KVSegments, TokenCounts]:  # fmt: skip
    """token (R,) int32 at its row's position -> the `steps` tokens that follow, at most STEPS.

    One program does one step or several, for one row or all: a row's numbers are the same to the bit. Without `logprobs`
    () bool log-probabilities are 0.
    """
    R, X = len(token), min(MAX_LOGPROBS, cfg.vocab)
    own = jnp.arange(R, dtype=jnp.int32)

    def step(i: Array, carry: Any) -> Any:
        token, segments, counts, sampled = carry
        position = jnp.where(rows.position < 0, -1, rows.position + i)
        cache = segmented_cache(segments, rows._replace(position=position))
        logits, cache = forward(cfg, params, token[:, None], jnp.maximum(position, 0)[:, None], cache)
        logits = logits[:, 0]
        with jax.named_scope("sample"):
            adjusted = jax.lax.cond(
                penalties.adjusts_logits.any(), adjust_logits, lambda logits, *_: logits, logits, counts, penalties
            )
            token = sample(adjusted, position + 1, sampling)
            new = (token, jnp.isfinite(logits.max(-1)), *_log_probabilities(logits, token, X, logprobs))
            sampled = SampledTokens(*(array.at[i].set(row) for array, row in zip(sampled, new)))
            counts = counts._replace(counts=counts.counts.at[own, token].add(position >= 0))
        return token, cache.segments, counts, sampled

    zeros = lambda dtype, *shape: jnp.zeros((STEPS, R, *shape), dtype)
    sampled = SampledTokens(zeros(jnp.int32), zeros(bool), zeros(jnp.float32), zeros(jnp.int32, X), zeros(jnp.float32, X))
    _, segments, counts, sampled = jax.lax.fori_loop(0, steps, step, (token, segments, counts, sampled))
    return sampled, *sharding.pin_cache((segments, counts))


def _log_probabilities(logits: Array, token: Array, X: int, wanted: Array) -> tuple[Array, Array, Array]:
    """Returns each token's log-probability (R,), the X most probable tokens (R, X), and theirs."""
    R = len(token)

    def computed():
        total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        best, tokens = jax.lax.top_k(logits, X)
        return (jnp.take_along_axis(logits, token[:, None], axis=-1) - total)[:, 0], tokens, best - total

    return jax.lax.cond(wanted, computed, lambda: (jnp.zeros(R), jnp.zeros((R, X), jnp.int32), jnp.zeros((R, X))))


def idle_calls(
    cfg: ModelConfig, params: Params, segments: KVSegments, counts: TokenCounts, chunk: int, tail: int, prefix_cache: bool
) -> dict[str, Call]:
    """Returns each program by name, with the arguments of a call in which no row and no slot is in use.

    Of `params`, `segments` and `counts` only the shapes are read.
    """
    params, (segments, counts) = placement.inference_shapes(params, (segments, counts))
    R = segments.slots
    start, step, nowhere = np.int32(0), np.int32(1), np.int32(R)
    rows, idle = make_rows(np.full(R, -1, np.int32)), [SamplingParams()] * R
    sampling = sampling_arrays(idle), penalty_arrays(idle)
    state = cfg, params, segments
    calls: dict[str, Call] = {
        "decode_slots": (decode_slots, (*state, counts, np.zeros(R, np.int32), rows, *sampling, step, np.bool_(False)))
    }
    for size in {chunk, tail}:
        calls[f"prefill_chunk {size}"] = prefill_chunk, (*state, np.zeros((1, size), np.int32), nowhere, start)
    calls["clear_slot"] = clear_slot, (segments, nowhere, start, step)
    calls["copy_slot"] = copy_slot, (segments, nowhere, np.full(DRAFT_ROWS, R, np.int32), step)
    calls["set_token_counts"] = set_token_counts, (counts, nowhere, *count_prompt((), {}, cfg.vocab))
    for size in {chunk, tail} if prefix_cache else ():
        shape = lambda leaf, size=size: jax.ShapeDtypeStruct((2 * cfg.layers, leaf.shape[1], size, *leaf.shape[3:]), leaf.dtype)
        computed = placement.inference_shapes((), jax.tree.map(shape, segments.k[0][0]))[1]
        calls[f"read_chunk {size}"] = read_chunk, (segments, start, start, size)
        calls[f"write_chunk {size}"] = write_chunk, (segments, computed, nowhere, start, step)
    return calls


def compile_programs(calls: dict[str, Call]) -> Generator[tuple[str, int]]:
    """Compiles `idle_calls`, or reads them from the compilation cache; yields each name as it is ready, and the total."""
    pool = ThreadPoolExecutor(COMPILED_AT_ONCE, initializer=jax.set_mesh, initargs=(placement.current_mesh(),))
    compile_call = lambda program, arguments: program.lower(*arguments).compile()
    try:
        futures = {pool.submit(compile_call, *call): name for name, call in calls.items()}
        for future in as_completed(futures):
            future.result()
            yield futures[future], len(calls)
    finally:  # a caller that wants no more waits only for the programs under way
        pool.shutdown(cancel_futures=True)


def make_rows(position: Any, draft_writes: Iterable[tuple[int, int]] = ()) -> CacheRows:
    """Makes the CacheRows of R slots, row r at position[r] (R,) int32 in slot r; `draft_writes`: of speculative decoding.

    Row r is written to slot r, and each (row, slot) of `draft_writes` too: there is room for a lone sequence's rows in
    the slots of all its copies.
    """
    R = len(position)
    target: Any = np.full(R + (1 + DRAFT_ROWS) * DRAFT_ROWS, R, np.int32)
    source: Any = np.arange(len(target), dtype=np.int32) % R
    target[:R] = np.arange(R)
    for write, (row, slot) in enumerate(draft_writes, R):
        source[write], target[write] = row, slot
    return CacheRows(position, source, target)
