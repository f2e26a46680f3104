"""Prefill and decode for rows that start together, in one contiguous KV cache of just their size.

The shapes of `generate`'s programs depend on the number of rows, the capacity and the vocabulary, never on a request, so
nothing is compiled while text is generated. They donate the cache, and no parameter. On a CPU a lone prompt's program has a
second row for a draft token, whether there is one or not: its completion is the same to the bit.

`engine.Engine`, for requests that come and go, takes longer to its first token: on two cores of a Zen 3 0.6 s for 0.3 with the
demo, 2.3 s for 0.9 with 135 million parameters. Both sample the same tokens in float32; in bfloat16 they sum in another order.
"""

import dataclasses
from collections.abc import Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from engine.errors import UserError
from engine.inference.request import Event, Request, SamplingParams
from engine.inference.sampling import SamplingArrays, sample, sampling_arrays
from engine.inference.scheduler import STEPS_BETWEEN_DRAFTS
from engine.inference.sequence import STEPS, Sequence
from engine.mesh import layout
from engine.model.cache.contiguous import KVCache, make_cache
from engine.model.config import ModelConfig
from engine.model.native.library import native_problem
from engine.model.ops import ops, platform
from engine.model.paths import map_paths
from engine.model.transformer import Params, forward, hidden_states, logits_of
from engine.model.weights.int8 import Int8, pack_for_kernel, store_transposed
from engine.model.weights.lora import merge_lora
from engine.model.weights.matmul import cast_matrices

CHUNK = 64  # prompt tokens a prefill call; every prompt is padded to a multiple
LONE_ROWS = 2  # of a lone prompt's program on a CPU, whose products of one row take a slower path


def prepare_params(cfg: ModelConfig, params: Params, whole: bool = True) -> Params:
    """Prepares weights for inference, once: matrices in the compute dtype, adapters merged.

    Gains, biases and Int8 leaves stay; a CPU that holds them `whole` gets integers in the layout in which it multiplies them
    fastest, and for the kernel of `engine/model/native` where there is one.
    """

    transposes = whole and platform() == "cpu"

    def lay_out(_: str, leaf: Any) -> Any:
        if not (transposes and isinstance(leaf, Int8) and leaf.activations != "full"):
            return leaf
        return store_transposed(leaf) if native_problem() else pack_for_kernel(leaf)

    return cast_matrices(map_paths(lay_out, merge_lora(params, cfg.dtype)), cfg.dtype)


@jax.jit(static_argnames="cfg", donate_argnames="cache")
def prefill(cfg: ModelConfig, params: Params, tokens: Array, lengths: Array, cache: KVCache) -> tuple[Array, KVCache]:
    """tokens (B, T) int32, the first lengths (B,) of each row real -> logits (B, V) float32 after the last real one, cache.

    T tokens are written after each row's length, which then grows by `lengths`; a row must have room for T. The logits of
    a row of length 0 mean nothing.
    """
    positions = cache.length[:, None] + jnp.arange(tokens.shape[1])
    hidden, cache = hidden_states(cfg, params, tokens, positions, cache)
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    logits = logits_of(cfg, params, jnp.take_along_axis(hidden, last, axis=1)[:, 0])
    return logits, layout.pin_cache(cache._replace(length=cache.length + lengths))


def _decode_step(cfg: ModelConfig, params: Params, token: Array, cache: KVCache) -> tuple[Array, KVCache]:
    """token (B,) int32 -> logits (B, V) float32 of the token after it, and the cache with it written."""
    logits, cache = forward(cfg, params, token[:, None], cache.length[:, None], cache)
    return logits[:, 0], cache._replace(length=cache.length + 1)


decode_step = jax.jit(_decode_step, static_argnames="cfg", donate_argnames="cache")


@jax.jit(static_argnames=("cfg", "steps"), donate_argnames="cache")
def decode_steps(
    cfg: ModelConfig, params: Params, token: Array, cache: KVCache, sampling: SamplingArrays, steps: int = STEPS
) -> tuple[Array, KVCache]:
    """token (B,) int32 -> the `steps` tokens that follow, (B, steps) int32, and the cache with token and all but the last.

    Equals `decode_step` and `sample` in turn.
    """

    def step(carry: tuple[Array, KVCache], _: None) -> tuple[tuple[Array, KVCache], Array]:
        token, cache = carry
        logits, cache = _decode_step(cfg, params, token, cache)
        token = sample(logits, cache.length, sampling)
        return (token, cache), token

    (_, cache), tokens = jax.lax.scan(step, (token, cache), length=steps)
    return tokens.T, layout.pin_cache(cache)


@jax.jit(static_argnames="cfg", donate_argnames="cache")
def decode_alone(
    cfg: ModelConfig, params: Params, tokens: Array, cache: KVCache, sampling: SamplingArrays, steps: Array
) -> tuple[Array, KVCache]:
    """Decodes a lone sequence for `steps` steps. tokens (1, T) int32: its last one, then draft tokens or padding.

    Returns the token sampled after each, (STEPS, T) int32, of which the rows from `steps` on mean nothing, and the cache, whose
    length counts no draft token. One program does one step or several: a token's numbers are the same to the bit.
    """

    def step(i: Array, carry: Any) -> Any:
        tokens, cache, sampled = carry
        positions = cache.length[:, None] + jnp.arange(tokens.shape[1])
        logits, cache = forward(cfg, params, tokens, positions, cache)
        new = sample(logits[0], positions[0] + 1, sampling)
        return tokens.at[0, 0].set(new[0]), cache._replace(length=cache.length + 1), sampled.at[i].set(new)

    sampled = jnp.zeros((STEPS, tokens.shape[1]), jnp.int32)
    _, cache, sampled = jax.lax.fori_loop(0, steps, step, (tokens, cache, sampled))
    return sampled, layout.pin_cache(cache)


