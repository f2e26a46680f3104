"""A kind of weight needs a shape, `dense`, `times` and `cast`, and nothing else knows its name: here is one more."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.inference.decode import prepare_params
from engine.model import loss as module
from engine.model.config import LoraConfig
from engine.model.loss import score
from engine.model.paths import leaf_paths, map_paths
from engine.model.transformer import forward
from engine.model.weights.convert import cast_matrices, weight_types
from engine.model.weights.lora import init_lora, to_dense
from engine.model.weights.weight import Weight
from engine.storage.tensor_layout import HUGGING_FACE_NAMES, file_tensors, layout_of
from engine.text.batch import Batch
from engine.training.step import loss_and_gradient
from tests.tiny import lively_params, positions_of, tiny_config, tokens_of

B, T = 3, 7
F32 = jnp.dtype("float32")
NEAR = 2e-5


@functools.partial(jax.tree_util.register_dataclass, data_fields=["first", "second"], meta_fields=["axis"])
@dataclasses.dataclass(frozen=True)
class Sum(Weight):
    """The matrix first + second."""

    first: jax.Array
    second: jax.Array
    axis: int = 1

    @property
    def shape(self):
        return self.first.shape

    @property
    def kind(self):
        return "sum"

    def dense(self, dtype=None):
        return (self.first + self.second).astype(F32)

    def times(self, x, dtype):
        matrix = self.dense() if self.axis else self.dense().T
        return (x @ matrix.astype(x.dtype)).astype(dtype)

    def cast(self, dtype):
        return Sum(self.first.astype(dtype), self.second.astype(dtype), self.axis)


@pytest.fixture(params=["tied", pytest.param("untied", marks=pytest.mark.whole)])
def model(request):
    """Returns a config, params, and the same with a Sum for each matrix."""
    cfg = tiny_config(tied=request.param == "tied")
    params = lively_params(cfg)
    to_sum = lambda path, leaf: Sum(leaf - 0.25, jnp.full_like(leaf, 0.25), int(path != "embed"))
    return cfg, params, map_paths(lambda path, leaf: to_sum(path, leaf) if leaf.ndim == 2 else leaf, params)


def batch():
    return Batch(tokens_of(0, B, T), tokens_of(1, B, T), np.ones((B, T), bool), positions_of(B, T), None)


def test_it_multiplies_and_is_looked_up(model):
    cfg, params, sums = model
    run = jax.jit(lambda params: forward(cfg, params, tokens_of(0, B, T), positions_of(B, T))[0])
    np.testing.assert_allclose(run(sums), run(params), atol=NEAR * 50)
    prepared = prepare_params(cfg, sums)
    np.testing.assert_allclose(run(prepared), run(params), atol=NEAR * 50)
    assert weight_types(prepared) == "sum"


def test_its_loss_may_be_made_in_parts(model, monkeypatch):
    cfg, params, sums = model
    expected = score(cfg, params, batch())
    monkeypatch.setattr(module, "SCORED_LIMIT", 4 * 5 * cfg.vocab)
    jax.clear_caches()
    np.testing.assert_allclose(score(cfg, sums, batch()), expected, rtol=NEAR)


@pytest.mark.parametrize("rows", [pytest.param("all at once", marks=pytest.mark.whole), "a few"])
def test_an_adapter_trains_on_it(model, rows, monkeypatch):
    cfg, params, sums = model
    adapters = init_lora(cfg, jax.random.key(0), LoraConfig(rank=2))
    if rows == "a few":
        monkeypatch.setattr(module, "ROWS_LIMIT", 4 * 5 * cfg.vocab)
    differentiate = jax.jit(lambda frozen: loss_and_gradient(cfg, adapters, frozen, batch()))
    for ours, theirs in zip(
        *(jax.tree.leaves(differentiate(frozen)) for frozen in (sums, params)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=NEAR)


def test_it_is_cast_and_written_to_a_file(model):
    cfg, params, sums = model
    cast = leaf_paths(cast_matrices(sums, "bfloat16"))["blocks/0/q"]
    assert {cast.first.dtype, cast.second.dtype} == {jnp.dtype("bfloat16")}
    dense = leaf_paths(map_paths(lambda _, leaf: to_dense(leaf), sums))
    for leaf, array in file_tensors(list(layout_of(cfg, HUGGING_FACE_NAMES)), sums, None):
        expected = np.asarray(dense[leaf.path])
        np.testing.assert_array_equal(array, expected.T if leaf.transposed else expected)
    np.testing.assert_allclose(dense["blocks/0/q"], leaf_paths(params)["blocks/0/q"], atol=1e-6)
