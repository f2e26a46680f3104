"""Adapters as trees: made by target, trained alone, folded to the same model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.errors import UserError
from engine.model.config import LoraConfig, preset
from engine.model.paths import leaf_paths, merge
from engine.model.transformer import forward
from engine.model.weights.convert import cast_matrices
from engine.model.weights.int8 import quantize
from engine.model.weights.lora import LoRA, init_lora, merge_lora
from engine.storage.digest import digest
from engine.training.lora_rank import choose_rank, lora_bits
from engine.training.optimizer import OptimizerConfig, make_optimizer
from engine.training.step import loss_and_gradient
from tests.tiny import assert_near, equations, positions_of, text_batch, tiny_config, tokens_of

CFG = tiny_config()
KEY = jax.random.key(0)
T = 7


def with_random_b(adapters, seed: int = 0):
    """The adapters with b no longer 0."""
    rng = np.random.default_rng(seed)
    noisy = lambda leaf: dataclasses.replace(
        leaf, b=jnp.asarray(rng.standard_normal(leaf.b.shape, np.float32)) / 5
    )
    return jax.tree.map(noisy, adapters, is_leaf=lambda leaf: isinstance(leaf, LoRA))


logits = jax.jit(
    lambda cfg, params, tokens: forward(cfg, params, tokens, positions_of(*tokens.shape))[0], static_argnums=0
)


def test_the_rank_is_the_least_that_holds_what_the_data_teaches():
    cfg = preset("smollm2-135m")
    adapters = jax.eval_shape(lambda: init_lora(cfg, KEY, LoraConfig()))
    holds = lora_bits(cfg, LoraConfig())
    assert holds == 2 * sum(leaf.size for leaf in jax.tree.leaves(adapters)) == 4_884_480
    chosen = [choose_rank(cfg, LoraConfig(), bits) for bits in (1, holds, holds + 1, 5 * holds, 10**9)]
    assert [(lora.rank, lora.alpha) for lora in chosen] == [(8, 16), (8, 16), (16, 32), (64, 128), (64, 128)]
    assert choose_rank(tiny_config(), LoraConfig(), 10**9).rank < min(
        min(shape) for shape in tiny_config().matrices.values()
    )


def test_adapters_hold_what_was_asked_for(params):
    adapters = leaf_paths(init_lora(CFG, KEY, LoraConfig(3, alpha=12.0, targets=("q", "v", "down"))))
    assert set(adapters) == {f"blocks/{layer}/{name}" for layer in (0, 1) for name in ("q", "v", "down")}
    assert {leaf.scale for leaf in adapters.values()} == {4.0}
    assert adapters["blocks/1/v"].shape == (20, 12)
    assert adapters["blocks/1/down"].a.shape == (28, 3)
    assert all(leaf.base is None for leaf in adapters.values())
    assert len({np.asarray(leaf.a).tobytes() for leaf in adapters.values()}) == 6, "each has its own draw"
    with pytest.raises(UserError, match=r"rank for blocks/0/v must lie between 1 and 11"):
        init_lora(CFG, KEY, LoraConfig(12, targets=("v",)))


@pytest.mark.law("adapter identity")
@pytest.mark.parametrize("kind", [pytest.param("array", marks=pytest.mark.whole), "full"])
def test_folding_gives_the_same_logits_and_leaves_the_base_alone(params, kind):
    base = params if kind == "array" else quantize(params, "full") | {"head": params["head"]}
    before = digest(base)
    adapted = merge(with_random_b(init_lora(CFG, KEY, LoraConfig(3, targets=("all",)))), base)
    folded = merge_lora(adapted)
    assert {type(leaf) for leaf in leaf_paths(folded).values()} == {type(params["head"])}
    for rows in (1, 9):
        tokens = tokens_of(1, rows, T)
        actual, expected = logits(CFG, adapted, tokens), logits(CFG, folded, tokens)
        assert_near(actual, expected, 1e-5)
        assert np.abs(actual - logits(CFG, base, tokens)).max() > 0.1, "the adapter does nothing"
    assert digest(base) == before


def test_folding_keeps_the_bases_dtype_and_a_plain_model(params):
    half = cast_matrices(params, "bfloat16")
    folded = leaf_paths(
        merge_lora(merge(with_random_b(init_lora(CFG, KEY, LoraConfig(2, targets=("q", "v")))), half))
    )
    assert folded["blocks/0/q"].dtype == jnp.bfloat16
    assert all(a is b for a, b in zip(jax.tree.leaves(merge_lora(params)), jax.tree.leaves(params)))


def test_several_adapters_on_one_base_fold_to_their_sum(params):
    first = with_random_b(init_lora(CFG, KEY, LoraConfig(3, targets=("q", "v"))), 1)
    second = with_random_b(init_lora(CFG, KEY, LoraConfig(2, targets=("all",))), 2)
    folded = leaf_paths(merge_lora(merge(second, merge(first, params))))
    alone = [leaf_paths(merge_lora(merge(adapters, params))) for adapters in (first, second)]
    for path, leaf in leaf_paths(params).items():
        expected = leaf + sum(tree[path] - leaf for tree in alone)
        np.testing.assert_allclose(folded[path], expected, atol=1e-5)


def test_a_learned_adapter_decays_towards_the_base(params):
    """AdamW's decay is on both halves, so that without a gradient what is added goes to nothing."""
    tx = make_optimizer(OptimizerConfig(learning_rate=0.1, weight_decay=0.5, warmup=0.0, schedule="wsd"))
    adapters = with_random_b(init_lora(CFG, KEY, LoraConfig(3, targets=("q", "v"))))
    nothing = jax.tree.map(jnp.zeros_like, adapters)
    updates, _ = tx.update(nothing, tx.init(adapters), adapters, progress=jnp.float32(0.01))
    for update, leaf in zip(jax.tree.leaves(updates), jax.tree.leaves(adapters)):
        np.testing.assert_allclose(update, -0.05 * leaf, rtol=1e-5)


def products(jaxpr):
    """(shape of the result, length of the contraction) of every product in a program."""
    for equation in equations(jaxpr):
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            yield equation.outvars[0].aval.shape, int(np.prod([shape[axis] for axis in contracted]))


def gradients_of_whole_matrices(params, adapters, base) -> list:
    """Products over all tokens whose result has the shape of a matrix of the base, either way round."""
    from jax.interpreters import partial_eval

    jaxpr = jax.make_jaxpr(lambda adapters: loss_and_gradient(CFG, adapters, base, text_batch(0, 9, T)))(
        adapters
    ).jaxpr
    jaxpr = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]
    shapes = {leaf.shape for leaf in jax.tree.leaves(params) if leaf.ndim == 2} | {(20, 28)}
    both = shapes | {shape[::-1] for shape in shapes}
    return [shape for shape, length in products(jaxpr) if length == 9 * T and shape in both]


@pytest.mark.law("factor of three")
def test_no_product_is_spent_on_the_gradient_of_a_frozen_matrix(params):
    adapters = init_lora(CFG, KEY, LoraConfig(3, targets=("q", "v", "down")))
    assert gradients_of_whole_matrices(params, adapters, params) == []
    assert gradients_of_whole_matrices(params, adapters, quantize(params, "full")) == []
    assert gradients_of_whole_matrices(params, params, {}), "the check sees none even where there are some"
