"""Properties of the layers as on paper; `test_beside_numpy.py` compares their numbers with those by hand."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engine.model import layers
from tests.tiny import B, T, normal, tiny_config

N, K, H = 6, 3, 4


@given(st.integers(0, 2000), st.integers(0, 2000), st.integers(0, 2000), st.integers(0, 99))
def test_rope_scores_depend_on_the_distance_alone(at, other, shift, seed):
    q, k = normal(seed, 1, 1, N, H), normal(seed + 1, 1, 1, N, H)

    def rotated(x, position):
        tables = layers.rope_tables(tiny_config(), jnp.array([[position]]))
        return np.asarray(layers.rope(x, *tables, 1.0, jnp.dtype("float32")))

    score = lambda p, s: (rotated(q, p) * rotated(k, s)).sum(-1)
    np.testing.assert_allclose(score(at, other), score(at + shift, other + shift), atol=5e-3)
    np.testing.assert_allclose(np.linalg.norm(rotated(q, at), axis=-1), np.linalg.norm(q, axis=-1), rtol=1e-5)


def test_a_query_that_sees_nothing_gives_numbers():
    q, k = normal(0, B, T, N, H), normal(1, B, K, 9, H)
    assert np.isfinite(layers.attention(q, k, k, np.zeros((B, T, 9), bool))).all()
