"""Int8 weights: near the weights they stand for, exact in integers, and each row on its own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import UserError
from engine.model.paths import leaf_paths
from engine.model.weights.convert import cast_matrices
from engine.model.weights.int8 import (
    Int8,
    int8_matmul,
    quantize,
    quantize_matrix,
    store_transposed,
)
from engine.model.weights.matmul import lookup, project, project_each
from tests.tiny import lively_params, normal, tiny_config

D, F, V = 20, 28, 41
F32, BF16 = jnp.dtype("float32"), jnp.dtype("bfloat16")


def wide(leaf: Int8) -> jax.Array:
    """(in, out) of either kind: what x is multiplied by."""
    return leaf.dense() if leaf.axis == 1 else leaf.dense().T


weights = st.integers(0, 2**32 - 1).flatmap(
    lambda seed: st.sampled_from([1e-30, 1e-3, 1.0, 1e20]).map(
        lambda size: np.float32(size) * np.random.default_rng(seed).standard_cauchy((D, F)).astype(np.float32)
    )
)


@pytest.mark.law("quantisation")
@given(weights, st.sampled_from([0, 1]))
def test_no_weight_is_off_by_more_than_half_a_step_of_its_column(weight, axis):
    weight[:, 3] = 0
    leaf = quantize_matrix(jnp.asarray(weight), "full", axis)
    assert leaf.values.dtype == jnp.int8
    assert leaf.scale.shape == (weight.shape[axis],)
    assert np.abs(np.asarray(leaf.values, np.int32)).max() == 127
    scale = np.expand_dims(np.asarray(leaf.scale), 1 - axis)
    assert (np.abs(np.asarray(leaf.dense()) - weight) <= scale * 0.5001).all()
    assert (np.abs(weight).max(1 - axis) <= np.asarray(leaf.scale) * 127.001).all()
    assert not np.asarray(leaf.dense())[:, 3].any()


@given(weights)
def test_rounding_again_changes_nothing(weight):
    once = quantize_matrix(jnp.asarray(weight))
    again = quantize_matrix(once.dense())
    np.testing.assert_array_equal(again.values, once.values)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_integers_are_multiplied_exactly(axis, dtype):
    x = (
        np.asarray(normal(0, 9, D, dtype=dtype), np.float32)
        * np.logspace(-6, 6, 9, dtype=np.float32)[:, None]
    )
    x[4] = 0
    leaf = quantize_matrix(normal(1, D, F) if axis == 1 else normal(1, F, D), axis=axis)
    ours = jax.jit(lambda x: int8_matmul(x, leaf, F32))(jnp.asarray(x))

    scale = np.abs(x).max(1, keepdims=True) / np.float32(127)
    scale[4] = 1
    rows = np.rint(x / scale).astype(np.int64)
    values = np.asarray(leaf.values, np.int64)
    expected = (
        (rows @ (values if axis == 1 else values.T)).astype(np.float32) * scale * np.asarray(leaf.scale)
    )
    np.testing.assert_array_equal(ours, expected)
    assert (np.abs(ours - x @ wide(leaf)) <= 0.02 * np.abs(expected).max(1, keepdims=True)).all()


def test_few_rows_read_a_transposed_weight_as_it_lies():
    """It stands on the left of the compiled product; on the right it would be packed first."""
    leaf = store_transposed(quantize_matrix(normal(1, D, F)))
    compiled = jax.jit(int8_matmul, static_argnums=2).lower(normal(0, 3, D), leaf, F32).compile()
    assert f"s32[{F},3]" in next(line for line in compiled.as_text().splitlines() if " dot(" in line)


@pytest.mark.law("batch invariance")
@pytest.mark.parametrize("kind", ["int8", "full"])
@pytest.mark.parametrize("rows", [2, 7])
def test_a_row_is_the_same_to_the_bit_whatever_lies_beside_it(kind, rows):
    """In one program: other rows, also spoiled ones, and any place."""
    leaf = quantize_matrix(normal(1, D, F), kind)
    multiply = jax.jit(lambda x: project(x, leaf, F32))
    row, results = normal(2, D, dtype=BF16), set()
    for place in range(rows):
        for seed, spoil in ((3, 0.0), (4, np.nan), (5, np.inf)):
            x = (normal(seed, rows, D, dtype=BF16) + spoil).at[place].set(row)
            results.add(np.asarray(multiply(x)[place]).tobytes())
    assert len(results) == 1


@pytest.mark.parametrize("kind", ["int8", "full"])
def test_what_is_not_finite_stays_so(kind):
    leaf = quantize_matrix(normal(1, D, F), kind)
    out = project(normal(0, 3, D).at[0, 5].set(np.nan).at[1, 5].set(np.inf), leaf, F32)
    assert not np.isfinite(out[:2]).any()
    assert np.isfinite(out[2]).all()


def test_integers_have_no_gradient():
    leaf = quantize_matrix(normal(1, D, F))
    with pytest.raises(UserError, match="activations 'full'"):
        jax.grad(lambda x: project(x, leaf, F32).sum())(normal(0, 3, D))


@pytest.mark.parametrize("kind", ["int8", "full"])
def test_every_way_to_use_a_weight_knows_int8(kind):
    x = normal(0, 2, 7, D)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol={"int8": 0.15, "full": 1e-4}[kind])
    leaf = quantize_matrix(normal(1, D, 2 * F), kind)
    close(project(x, leaf, F32), x @ wide(leaf))
    for product in project_each(x, [leaf, leaf], F32):
        close(product, x @ wide(leaf))
    close(project(x[:1, :1], leaf, F32), x[:1, :1] @ wide(leaf))
    table = quantize_matrix(normal(1, V, D), kind, axis=0)
    close(table.times(x, F32), x @ wide(table))
    tokens = jnp.array([[3, 0, V - 1]])
    np.testing.assert_array_equal(lookup(table, tokens), table.dense()[tokens])


def test_only_plain_matrices_are_quantised_down_by_two_digits():
    params = lively_params(tiny_config())
    kinds = {
        path: leaf.activations
        for path, leaf in leaf_paths(quantize(params)).items()
        if isinstance(leaf, Int8)
    }
    assert (kinds["blocks/1/down"], kinds["blocks/0/q"], kinds["head"]) == ("int16", "int8", "int8")
    assert len(kinds) == 2 * 7 + 1
    assert quantize(params, "full")["blocks"]["0"]["down"].activations == "full"
    with pytest.raises(UserError, match=r"blocks/0/\w+ is not one"):
        quantize(quantize(params))


def test_casting_leaves_int8_and_gains_alone():
    params = quantize(lively_params(tiny_config()))
    cast = leaf_paths(cast_matrices(params, "bfloat16"))
    assert cast["blocks/0/q"].values.dtype == jnp.int8
    assert cast["blocks/0/q"].scale.dtype == jnp.float32
    assert cast["blocks/0/attn_norm"].dtype == jnp.float32
    assert cast["embed"].dtype == jnp.bfloat16


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("rows", [3, 40])
def test_two_digits_of_x_are_a_hundred_times_nearer_than_one(axis, rows):
    """Of rows with one number far above the rest, where one digit is coarse; on either path, few
    rows or many.
    """
    x = normal(0, rows, D).at[:, 4].mul(50.0)
    weight = quantize_matrix(normal(1, D, V) if axis else normal(1, V, D), axis=axis)
    exact = np.asarray(x, np.float64) @ np.asarray(wide(weight), np.float64)
    for transposed in (False, True):
        leaf = store_transposed(weight) if transposed else weight
        error = {
            kind: np.abs(
                np.asarray(int8_matmul(x, dataclasses.replace(leaf, activations=kind), F32)) - exact
            ).max()
            for kind in ("int8", "int16")
        }
        assert error["int16"] < error["int8"] / 100
