"""Adapters' products: the kernels in C near XLA's, for any shapes and numbers; a row without an adapter keeps its bits."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.model.native.library import native_problem
from engine.model.weights import stacked_lora
from engine.model.weights.blocks import round_to_blocks
from engine.model.weights.matmul import project
from engine.model.weights.stacked_lora import StackedLoRA, adapter_product

# Rows, inputs, adapters, columns of each matrix, rank: less than a vector and more, and odd numbers
# of all.
SHAPES = [(1, 32, 1, (5,), 1), (4, 64, 2, (64, 16, 16), 8), (7, 96, 3, (17, 1), 5), (2, 576, 2, (300,), 16)]
F32 = jnp.dtype("float32")
BASES = {
    "apart": None,
    "blocks": lambda base: round_to_blocks(base, "Q4_0"),
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@settings(max_examples=6)
@given(st.sampled_from(SHAPES), st.integers(0, 2**32 - 1))
def test_near_what_xla_gives(dtype, base, shape, seed):
    """Apart, where the base is multiplied by XLA, and in the call that multiplies by the base."""
    if problem := native_problem():
        pytest.skip(f"there is no kernel here: {problem}")
    rows, inputs, count, columns, rank = shape
    if base == "apart":
        inputs += seed % 3
    rng, ranks = np.random.default_rng(seed), len(columns) * rank
    numbers = lambda *sizes: rng.standard_normal(sizes) * 10.0 ** rng.uniform(-3, 1, (*sizes[:-1], 1))
    stored = lambda *sizes: rng.integers(-127, 128, sizes) if dtype == "int8" else numbers(*sizes)
    scale = numbers(count + 1, ranks).reshape(count + 1, len(columns), rank)
    for adapter, part in itertools.product(range(count + 1), range(len(columns))):
        # ranks that it does not have
        scale[adapter, part, rng.integers(rank + 1) if adapter else 0 :] = 0
    a, b = (
        jnp.asarray(stored(count + 1, *sizes), dtype) for sizes in ((ranks, inputs), (rank, sum(columns)))
    )
    index = jnp.asarray(rng.integers(0, count + 1, rows), jnp.int32)
    make, x = BASES[base], jnp.asarray(numbers(rows, 1, inputs), F32)
    under = make and make(jnp.asarray(numbers(inputs, sum(columns)), F32))
    weight = StackedLoRA(under, a, b, jnp.asarray(scale.reshape(count + 1, ranks), F32), index, columns)
    plain = (
        np.asarray(jax.jit(lambda x: project(x, under, F32))(x))
        if make
        else np.zeros((rows, 1, sum(columns)), np.float32)
    )
    product = (
        (lambda x, weight: project(x, weight, F32)) if make else lambda x, weight: adapter_product(x, weight)
    )
    ours = np.asarray(jax.jit(product)(x, weight))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stacked_lora, "computes_in_c", lambda: False)
        theirs = plain + np.asarray(jax.jit(lambda x, weight: adapter_product(x, weight))(x, weight))
    has_none = np.asarray(index) == 0
    assert (ours[has_none] == plain[has_none]).all()
    pair = lambda array: np.abs(np.asarray(array, np.float64))[np.asarray(index)]
    largest = np.abs(plain[:, 0], dtype=np.float64)
    inner = np.einsum("ri,rqi->rq", np.abs(np.asarray(x, np.float64))[:, 0], pair(a)) * pair(weight.scale)
    for part, (start, stop) in enumerate(itertools.pairwise(np.cumsum([0, *columns]))):
        own = inner[:, part * rank : (part + 1) * rank]
        largest[:, start:stop] += np.einsum("rq,rqo->ro", own, pair(b)[:, :, start:stop])
    assert (np.abs(ours - theirs)[:, 0] <= 2e-6 * largest).all()
