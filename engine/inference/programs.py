"""The compiled programs behind `slots.Slots`: read a chunk of one prompt, draw a few tokens for everyone, move chunks.

Their shapes depend on the model, the slots and the capacity, never on what is asked, so that all of them can be compiled
before the first request. They donate the spans and the tallies, which belong to requests, and no parameter.
"""

import functools
from collections.abc import Callable, Collection, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from engine.inference.sampling import SamplingArrays, columns, sample, sampling_arrays
from engine.inference.sampling_params import MAX_LOGPROBS, SamplingParams
from engine.model.cache.segmented import Kept, Rows, Spans, cleared, given, mirrored, span_cache, taken
from engine.model.config import ModelConfig
from engine.model.transformer import Params, forward, hidden_states

AT_ONCE = 2  # programs on the way to be compiled: tracing holds Python's lock, what follows does not
STEPS = 8  # tokens a dispatch at most
IN_PROMPT = 1 << 20  # what a token of the prompt counts in `Tally.said`, above any count of the completion's


class Tally(NamedTuple):
    """What changes each slot's logits: bias (B, V) float32, said (B, V) int32, how often each token has been said."""

    bias: Array
    said: Array


class PenaltyArrays(NamedTuple):
    """Of R rows: whether their logits are adjusted (R,) bool, and by which penalties (R,) float32."""

    adjusts_logits: Array
    presence_penalty: Array
    frequency_penalty: Array
    repetition_penalty: Array


def penalty_arrays(rows: Sequence[SamplingParams]) -> PenaltyArrays:
    """Gathers the SamplingParams of R rows into NumPy arrays (R,)."""
    return PenaltyArrays(*columns(rows, PenaltyArrays._fields, (np.bool_, *[np.float32] * 3)))


class Drawn(NamedTuple):
    """For each step and row: the token, whether there were numbers to draw it from, its log-probability, and the most
    probable tokens with theirs. token (STEPS, R) int32, sound bool, logprob float32, top_tokens and top (STEPS, R, X)."""

    token: Array
    sound: Array
    logprob: Array
    top_tokens: Array
    top: Array


def make_tally(cfg: ModelConfig, slots: int) -> Tally:
    """No bias, nothing said."""
    return Tally(jnp.zeros((slots, cfg.vocab)), jnp.zeros((slots, cfg.vocab), jnp.int32))


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames="spans")
def read_chunk(cfg: ModelConfig, params: Params, spans: Spans, tokens: Array, slot: Array, start: Array) -> Spans:
    """tokens (1, T) int32 of the slot's text from position `start` on: their keys and values are computed and kept."""
    rows = Rows(start[None], jnp.zeros((1,), jnp.int32), slot[None])
    positions = start + jnp.arange(tokens.shape[1])
    return hidden_states(cfg, params, tokens, positions[None], span_cache(spans, rows))[1].spans


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames=("spans", "tally"))
def draw(
    cfg: ModelConfig, params: Params, spans: Spans, tally: Tally, token: Array, rows: Rows,
    sampling: SamplingArrays, penalties: PenaltyArrays, steps: Array, logprobs: Array,
) -> tuple[Drawn, Spans, Tally]:  # fmt: skip
    """token (R,) int32, each standing at its row's position -> the `steps` tokens that follow, at most STEPS.

    Each is drawn from the logits of the one before. One program does one step or several, for one row or all: a row's
    numbers are the same to the bit. `logprobs` () bool: whether anybody asked for log-probabilities, else they are 0.
    """
    R = len(token)
    own = jnp.arange(R, dtype=jnp.int32)

    def step(i: Array, carry: tuple[Array, Spans, Tally, Drawn]) -> tuple[Array, Spans, Tally, Drawn]:
        token, spans, tally, drawn = carry
        position = jnp.where(rows.position < 0, -1, rows.position + i)
        cache = span_cache(spans, rows._replace(position=position))
        logits, cache = forward(cfg, params, token[:, None], jnp.maximum(position, 0)[:, None], cache)
        logits = logits[:, 0]
        with jax.named_scope("draw"):
            adjusted = jax.lax.cond(
                penalties.adjusts_logits.any(), _adjusted, lambda logits, *_: logits, logits, tally, penalties
            )
            token = sample(adjusted, position + 1, sampling)
            told = (token, jnp.isfinite(logits.max(-1)), *_log_probabilities(logits, token, logprobs))
            drawn = Drawn(*(array.at[i].set(new) for array, new in zip(drawn, told)))
            tally = tally._replace(said=tally.said.at[own, token].add(position >= 0))
        return token, cache.spans, tally, drawn

    empty = lambda dtype, *shape: jnp.zeros((STEPS, R, *shape), dtype)
    drawn = Drawn(empty(jnp.int32), empty(bool), empty(jnp.float32), empty(jnp.int32, top(cfg)), empty(jnp.float32, top(cfg)))
    _, spans, tally, drawn = jax.lax.fori_loop(0, steps, step, (token, spans, tally, drawn))
    return drawn, spans, tally


