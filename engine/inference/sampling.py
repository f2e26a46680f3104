"""Sampling: from logits to tokens, by temperature, top-k, top-p, min-p, penalties and logit bias of each row's own.

A row's token depends on its logits, its seed and its position alone: the key is fold_in(key(seed),
position). So a request samples the same tokens in any slot and company.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from engine.inference.request import SamplingParams
from engine.model.config import ModelConfig

CANDIDATES = 256  # largest logits, searched first
BLOCK = 128  # tokens whose weights are summed first
BITS = 32  # of a word of a mask
SMALLEST_TEMPERATURE = 1e-6  # by which rows without one are divided: their samples are not used
IN_PROMPT = 1 << 20  # a prompt token's count in `TokenCounts.counts`, above any count in the output
# of SamplingArrays' fields, else float32
DTYPES = {"top_k": np.int32, "seed": np.uint32, "adjusts_logits": np.bool_}


class SamplingArrays(NamedTuple):
    """The fields of B rows' SamplingParams that programs read: (B,) of DTYPES."""

    # What `sample` reads
    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    seed: Array
    # What `adjust_logits` reads
    adjusts_logits: Array
    presence_penalty: Array
    frequency_penalty: Array
    repetition_penalty: Array


class TokenMasks(NamedTuple):
    """For how many steps each row is masked, (R,) int32, and the tokens allowed there, a bit each:
    (R, ceil(V/32)) uint32.
    """

    steps: Array
    allowed: Array


class TokenCounts(NamedTuple):
    """Each slot's logit bias (B, V) float32, and its output's count of each token (B, V) int32 (see
    IN_PROMPT).
    """

    bias: Array
    counts: Array


def sampling_arrays(rows: Sequence[SamplingParams]) -> SamplingArrays:
    columns: dict[str, Any] = {}
    for name in SamplingArrays._fields:
        columns[name] = np.array([getattr(row, name) for row in rows], DTYPES.get(name, np.float32))
    return SamplingArrays(**columns)