_first_tokens = jax.jit(sample)


def complete(
    cfg: ModelConfig, params: Params, prompts: Collection[list[int]], sampling: Collection[SamplingParams],
    *, capacity: int | None = None,
) -> list[tuple[list[int], str | None]]:  # fmt: skip
    """Returns the tokens of each prompt's completion and its finish reason. Arguments and errors are those of `generate`."""
    completions: list[tuple[list[int], str | None]] = [([], None)] * len(prompts)
    for row, tokens, reason, *_ in generate(cfg, params, prompts, sampling, capacity=capacity):
        completions[row] = [*completions[row][0], *tokens], reason
    return completions


def generate(
    cfg: ModelConfig, params: Params, prompts: Collection[list[int]], sampling: Collection[SamplingParams],
    *, capacity: int | None = None,
) -> Iterator[Event]:  # fmt: skip
    """Yields each prompt's new tokens until a stop token, `max_tokens`, or `capacity` (default: the model's context) in all.

    The first token comes after the prefill, then up to STEPS at a time. A CPU drafts for a lone prompt.

    `params` are those of `prepare_params`, placed on the mesh if there is one. A prompt ends with 'stop' when it samples one
    of its `stop_token_ids` (which is not yielded), else with 'length'. Raises UserError for a prompt that is empty or leaves
    no room, a token outside the vocabulary, not as many sampling parameters as prompts, or penalties, `logit_bias` and
    `logprobs`, which only `engine.Engine` knows.
    """
    capacity = cfg.context if capacity is None else capacity
    if not prompts or len(sampling) != len(prompts):
        raise UserError(f"generate needs a prompt and sampling parameters for each: {len(prompts)} and {len(sampling)} came.")
    if any(row.adjusts_logits or row.logprobs is not None for row in sampling):
        raise UserError("generate samples without penalties, logit_bias and logprobs; ask engine.Engine for them.")
    for index, prompt in enumerate(prompts):
        if not 0 < len(prompt) < capacity:
            raise UserError(
                f"Prompt {index} has {len(prompt)} tokens; from 1 to {capacity - 1} fit a context of {capacity}. "
                "Give a shorter prompt, or a model with a longer context."
            )
        if not 0 <= min(prompt) <= max(prompt) < cfg.vocab:
            raise UserError(f"Prompt {index} holds a token outside the vocabulary of {cfg.vocab}.")
    fits = [dataclasses.replace(row, max_tokens=min(row.max_tokens, capacity - len(p))) for p, row in zip(prompts, sampling)]
    running = [Sequence(index, Request(tuple(prompt), row)) for index, (prompt, row) in enumerate(zip(prompts, fits))]

    # Room for a last chunk's padding and a last dispatch's surplus: what lies there is never read.
    cache = layout.make_sharded_cache(lambda: make_cache(cfg, len(prompts), -(-capacity // CHUNK) * CHUNK + CHUNK))
    logits, cache = _prefill_all(cfg, params, prompts, cache)
    arrays = jax.device_put(sampling_arrays(fits))
    token = _first_tokens(logits, cache.length, arrays)
    fresh, drafts = np.asarray(token)[:, None].tolist(), None
    is_alone = len(prompts) == 1 and ops().pads_lone_row
    if is_alone:  # the draft token's row samples with the same parameters
        arrays = jax.device_put(sampling_arrays(fits * LONE_ROWS))
    while running:
        for sequence in running.copy():
            tokens, reason = sequence.accept(fresh[sequence.id], drafts)
            if reason:
                running.remove(sequence)
            if tokens or reason:
                yield Event(sequence.id, tokens, reason)
        if running and is_alone:
            fresh[0], drafts, cache = _decode_lone(cfg, params, running[0], cache, arrays)
        elif running:
            sampled, cache = decode_steps(cfg, params, token, cache, arrays)
            token, fresh = sampled[:, -1], np.asarray(sampled).tolist()


def _decode_lone(
    cfg: ModelConfig, params: Params, sequence: Sequence, cache: KVCache, sampling: SamplingArrays
) -> tuple[list[int], list[int] | None, KVCache]:
    """Returns the tokens sampled in one dispatch, the draft tokens after which all but the first were, and the cache."""
    drafts = sequence.draft_tokens(min(LONE_ROWS, sequence.remaining) - 1)
    steps = 1 if drafts else min(sequence.remaining, STEPS if drafts is None else STEPS_BETWEEN_DRAFTS)
    tokens: Any = np.full((1, LONE_ROWS), sequence.last_token, np.int32)
    if drafts:
        tokens[0, 1:] = drafts
    length: Any = np.array([sequence.position], np.int32)  # drops a rejected draft token
    cache = cache._replace(length=length)
    sampled, cache = decode_alone(cfg, params, tokens, cache, sampling, np.int32(steps))
    return (np.asarray(sampled)[0] if drafts else np.asarray(sampled)[:steps, 0]).tolist(), drafts, cache


def _prefill_all(cfg: ModelConfig, params: Params, prompts: Collection[list[int]], cache: KVCache) -> tuple[Array, KVCache]:
    after: Any = None
    for start in range(0, max(map(len, prompts)), CHUNK):
        chunks = [prompt[start : start + CHUNK] for prompt in prompts]
        lengths = np.array([len(chunk) for chunk in chunks], np.int32)
        tokens = np.array([chunk + [0] * (CHUNK - len(chunk)) for chunk in chunks], np.int32)
        logits, cache = prefill(cfg, params, tokens, lengths, cache)
        # In NumPy where prompts differ in chunks: for JAX it would be one more program to load, which most do without.
        after = logits if lengths.all() else np.where((lengths > 0)[:, None], logits, after)
    return after, cache