def compiled(
    cfg: ModelConfig, params: Params, spans: Spans, tally: Tally, *, chunks: Collection[int], kept: int | None, group: int
) -> Generator[tuple[str, int]]:
    """Compiles every program as it is going to be called, or fetches it from the compilation cache, several at a time.

    Tells each by name as it is ready (`draw`, `read N`, `clear`, `mirror`, `tell`, `take`, `give`), and how many there are.
    `params`, `spans` and `tally` may be shapes alone, as `described` tells them. `chunks`: lengths that prompts are read
    by; `kept`: that of chunks which are taken and given, None for none; `group`: rows that a lone stream may use.
    """
    zeros: Callable[..., Any] = lambda dtype, *shape: np.zeros(shape, dtype)
    R, at = spans.slots, np.int32(0)
    ints = zeros(np.int32, R)
    idle = [SamplingParams()] * R
    how = sampling_arrays(idle), penalty_arrays(idle)
    writes = zeros(np.int32, R + group * (group - 1))
    calls: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "draw": (draw, (cfg, params, spans, tally, ints, Rows(ints, writes, writes), *how, at, np.bool_(False))),
        **{f"read {size}": (read_chunk, (cfg, params, spans, zeros(np.int32, 1, size), at, at)) for size in chunks},
        "clear": (clear_slot, (spans, at, at)),
        "mirror": (mirror_slot, (spans, at, zeros(np.int32, group - 1), at)),
        "tell": (set_tally, (tally, at, zeros(np.float32, cfg.vocab), zeros(np.int32, cfg.vocab))),
    }
    if kept is not None:
        calls["take"] = take_chunk, (spans, at, at, kept)
        calls["give"] = give_chunk, (spans, chunk_of(spans, kept), at, at)
    ready: Callable[..., Any] = lambda program, given: program.lower(*given).compile()
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        futures = {pool.submit(ready, *call): name for name, call in calls.items()}
        for future in as_completed(futures):
            future.result()
            yield futures[future], len(calls)
    finally:  # whoever asks for no more waits for those that are under way alone
        pool.shutdown(cancel_futures=True)


def chunk_of(spans: Spans, length: int) -> Any:
    """The shapes of what `take_chunk` takes."""
    return described(take_chunk.eval_shape(spans, np.int32(0), np.int32(0), length))


def described(tree: Any) -> Any:
    """The shapes of arrays, as they lie on the first device: what a program is compiled for."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), tree)


def top(cfg: ModelConfig) -> int:
    """How many of the most probable tokens are told: MAX_LOGPROBS, or the whole of a smaller vocabulary."""
    return min(MAX_LOGPROBS, cfg.vocab)


def _adjusted(logits: Array, tally: Tally, penalties: PenaltyArrays) -> Array:
    """logits (R, V) after bias and penalties, in rows that have any; to the bit as they were in the others."""
    count = tally.said & (IN_PROMPT - 1)
    adjusts, presence, frequency, repetition = (values[:, None] for values in penalties)
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    adjusted = jnp.where(tally.said > 0, repeated, logits) + tally.bias
    adjusted = adjusted - frequency * count - jnp.where(count > 0, presence, 0)
    return jnp.where(adjusts, adjusted, logits)


def _log_probabilities(logits: Array, token: Array, asked: Array) -> tuple[Array, Array, Array]:
    """logits (R, V), token (R,) -> the token's log-probability (R,), the most probable tokens (R, X), and theirs."""
    R, X = len(token), min(MAX_LOGPROBS, logits.shape[-1])

    def told() -> tuple[Array, Array, Array]:
        total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        best, tokens = jax.lax.top_k(logits, X)
        return (jnp.take_along_axis(logits, token[:, None], axis=-1) - total)[:, 0], tokens, best - total

    untold = lambda: (jnp.zeros(R), jnp.zeros((R, X), jnp.int32), jnp.zeros((R, X)))
    return jax.lax.cond(asked, told, untold)


@functools.partial(jax.jit, donate_argnames="tally")
def set_tally(tally: Tally, slot: Array, bias: Array, said: Array) -> Tally:
    """bias and said (V,) become the slot's."""
    return Tally(tally.bias.at[slot].set(bias), tally.said.at[slot].set(said))


@functools.partial(jax.jit, donate_argnames="spans")
def clear_slot(spans: Spans, slot: Array, reach: Array) -> Spans:
    """See `spans.cleared`."""
    return cleared(spans, slot, reach)


@functools.partial(jax.jit, static_argnames="length")
def take_chunk(spans: Spans, slot: Array, start: Array, length: int) -> Kept:
    """See `spans.taken`."""
    return taken(spans, slot, start, length)


@functools.partial(jax.jit, donate_argnames="spans")
def give_chunk(spans: Spans, chunk: Any, slot: Array, start: Array) -> Spans:
    """See `spans.given`."""
    return given(spans, chunk, slot, start)


@functools.partial(jax.jit, donate_argnames="spans")
def mirror_slot(spans: Spans, slot: Array, targets: Array, reach: Array) -> Spans:
    """See `spans.mirrored`."""
    return mirrored(spans, slot, targets, reach)
