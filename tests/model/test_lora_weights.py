"""LoRA leaves: nothing at first, to the bit; then base + scale a b, forward and backward, few rows and many."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import normal, tiny_config

from engine.model.paths import merge
from engine.model.weights.int8 import dequantize, quantize_matrix
from engine.model.weights.lora import LoRA, make_adapter, to_dense
from engine.model.weights.matmul import cast_matrices, project, project_two

D, F = 20, 28
F32, BF16 = jnp.dtype("float32"), jnp.dtype("bfloat16")
TOLERANCE = {F32: 1e-5, BF16: 5e-2}
BOTH = ((0, F), (F, 2 * F))
FEW, MANY = (1, 3), (29, 7)


def adapter(columns=BOTH, rank: int = 3, seed: int = 0) -> LoRA:
    """One that has learned something: neither a nor b is 0."""
    leaf = make_adapter(jax.random.key(seed), D, columns, rank, 7.0)
    return dataclasses.replace(leaf, b=normal(seed + 7, *leaf.b.shape) / 4)


def explicit(leaf: LoRA, base: jax.Array) -> jax.Array:
    """base + scale a b by the definition."""
    for start, stop, a, b in leaf.parts():
        base = base.at[:, start:stop].add(leaf.scale * a @ b)
    return base


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [((1, 1), BOTH), (FEW, ((5, 9), (9, 50))), (MANY, BOTH), (MANY, BOTH[:1])])
def test_at_first_it_changes_no_bit(dtype, rows, columns):
    x, base = normal(0, *rows, D, dtype=dtype), normal(1, D, 2 * F).at[3, 4].set(-0.0)
    leaf = make_adapter(jax.random.key(0), D, columns, 3, 7.0).on(base)
    assert leaf.a.any()
    assert not leaf.b.any()
    for multiply in (project, project_two):
        results = jax.jit(lambda leaf, multiply=multiply: multiply(x, leaf, dtype))
        for plain, adapted in zip(results(base), results(leaf), strict=True):
            assert np.asarray(plain).tobytes() == np.asarray(adapted).tobytes()
    assert np.asarray(to_dense(leaf)).tobytes() == np.asarray(base).tobytes()


@pytest.mark.parametrize(("rows", "multiply"), [(MANY, project_two), (FEW, project)])
def test_on_int8_it_is_its_base_and_what_it_adds(rows, multiply):
    """On the other kinds, `test_its_gradient_is_that_of_the_weight_it_stands_for` compares the product too."""
    x, base = normal(0, *rows, D), normal(1, D, 2 * F)
    under = quantize_matrix(base, "int8")
    leaf = adapter(BOTH[1:] if multiply is project else BOTH).on(under)
    out = jax.jit(lambda leaf: multiply(x, leaf, F32))(leaf)
    out = jnp.concatenate(out, -1) if multiply is project_two else out
    np.testing.assert_allclose(out, project(x, under, F32) + x @ explicit(leaf, jnp.zeros_like(base)), atol=1e-4)


GRADIENTS = [  # way to multiply, dtype, rows, kind of base, adapted columns
    (project, F32, FEW, "array", BOTH), (project, F32, MANY, "array", ((5, 9), (30, 50))), (project, BF16, MANY, "array", BOTH),
    (project, F32, FEW, "full", ((5, 9),)), (project, F32, MANY, "full", BOTH), (project_two, F32, FEW, "array", BOTH[1:]),
    (project_two, F32, MANY, "array", BOTH), (project_two, F32, MANY, "array", BOTH[1:]),
    (project_two, BF16, MANY, "full", BOTH),
]  # fmt: skip


@pytest.mark.parametrize(("multiply", "dtype", "rows", "kind", "columns"), GRADIENTS)
def test_its_gradient_is_that_of_the_weight_it_stands_for(multiply, dtype, rows, kind, columns):
    x, base = normal(0, *rows, D, dtype=dtype), normal(1, D, 2 * F)
    under = base if kind == "array" else quantize_matrix(base, "full")
    wide = base if kind == "array" else dequantize(under)
    g = normal(5, *rows, 2 * F)

    def ours(alone, x):
        out = multiply(x, alone.on(under), dtype)
        return (jnp.concatenate(out, -1) if multiply is project_two else out).astype(F32)

    def reference(alone, x):
        return x.astype(F32) @ explicit(alone, wide)

    results = []
    for function in (ours, reference):
        out, pull = jax.vjp(jax.jit(function), adapter(columns), x)
        results.append((out, pull(g)))
    for actual, expected in zip(*map(jax.tree.leaves, results), strict=True):
        actual, expected = np.asarray(actual, np.float32), np.asarray(expected, np.float32)
        assert np.abs(expected).max() > 0.1, "nothing to compare"
        np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE[dtype] * np.abs(expected).max())


@pytest.mark.parametrize("rows", [FEW, MANY])
def test_adapters_on_one_base_add_up_and_what_lies_under_one_is_frozen(rows):
    x, base = normal(0, *rows, D), normal(1, D, 2 * F)
    first, second = adapter(BOTH[:1], seed=1), adapter(rank=2, seed=2)
    both = merge({"w": second}, merge({"w": first}, {"w": base}))["w"]
    np.testing.assert_allclose(project(x, both, F32), x @ explicit(second, explicit(first, base)), atol=1e-4)
    gradient = jax.grad(lambda leaf: project(x, leaf, F32).sum())(both)
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient.base))
    assert gradient.a.any()
    assert gradient.b.any()


def test_an_adapter_has_numbers_only_for_what_it_adapts():
    cfg = tiny_config()
    columns = [cfg.parts["qkv"]["v"], cfg.parts["qkv"]["q"]]
    leaf = make_adapter(jax.random.key(0), D, columns, 3, 12.0)
    assert (leaf.a.shape, leaf.b.shape, leaf.scale, leaf.rank) == ((20, 6), (3, 24 + 12), 4.0, 3)
    assert [(pair.start, pair.stop, pair.a.shape, pair.b.shape) for pair in leaf.parts()] == [
        (0, 24, (20, 3), (3, 24)), (36, 48, (20, 3), (3, 12)),
    ]  # fmt: skip
    assert np.std(leaf.a) == pytest.approx(20**-0.5, rel=0.2)


def test_a_base_of_another_shape_is_refused():
    leaf = make_adapter(jax.random.key(0), D, BOTH, 3, 12.0)
    for shape in ((D + 1, 2 * F), (D, 2 * F - 1)):
        with pytest.raises(ValueError, match="does not fit"):
            leaf.on(jnp.zeros(shape))
    with pytest.raises(ValueError, match="does not fit"):
        leaf.on(jnp.zeros((D, 2 * F))).on(jnp.zeros((D, 2 * F)))
    with pytest.raises(ValueError, match="a weight at 'w'"):
        merge({"w": jnp.zeros(3)}, {"w": jnp.zeros(3)})


def test_casting_reaches_the_base_and_the_pair():
    cast = cast_matrices(
        {"w": adapter().on(normal(1, D, 2 * F)), "v": adapter().on(quantize_matrix(normal(1, D, 2 * F)))}, BF16
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(cast["w"])} == {BF16}
    assert cast["v"].base.values.dtype == jnp.int8
    assert cast["v"].a.dtype == BF16
