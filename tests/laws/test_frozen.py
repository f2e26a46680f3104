"""Frozen means frozen (T10): to the bit, over many steps, under weight decay, clipping and momentum; and costs nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.counting.jaxpr import jaxpr_cost
from engine.model.config import LoraConfig
from engine.model.paths import leaf_paths, merge, split
from engine.model.weights.convert import cast_matrices
from engine.model.weights.int8 import quantize
from engine.model.weights.lora import init_lora
from engine.storage.digest import digest
from engine.training.freeze import select_trainable
from engine.training.optimizer import OptimizerConfig, make_optimizer
from engine.training.step import init_state, loss_and_gradient, train_step
from tests.tiny import lively_params, text_batch, tiny_config

STEPS = 1000
CFG = tiny_config(dtype="bfloat16")


def halves():
    params = lively_params(CFG)
    trainable, frozen = split(params, select_trainable(CFG, freeze=["bottom:1"])[0].weights)
    return trainable, cast_matrices(frozen, "bfloat16")


def adapters(kind: str):
    base = lively_params(CFG)
    base = quantize(base, "full") if kind == "int8" else cast_matrices(base, "bfloat16")
    return init_lora(CFG, jax.random.key(0), LoraConfig(2, targets=("all",))), base


SETUPS = {
    "upper half, AdamW": (halves, "adamw"),
    "upper half, Muon": (halves, "muon"),
    "LoRA": (lambda: adapters("array"), "adamw"),
    "LoRA over int8, Muon": (lambda: adapters("int8"), "muon"),
}


@pytest.mark.law("frozen")
@pytest.mark.parametrize(
    "setup",
    [
        "upper half, AdamW",
        pytest.param("upper half, Muon", marks=pytest.mark.night),
        "LoRA",
        pytest.param("LoRA over int8, Muon", marks=pytest.mark.whole),
    ],
)
def test_frozen_parameters_are_the_same_to_the_bit_after_a_thousand_steps(setup):
    make, kind = SETUPS[setup]
    trainable, frozen = make()
    frozen = jax.tree.map(jnp.array, frozen)
    before, start = digest(frozen), jax.tree.map(np.asarray, trainable)
    tx = make_optimizer(
        OptimizerConfig(kind=kind, learning_rate=0.01, weight_decay=0.5, clip=0.1, momentum=0.95)
    )
    state = init_state(tx, trainable)
    shapes = {leaf.shape for leaf in jax.tree.leaves(frozen)} - {
        leaf.shape for leaf in jax.tree.leaves(start)
    }
    assert shapes
    state_shapes = {leaf.shape for leaf in jax.tree.leaves(state.opt_state)}
    assert not state_shapes & shapes, "the optimizer remembers something of a frozen weight's shape"
    if "LoRA" in setup:
        numbers = sum(leaf.size for leaf in jax.tree.leaves(start))
        moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
        assert moments == 2 * numbers, "pairs have AdamW's two moments, also beside Muon"
    refused = 0
    for step in range(STEPS):
        batch = text_batch(step, 2, 7)
        state, metrics = train_step(CFG, tx, state, frozen, batch, jnp.float32(step / STEPS))
        refused += metrics.refused
    assert int(refused) == 0
    assert digest(frozen) == before
    for old, new in zip(jax.tree.leaves(start), jax.tree.leaves(state.trainable), strict=True):
        assert (old != new).any(), "a trainable parameter did not change"
    merged = leaf_paths(merge(state.trainable, frozen))
    assert set(merged) == set(leaf_paths(lively_params(CFG)))


@pytest.mark.law("factor of three")
def test_freezing_spares_the_matmul_flops():
    """By the walker, which reads the program: all, the upper half, the head alone, the lower half."""
    params, batch = lively_params(CFG), text_batch(0, 2, 7)

    def matmul_flops(**rules) -> int:
        trainable, frozen = split(params, select_trainable(CFG, **rules)[0].weights)
        return jaxpr_cost(lambda t, f, b: loss_and_gradient(CFG, t, f, b), trainable, frozen, batch).matmul

    everything, upper, lower, head = (
        matmul_flops(),
        matmul_flops(freeze=["bottom:1"]),
        matmul_flops(freeze=["top:1"]),
        matmul_flops(train=["head"]),
    )
    assert head < upper < lower < everything
    assert upper < 0.75 * everything
