"""LoRA leaves: nothing at first, to the bit; then base + scale a b, forward and backward, few rows and many."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.model.paths import merge
from engine.model.weights.convert import cast_matrices
from engine.model.weights.int8 import quantize_matrix
from engine.model.weights.lora import LoRA, make_adapter, to_dense
from engine.model.weights.matmul import project, project_each
from tests.tiny import normal

D, F = 20, 28
F32, BF16 = jnp.dtype("float32"), jnp.dtype("bfloat16")
TOLERANCE = {F32: 1e-5, BF16: 5e-2}
FEW, MANY = (1, 3), (29, 7)


def adapter(columns: int = F, rank: int = 3, seed: int = 0) -> LoRA:
    """One that has learned something: neither a nor b is 0."""
    leaf = make_adapter(jax.random.key(seed), (D, columns), rank, 7.0)
    return dataclasses.replace(leaf, b=normal(seed + 7, *leaf.b.shape) / 4)


def explicit(leaf: LoRA, base: jax.Array) -> jax.Array:
    """base + scale a b by the definition."""
    return base + leaf.scale * leaf.a @ leaf.b


@pytest.mark.law("adapter identity")
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("rows", [(1, 1), FEW, MANY])
def test_at_first_it_changes_no_bit(dtype, rows):
    x, base = normal(0, *rows, D, dtype=dtype), normal(1, D, F).at[3, 4].set(-0.0)
    leaf = make_adapter(jax.random.key(0), (D, F), 3, 7.0).on(base)
    assert leaf.a.any()
    assert not leaf.b.any()
    results = jax.jit(lambda leaf: (project(x, leaf, dtype), *project_each(x, [leaf, leaf], dtype)))
    for plain, adapted in zip(results(base), results(leaf), strict=True):
        assert np.asarray(plain).tobytes() == np.asarray(adapted).tobytes()
    assert np.asarray(to_dense(leaf)).tobytes() == np.asarray(base).tobytes()


@pytest.mark.parametrize("rows", [FEW, MANY])
def test_on_int8_it_is_its_base_and_what_it_adds(rows):
    """On the other kinds, `test_its_gradient_is_that_of_the_weight_it_stands_for` compares the
    product too.
    """
    x, base = normal(0, *rows, D), normal(1, D, F)
    under = quantize_matrix(base, "int8")
    leaf = adapter().on(under)
    expected = project(x, under, F32) + x @ explicit(leaf, jnp.zeros_like(base))
    for out in jax.jit(lambda leaf: (project(x, leaf, F32), *project_each(x, [leaf, leaf], F32)))(leaf):
        np.testing.assert_allclose(out, expected, atol=1e-4)


@pytest.mark.parametrize("adapted", ["one", "both", "one of two"])
@pytest.mark.parametrize("kind", ["array", "full"])
@pytest.mark.parametrize(("dtype", "rows"), [(F32, FEW), (F32, MANY), (BF16, MANY)])
def test_its_gradient_is_that_of_the_weight_it_stands_for(dtype, rows, kind, adapted):
    x, base = normal(0, *rows, D, dtype=dtype), normal(1, D, F)
    under = base if kind == "array" else quantize_matrix(base, "full")
    wide = base if kind == "array" else under.dense()
    adapters = [adapter()] if adapted != "both" else [adapter(), adapter(rank=2, seed=1)]
    beside = [normal(2, D, F).astype(dtype)] if adapted == "one of two" else []

    def ours(adapters, x):
        return [
            out.astype(F32)
            for out in project_each(x, [*(alone.on(under) for alone in adapters), *beside], dtype)
        ]

    def reference(adapters, x):
        weights = [explicit(alone, wide) for alone in adapters] + [weight.astype(F32) for weight in beside]
        return [x.astype(F32) @ weight for weight in weights]

    results = []
    for function in (ours, reference):
        out, pull = jax.vjp(jax.jit(function), adapters, x)
        results.append((out, pull([normal(5 + place, *rows, F) for place in range(len(out))])))
    for actual, expected in zip(*map(jax.tree.leaves, results), strict=True):
        actual, expected = np.asarray(actual, np.float32), np.asarray(expected, np.float32)
        assert np.abs(expected).max() > 0.1, "nothing to compare"
        np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE[dtype] * np.abs(expected).max())


@pytest.mark.parametrize("rows", [FEW, MANY])
def test_adapters_on_one_base_add_up_and_what_lies_under_one_is_frozen(rows):
    x, base = normal(0, *rows, D), normal(1, D, F)
    first, second = adapter(seed=1), adapter(rank=2, seed=2)
    both = merge({"w": second}, merge({"w": first}, {"w": base}))["w"]
    np.testing.assert_allclose(project(x, both, F32), x @ explicit(second, explicit(first, base)), atol=1e-4)
    gradient = jax.grad(lambda leaf: project(x, leaf, F32).sum())(both)
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient.base))
    assert gradient.a.any()
    assert gradient.b.any()


def test_an_adapters_sizes_and_scale():
    leaf = make_adapter(jax.random.key(0), (D, F), 3, 12.0)
    assert (leaf.a.shape, leaf.b.shape, leaf.shape, leaf.scale, leaf.rank) == ((D, 3), (3, F), (D, F), 4.0, 3)
    assert np.std(leaf.a) == pytest.approx(20**-0.5, rel=0.2)


def test_a_base_of_another_shape_is_refused():
    leaf = make_adapter(jax.random.key(0), (D, F), 3, 12.0)
    for shape in ((D + 1, F), (D, F - 1)):
        with pytest.raises(ValueError, match="does not fit"):
            leaf.on(jnp.zeros(shape))
    with pytest.raises(ValueError, match="does not fit"):
        leaf.on(jnp.zeros((D, F))).on(jnp.zeros((D, F)))
    with pytest.raises(ValueError, match="a weight at 'w'"):
        merge({"w": jnp.zeros(3)}, {"w": jnp.zeros(3)})


def test_casting_reaches_the_base_and_the_pair():
    cast = cast_matrices(
        {"w": adapter().on(normal(1, D, F)), "v": adapter().on(quantize_matrix(normal(1, D, F)))}, BF16
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(cast["w"])} == {BF16}
    assert cast["v"].base.values.dtype == jnp.int8
    assert cast["v"].a.dtype == BF16
