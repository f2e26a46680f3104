"""The layers shaped by hand are the layers on paper: values, and gradients as `jax.grad` finds them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import B, T, normal

from engine.model import attention, backward, layers
from engine.model.weights import matmul as leaves

D, F, V, N, H = 20, 28, 41, 6, 4
F32, BF16 = jnp.dtype("float32"), jnp.dtype("bfloat16")
# Relative to the largest number of each result. In bfloat16 a number has 8 bits, and ours rounds at other places than the
# reference, which is computed in float32 from the same rounded inputs.
TOLERANCE = {F32: 1e-5, BF16: 2.5e-2}
DTYPES = pytest.mark.parametrize("dtype", [F32, BF16], ids=str)


def assert_alike(ours, reference, arguments, dtype) -> None:
    """Value, and gradient by every argument, of two functions under one random cotangent."""

    @functools.partial(jax.jit, static_argnums=0)
    def results(function, arguments, cotangent):
        out, pull = jax.vjp(function, *arguments)
        return out, pull(jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), cotangent, out))

    shapes = jax.eval_shape(reference, *arguments)
    cotangent = jax.tree.map(lambda leaf: normal(99, *leaf.shape), shapes)
    out, gradients = results(ours, arguments, cotangent)
    for gradient, argument in zip(gradients, arguments):
        assert (gradient.dtype, gradient.shape) == (argument.dtype, argument.shape)
    expected = results(reference, [a.astype(F32) for a in arguments], cotangent)
    for a, b in zip(jax.tree.leaves((out, gradients)), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b)
        assert np.abs(b).max() > 0.1, "nothing to compare"
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE[dtype] * np.abs(b).max())


# Few rows and many, which take different ways; a weight wider than tall, and taller than wide; one row alone.
PROJECTIONS = [  # dtype, rows, columns
    (F32, (B, T), F), (F32, (9, T), F), (F32, (9, T), 5), (F32, (1, 1), F), (BF16, (9, T), F), (BF16, (1, 1), 5),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "rows", "out"), PROJECTIONS)
def test_project(dtype, rows, out):
    x, w = normal(0, *rows, D, dtype=dtype), normal(1, D, out)
    assert_alike(lambda x, w: leaves.project(x, w, dtype), lambda x, w: x @ w, (x, w), dtype)


@DTYPES
@pytest.mark.parametrize("rows", [(B, T), (19, T)])
def test_project_two(dtype, rows):
    x, w = normal(0, *rows, D, dtype=dtype), normal(1, D, 2 * F)
    assert_alike(lambda x, w: leaves.project_two(x, w, dtype), lambda x, w: (x @ w[:, :F], x @ w[:, F:]), (x, w), dtype)


@DTYPES
@pytest.mark.parametrize("rows", [(B, T), (9, T)])
def test_unembed(dtype, rows):
    x, embed = normal(0, *rows, D, dtype=dtype), normal(1, V, D)
    assert_alike(lambda x, embed: leaves.unembed(x, embed, F32), lambda x, embed: x @ embed.T, (x, embed), dtype)


@DTYPES
def test_lookup_adds_up_the_gradients_of_a_token_that_comes_twice(dtype):
    tokens = jnp.array([[3, 3, 0, V - 1], [3, 5, 5, 0]])
    embed = normal(0, V, D, dtype=dtype)
    assert_alike(lambda e: leaves.lookup(e, tokens), lambda e: e[tokens], (embed,), dtype)


@DTYPES
@pytest.mark.parametrize("shape", [(B, T, D), (B, T, N, H)])
def test_rms_norm(dtype, shape):
    eps = 0.1  # large enough to be felt
    ours = lambda x, gain: backward.rms_norm(x, gain, eps, dtype)
    reference = lambda x, gain: layers.rms_norm(x, gain, eps, F32)
    assert_alike(ours, reference, (normal(0, *shape, dtype=dtype), normal(1, *shape[2:])), dtype)


@DTYPES
def test_swiglu(dtype):
    gate, up = 2 * normal(0, B, T, F, dtype=dtype), normal(1, B, T, F, dtype=dtype)
    assert_alike(
        lambda gate, up: backward.swiglu(gate, up, dtype), lambda gate, up: layers.swiglu(gate, up, F32), (gate, up), dtype
    )


@DTYPES
def test_rope(dtype):
    x, scale, angles = normal(0, B, T, N, H, dtype=dtype), normal(1, N), 3 * normal(2, B, T, H // 2)
    tables = jnp.cos(angles), jnp.sin(angles)
    ours = lambda x: backward.rope(x, scale, *tables, dtype)
    assert_alike(ours, lambda x: layers.rope(x, scale, *tables, F32), (x,), dtype)


BLOCK = attention.QUERY_BLOCK
ATTENTION = [  # dtype, key heads, tokens, documents a row
    (F32, 3, T, 1), (F32, 6, T, 1), (F32, 1, T, 3), (F32, 3, 2 * BLOCK, 1), (F32, 3, 2 * BLOCK, 3), (F32, 3, BLOCK + 5, 3),
    (BF16, 3, T, 3), (BF16, 3, 2 * BLOCK, 1),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "K", "T", "documents"), ATTENTION)
def test_causal_attention(dtype, K, T, documents):
    q, k, v = normal(0, B, T, N, H, dtype=dtype), normal(1, B, T, K, H, dtype=dtype), normal(2, B, T, K, H, dtype=dtype)
    starts = np.random.default_rng(3).permuted(np.tile(np.arange(T) < documents - 1, (B, 1)), axis=1)
    segments = jnp.asarray(starts.cumsum(1)) if documents > 1 else None
    mask = layers.causal_mask(T, segments)

    def reference(q, k, v):
        return layers.attention(q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), mask)

    ours = lambda q, k, v: attention.causal_attention(q, k, v, segments)
    assert_alike(ours, reference, (q, k, v), dtype)


def test_the_comparison_sees_a_wrong_gradient():
    @jax.custom_vjp
    def scaled(x):
        return 3 * x

    scaled.defvjp(lambda x: (3 * x, None), lambda _, g: (3.001 * g,))
    x = (normal(0, B, T),)
    assert_alike(lambda x: 3 * x, lambda x: 3 * x, x, F32)
    with pytest.raises(AssertionError):
        assert_alike(scaled, lambda x: 3 * x, x, F32)
