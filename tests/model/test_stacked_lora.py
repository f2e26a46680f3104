"""Adapters' products: the kernel in C near XLA's, for any shapes and numbers; a row without an adapter keeps its bits."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.model.native.library import native_problem
from engine.model.weights import stacked_lora
from engine.model.weights.stacked_lora import StackedLoRA, adapted

# Rows, inputs, adapters, columns of each matrix, rank: less than a vector and more, and odd numbers of all.
SHAPES = [(1, 3, 1, (5,), 1), (4, 64, 2, (64, 16, 16), 8), (7, 33, 3, (17, 1), 5), (2, 576, 2, (300,), 16)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@settings(max_examples=25)
@given(st.sampled_from(SHAPES), st.integers(0, 2**32 - 1))
def test_near_what_xla_gives(dtype, shape, seed):
    if problem := native_problem():
        pytest.skip(f"there is no kernel here: {problem}")
    rows, inputs, count, columns, rank = shape
    rng, ranks = np.random.default_rng(seed), len(columns) * rank
    numbers = lambda *sizes: rng.standard_normal(sizes) * 10.0 ** rng.uniform(-3, 1, (*sizes[:-1], 1))
    stored = lambda *sizes: rng.integers(-127, 128, sizes) if dtype == "int8" else numbers(*sizes)
    scale = numbers(count + 1, ranks).reshape(count + 1, len(columns), rank)
    for adapter, part in itertools.product(range(count + 1), range(len(columns))):
        scale[adapter, part, rng.integers(rank + 1) :] = 0  # ranks that it does not have
    a, b = (jnp.asarray(stored(count + 1, *sizes), dtype) for sizes in ((ranks, inputs), (rank, sum(columns))))
    index = jnp.asarray(rng.integers(0, count + 1, rows), jnp.int32)
    weight = StackedLoRA(None, a, b, jnp.asarray(scale.reshape(count + 1, ranks), jnp.float32), index, columns)
    whole, x = (jnp.asarray(numbers(rows, 1, size), jnp.float32) for size in (sum(columns), inputs))
    with pytest.MonkeyPatch.context() as patch:
        ours = np.asarray(jax.jit(adapted)(whole, x, weight))
        patch.setattr(stacked_lora, "has_kernel", lambda: False)
        theirs = np.asarray(jax.jit(lambda *arguments: adapted(*arguments))(whole, x, weight))
    has_none = np.asarray(index) == 0
    assert ours[has_none].tobytes() == np.asarray(whole)[has_none].tobytes()
    pair = lambda array: np.abs(np.asarray(array, np.float64))[np.asarray(index)]
    largest = np.abs(np.asarray(whole, np.float64))[:, 0]
    inner = np.einsum("ri,rqi->rq", np.abs(np.asarray(x, np.float64))[:, 0], pair(a)) * pair(weight.scale)
    ends = np.cumsum([0, *columns])
    for part, (start, stop) in enumerate(itertools.pairwise(ends)):
        own = inner[:, part * rank : (part + 1) * rank]
        largest[:, start:stop] += np.einsum("rq,rqo->ro", own, pair(b)[:, :, start:stop])
    assert (np.abs(ours - theirs)[:, 0] <= 2e-6 * largest).all()
