"""KVCache: a row is written at its own length, and what lies beyond it is never read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.model.flax_modules import write_rows
from engine.model.transformer import KVCache, forward, make_cache
from tests.tiny import lively_params, positions_of, tiny_config, tokens_of

B, S = 2, 11
run = jax.jit(forward, static_argnums=0)


def test_each_row_is_written_at_its_own_place_and_nowhere_else():
    rng = np.random.default_rng(0)
    cached, new = rng.standard_normal((B, 3, S, 4)), rng.standard_normal((B, 3, 5, 4))
    expected = cached.copy()
    expected[0, :, 2:7], expected[1, :, 6:11] = new
    written = write_rows(jnp.asarray(cached), jnp.asarray(new), jnp.array([2, 6]))
    np.testing.assert_array_equal(written, expected.astype(np.float32))


def fill_unwritten(cache: KVCache, with_: float) -> KVCache:
    """The same cache with rubbish where nothing has been written."""
    fresh = np.arange(S)[:, None] >= np.asarray(cache.length)[:, None, None, None]  # (B, 1, S, 1)
    dirty = lambda leaf: jnp.where(fresh, jnp.asarray(with_, leaf.dtype), leaf)
    return KVCache(*jax.tree.map(dirty, (cache.k, cache.v)), cache.length)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rubbish", [1e4, float("nan"), float("inf"), float("-inf")])
def test_what_lies_beyond_a_row_does_not_matter_to_the_bit(dtype, rubbish):
    """A slot may hold another request's numbers, or ones that are none: 0 x NaN would poison every
    token after.
    """
    cfg = tiny_config(dtype=dtype)
    params = lively_params(cfg)
    tokens, lengths = tokens_of(0, B, 5), jnp.array([5, 3])
    _, cache = run(cfg, params, tokens, positions_of(B, 5), make_cache(cfg, B, S))
    cache = fill_unwritten(cache._replace(length=lengths), 0.0)

    def after(cache: KVCache, T: int) -> np.ndarray:
        logits, cache = run(cfg, params, tokens_of(1, B, T), lengths[:, None] + jnp.arange(T), cache)
        assert cache.length.tolist() == [5, 3]
        again, _ = run(
            cfg, params, tokens_of(2, B, 1), lengths[:, None] + T, cache._replace(length=lengths + T)
        )
        return np.concatenate([logits, again], axis=1)

    for T in (1, 5):
        clean = after(cache, T)
        assert np.isfinite(clean).all()
        np.testing.assert_array_equal(after(fill_unwritten(cache, rubbish), T), clean)
