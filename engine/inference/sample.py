"""From logits to a token: greedy, or drawn after temperature, top-k, top-p and min-p, each row by its own settings.

A row's draw depends on its logits, its seed and its position alone. The key is fold_in(key(seed), position), so a
request draws the same tokens whatever slot it sits in, whoever sits beside it, and however often it is interrupted.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from engine.errors import UserError


class Sampling(NamedTuple):
    """The settings of B rows, each field (B,). Neutral values: temperature 1, top_k 0, top_p 1, min_p 0.

    Temperature 0 is greedy. top_k keeps the k most probable tokens, top_p the smallest set whose probability reaches p
    (Holtzman et al. 2019), min_p those at least min_p times as probable as the best (Nguyen et al. 2024); tokens that
    tie with the last one kept stay too.
    """

    temperature: Array  # float32
    top_k: Array  # int32
    top_p: Array  # float32
    min_p: Array  # float32
    seed: Array  # uint32


def make_sampling(
    rows: int, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, seed: int = 0
) -> Sampling:
    """The same settings for all rows, with seeds seed, seed + 1, ... so that rows differ. Raises UserError out of range."""
    if not 0 <= temperature <= 100:
        raise UserError(f"temperature must lie between 0 (greedy) and 100, not {temperature!r}.")
    if top_k < 0:
        raise UserError(f"top_k must be 0 (all tokens) or more, not {top_k!r}.")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p must be above 0 and at most 1 (all tokens), not {top_p!r}.")
    if not 0 <= min_p <= 1:
        raise UserError(f"min_p must lie between 0 (all tokens) and 1, not {min_p!r}.")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed must lie between 0 and 4294967295, not {seed!r}.")
    full = lambda value, dtype: jnp.full((rows,), value, dtype)
    return Sampling(
        full(temperature, jnp.float32), full(top_k, jnp.int32), full(top_p, jnp.float32), full(min_p, jnp.float32),
        jnp.uint32(seed) + jnp.arange(rows, dtype=jnp.uint32),
    )  # fmt: skip


def sample(logits: Array, positions: Array, sampling: Sampling) -> Array:
    """logits (B, V) float32, positions (B,) int32 of the tokens to come -> tokens (B,) int32."""
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.lax.cond(
        jnp.any(sampling.temperature > 0),
        lambda: jnp.where(sampling.temperature > 0, _draw(logits, positions, sampling), greedy),
        lambda: greedy,
    )


def _draw(logits: Array, positions: Array, sampling: Sampling) -> Array:
    scaled = logits / jnp.maximum(sampling.temperature, 1e-6)[:, None]
    cut = (sampling.top_k > 0) | (sampling.top_p < 1)
    lowest = jax.lax.cond(jnp.any(cut), lambda: _threshold(scaled, sampling), lambda: jnp.full(cut.shape, -jnp.inf))
    lowest = jnp.maximum(jnp.where(cut, lowest, -jnp.inf), scaled.max(-1) + jnp.log(sampling.min_p))
    kept = jnp.where(scaled >= lowest[:, None], scaled, -jnp.inf)
    return jnp.argmax(kept + _noise(sampling.seed, positions, logits.shape[-1]), axis=-1).astype(jnp.int32)


def _threshold(scaled: Array, sampling: Sampling) -> Array:
    """(B, V) -> (B,): the lowest scaled logit that top-k, then top-p of what is left, lets through."""
    V = scaled.shape[-1]
    ranked = jnp.sort(scaled, axis=-1, descending=True)
    k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, V), V)
    among_k = jnp.where(jnp.arange(V) < k[:, None], ranked, -jnp.inf)
    probability = jax.nn.softmax(among_k, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    count = jnp.sum((before < sampling.top_p[:, None]) & (among_k > -jnp.inf), axis=-1)
    return jnp.take_along_axis(ranked, jnp.maximum(count - 1, 0)[:, None], axis=-1)[:, 0]


def _noise(seeds: Array, positions: Array, V: int) -> Array:
    """(B, V) Gumbel noise: argmax of logits plus it is a draw from their softmax (Gumbel 1954; Maddison et al. 2014)."""

    def row(seed: Array, position: Array) -> Array:
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position), (V,))

    return jax.vmap(row)(seeds, positions)
