"""Penalties and logit bias: how a request's logits are adjusted by the tokens it has so far, before one is sampled."""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from engine.inference.sampling import columns
from engine.inference.sampling_params import SamplingParams
from engine.model.config import ModelConfig

IN_PROMPT = 1 << 20  # what a token of the prompt counts in `TokenCounts.counts`, above any count of the output's


class TokenCounts(NamedTuple):
    """Of each slot: bias (B, V) float32, and counts (B, V) int32, how often its output has each token (see IN_PROMPT)."""

    bias: Array
    counts: Array


class PenaltyArrays(NamedTuple):
    """Of R rows: whether their logits are adjusted (R,) bool, and by which penalties (R,) float32."""

    adjusts_logits: Array
    presence_penalty: Array
    frequency_penalty: Array
    repetition_penalty: Array


def make_token_counts(cfg: ModelConfig, slots: int) -> TokenCounts:
    """Makes the counts of slots that have no bias and no tokens."""
    return TokenCounts(jnp.zeros((slots, cfg.vocab)), jnp.zeros((slots, cfg.vocab), jnp.int32))


def penalty_arrays(rows: Sequence[SamplingParams]) -> PenaltyArrays:
    """Gathers the SamplingParams of R rows into NumPy arrays (R,)."""
    return PenaltyArrays(*columns(rows, PenaltyArrays._fields, (np.bool_, *[np.float32] * 3)))


def count_prompt(prompt: Sequence[int], logit_bias: Mapping[int, float], vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the bias (V,) float32 and the counts (V,) int32 of a request that has no output yet."""
    bias, counts = np.zeros(vocab, np.float32), np.zeros(vocab, np.int32)
    bias[[*logit_bias]] = [*logit_bias.values()]
    counts[[*prompt]] = IN_PROMPT
    return bias, counts


@functools.partial(jax.jit, donate_argnames="counts")
def set_token_counts(counts: TokenCounts, slot: Array, bias: Array, new: Array) -> TokenCounts:
    """Replaces the slot's bias and counts by bias and new (V,)."""
    return TokenCounts(counts.bias.at[slot].set(bias), counts.counts.at[slot].set(new))


def adjust_logits(logits: Array, counts: TokenCounts, penalties: PenaltyArrays) -> Array:
    """logits (R, V) after bias and penalties, in rows that have any; to the bit as they were in the others."""
    in_output = counts.counts & (IN_PROMPT - 1)
    adjusts, presence, frequency, repetition = (values[:, None] for values in penalties)
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    adjusted = jnp.where(counts.counts > 0, repeated, logits) + counts.bias
    adjusted = adjusted - frequency * in_output - jnp.where(in_output > 0, presence, 0)
    return jnp.where(adjusts, adjusted, logits)