def make_token_masks(rows: int, vocab: int) -> TokenMasks:
    zeros: Any = np.zeros  # in place of JAX's arrays
    return TokenMasks(zeros(rows, np.int32), zeros((rows, -(-vocab // BITS)), np.uint32))


def make_token_counts(cfg: ModelConfig, slots: int) -> TokenCounts:
    return TokenCounts(jnp.zeros((slots, cfg.vocab)), jnp.zeros((slots, cfg.vocab), jnp.int32))


def count_prompt(
    prompt: Sequence[int], logit_bias: Mapping[int, float], vocab: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns a request's bias (V,) float32 and counts (V,) int32 before any output."""
    bias = np.zeros(vocab, np.float32)
    counts = np.zeros(vocab, np.int32)
    bias[[*logit_bias]] = [*logit_bias.values()]
    counts[[*prompt]] = IN_PROMPT
    return bias, counts


@jax.jit(donate_argnames="counts")
def set_token_counts(counts: TokenCounts, slot: Array, bias: Array, new: Array) -> TokenCounts:
    return TokenCounts(counts.bias.at[slot].set(bias), counts.counts.at[slot].set(new))


def adjust_logits(logits: Array, counts: TokenCounts, slots: Array, sampling: SamplingArrays) -> Array:
    """Returns logits (R, V) after bias and penalties by the counts of slots (R,), unchanged to the
    bit in rows without any.
    """
    counts = TokenCounts(counts.bias[slots], counts.counts[slots])
    in_output = counts.counts & (IN_PROMPT - 1)
    adjusts = sampling.adjusts_logits[:, None]
    presence = sampling.presence_penalty[:, None]
    frequency = sampling.frequency_penalty[:, None]
    repetition = sampling.repetition_penalty[:, None]
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    adjusted = jnp.where(counts.counts > 0, repeated, logits) + counts.bias
    adjusted = adjusted - frequency * in_output - jnp.where(in_output > 0, presence, 0)
    return jnp.where(adjusts, adjusted, logits)


def mask_logits(logits: Array, masked: Array, allowed: Array) -> Array:
    """Returns logits (R, V), -inf for the tokens that are not allowed in rows that are masked (R,);
    others are unchanged.
    """
    bits = (allowed[:, :, None] >> jnp.arange(BITS, dtype=jnp.uint32)) & 1
    is_allowed = bits.reshape(len(logits), -1)[:, : logits.shape[1]] > 0
    return jnp.where(is_allowed | ~masked[:, None], logits, -jnp.inf)


def sample(logits: Array, positions: Array, sampling: SamplingArrays) -> Array:
    """logits (B, V) float32, positions (B,) int32 of the tokens to come -> tokens (B,) int32."""
    # argmax by two plain passes, which a CPU does 4 times as fast. No number equals NaN.
    V = logits.shape[-1]
    best = jnp.min(jnp.where(logits == logits.max(-1, keepdims=True), jnp.arange(V), V), axis=-1)
    best = jnp.where(best < V, best, 0)

    def greedy() -> Array:
        return best

    def sampled() -> Array:
        return jnp.where(sampling.temperature > 0, _sample(logits, positions, sampling, best), best)

    return jax.lax.cond(jnp.any(sampling.temperature > 0), sampled, greedy)


def _sample(logits: Array, positions: Array, sampling: SamplingArrays, best: Array) -> Array:
    """As `sample`, for rows with a temperature; `best` (B,) int32 are the most probable tokens."""
    scaled = logits / jnp.maximum(sampling.temperature, SMALLEST_TEMPERATURE)[:, None]
    top = scaled.max(-1)
    has_threshold = (sampling.top_k > 0) | (sampling.top_p < 1)

    def threshold() -> Array:
        return _threshold(scaled, sampling)

    def no_threshold() -> Array:
        return jnp.full(has_threshold.shape, -jnp.inf)

    lowest = jax.lax.cond(jnp.any(has_threshold), threshold, no_threshold)
    lowest = jnp.maximum(jnp.where(has_threshold, lowest, -jnp.inf), top + jnp.log(sampling.min_p))
    weights = jnp.where(scaled >= lowest[:, None], jnp.exp(scaled - top[:, None]), 0.0)

    def draw(seed: Array, position: Array) -> Array:
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position)
        return jax.random.uniform(key)

    return _pick(weights, jax.vmap(draw)(sampling.seed, positions), best)


def _threshold(scaled: Array, sampling: SamplingArrays) -> Array:
    """(B, V) -> (B,): the lowest scaled logit that passes top-k, then top-p of what is left.

    Nearly always among the CANDIDATES largest, else found by bisection; nothing is sorted.
    """
    V = scaled.shape[-1]
    weights = jnp.exp(scaled - scaled.max(-1, keepdims=True))
    k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, V), V)
    # Without the barrier top_k would be compiled as a sort of everything: held by
    # tests/laws/test_barriers.py.
    ranked, _ = jax.lax.optimization_barrier(jax.lax.top_k(scaled, min(CANDIDATES, V)))
    size = ranked.shape[-1]
    # The weights of the candidates that pass top-k, and the sum that top-p wants of them.
    share = jnp.where(jnp.arange(size) < k[:, None], jnp.exp(ranked - ranked[:, :1]), 0.0)
    goal = sampling.top_p * jnp.where(k < V, share.sum(-1), weights.sum(-1))
    # A candidate passes if those above it do not sum to the goal yet.
    above = jnp.cumsum(share, -1) - share
    count = jnp.sum((above < goal[:, None]) & (share > 0), axis=-1)
    lowest = jnp.take_along_axis(ranked, jnp.maximum(count - 1, 0)[:, None], axis=-1)[:, 0]
    has_all = (k <= size) | ((k == V) & (count < size))  # whether all that pass are candidates

    def search() -> Array:
        kth = _largest(scaled, jnp.ones_like(scaled), k.astype(jnp.float32))
        among_k = jnp.where(scaled >= kth[:, None], weights, 0.0)
        return jnp.where(has_all, lowest, _largest(scaled, among_k, sampling.top_p * among_k.sum(-1)))

    def among_candidates() -> Array:
        return lowest

    return jax.lax.cond(jnp.all(has_all), among_candidates, search)


def _largest(x: Array, weights: Array, goal: Array) -> Array:
    """x, weights (B, V), goal (B,) -> the largest t (B,) for which the weights of x >= t sum to the
    goal; -inf if none.

    The bits of a float32, those below the sign flipped where it is negative, are integers in the
    same order.
    """

    def in_order(bits: Array) -> Array:
        return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)

    keys = in_order(jax.lax.bitcast_convert_type(x, jnp.int32))

    def bisect(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        # (low + high + 1) / 2 without the sum
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)
        reaches_goal = jnp.where(keys >= middle[:, None], weights, 0.0).sum(-1) >= goal
        return jnp.where(reaches_goal, middle, low), jnp.where(reaches_goal, high, middle - 1)

    least = in_order(jax.lax.bitcast_convert_type(jnp.float32(-jnp.inf), jnp.int32))
    low, _ = jax.lax.fori_loop(0, 32, bisect, (jnp.full_like(goal, least, jnp.int32), keys.max(-1)))
    return jax.lax.bitcast_convert_type(in_order(low), jnp.float32)


def _pick(weights: Array, u: Array, otherwise: Array) -> Array:
    """weights (B, V), u (B,) in [0, 1) -> (B,) int32: the token in whose share of the sum u lies.

    Where a float32 sum ends a hair short of the target it is `otherwise` (B,).
    """
    B, V = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -V % BLOCK))).reshape(B, -1, BLOCK)
    edges = jnp.cumsum(blocks.sum(-1), axis=-1)
    target = u * edges[:, -1]
    # First the block in which the target lies, by the sums of blocks.
    block = jnp.minimum(jnp.sum(edges <= target[:, None], axis=-1), edges.shape[-1] - 1)
    has_before = block > 0
    edge_before = jnp.take_along_axis(edges, jnp.maximum(block - 1, 0)[:, None], axis=-1)[:, 0]
    before = jnp.where(has_before, edge_before, 0.0)
    # Then the token in it, by the sums of the block's tokens.
    inner = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    inner_edges = jnp.cumsum(inner, axis=-1)
    is_below = inner_edges <= (target - before)[:, None]
    within = jnp.minimum(jnp.sum(is_below, axis=-1), BLOCK - 1)
    weight = jnp.take_along_axis(inner, within[:, None], axis=-1)[:, 0]
    return jnp.where(weight > 0, block * BLOCK + within, otherwise).astype(jnp.int32)
