"""Adapters as trees: made by target, trained alone, folded to the same model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import assert_near, equations, positions_of, tiny_config, tokens_of

from engine.counting.jaxpr import jaxpr_cost
from engine.counting.trainable_paths import lora_only
from engine.errors import UserError
from engine.model.config import LoraConfig
from engine.model.paths import leaf_paths, merge
from engine.model.transformer import forward
from engine.model.weights.int8 import quantize
from engine.model.weights.lora import LoRA, merge_lora
from engine.model.weights.matmul import cast_matrices
from engine.storage.digest import digest
from engine.text.batch import Batch
from engine.training.lora import init_lora
from engine.training.optimizer import OptimizerConfig, make_optimizer
from engine.training.step import init_state, loss_and_gradient, train_step

CFG = tiny_config()
KEY = jax.random.key(0)
T = 7
MATRICES = r"blocks/\d+/(qkv|out|gate_up|down)"


def batch_of(seed: int, B: int = 9, cfg=CFG) -> Batch:
    tokens = tokens_of(seed, B, T + 1)
    return Batch(tokens[:, :-1], tokens[:, 1:], np.ones((B, T), bool), positions_of(B, T), None)


def with_random_b(adapters, seed: int = 0):
    """The adapters with b no longer 0."""
    rng = np.random.default_rng(seed)
    noisy = lambda leaf: dataclasses.replace(leaf, b=jnp.asarray(rng.standard_normal(leaf.b.shape, np.float32)) / 5)
    return jax.tree.map(noisy, adapters, is_leaf=lambda leaf: isinstance(leaf, LoRA))


logits = jax.jit(lambda cfg, params, tokens: forward(cfg, params, tokens, positions_of(*tokens.shape))[0], static_argnums=0)


def test_adapters_hold_what_was_asked_for(params):
    adapters = leaf_paths(init_lora(CFG, params, KEY, LoraConfig(3, alpha=12.0, targets=("q", "v", "down"))))
    assert set(adapters) == {f"blocks/{layer}/{name}" for layer in (0, 1) for name in ("qkv", "down")}
    assert {leaf.scale for leaf in adapters.values()} == {4.0}
    assert adapters["blocks/1/qkv"].columns == ((0, 24), (36, 48))
    assert adapters["blocks/1/down"].a.shape == (28, 3)
    assert all(leaf.base is None for leaf in adapters.values())
    assert len({np.asarray(leaf.a).tobytes() for leaf in adapters.values()}) == 4, "each has its own draw"
    with pytest.raises(UserError, match=r"rank for blocks/0/qkv must lie between 1 and 11"):
        init_lora(CFG, params, KEY, LoraConfig(12, targets=("v",)))


@pytest.mark.parametrize("kind", ["array", "full"])
def test_folding_gives_the_same_logits_and_leaves_the_base_alone(params, kind):
    base = params if kind == "array" else quantize(params, [(MATRICES, "full")])
    before = digest(base)
    adapted = merge(with_random_b(init_lora(CFG, base, KEY, LoraConfig(3, targets=("all",)))), base)
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
    folded = leaf_paths(merge_lora(merge(with_random_b(init_lora(CFG, half, KEY, LoraConfig(2, targets=("q", "v")))), half)))
    assert folded["blocks/0/qkv"].dtype == jnp.bfloat16
    assert all(a is b for a, b in zip(jax.tree.leaves(merge_lora(params)), jax.tree.leaves(params)))


def test_several_adapters_on_one_base_fold_to_their_sum(params):
    first = with_random_b(init_lora(CFG, params, KEY, LoraConfig(3, targets=("q", "v"))), 1)
    second = with_random_b(init_lora(CFG, params, KEY, LoraConfig(2, targets=("all",))), 2)
    folded = leaf_paths(merge_lora(merge(second, merge(first, params))))
    alone = [leaf_paths(merge_lora(merge(adapters, params))) for adapters in (first, second)]
    for path, leaf in leaf_paths(params).items():
        expected = leaf + sum(tree[path] - leaf for tree in alone)
        np.testing.assert_allclose(folded[path], expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_only_adapters_learn_and_the_optimizer_holds_nothing_else(params, kind):
    frozen = jax.tree.map(jnp.array, params)
    before = digest(frozen)
    adapters = init_lora(CFG, frozen, KEY, LoraConfig(3, targets=("all",)))
    start = jax.tree.map(jnp.array, adapters)
    tx = make_optimizer(OptimizerConfig(kind=kind, learning_rate=0.05, weight_decay=0.1))
    state = init_state(tx, adapters)
    numbers = sum(leaf.size for leaf in jax.tree.leaves(adapters))
    assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim) == 2 * numbers, "AdamW, also beside Muon"
    losses = []
    for _ in range(12):
        state, metrics = train_step(CFG, tx, state, frozen, batch_of(0), jnp.float32(0.3))
        losses.append(float(metrics.loss))
    assert losses[-1] < losses[0] - 0.3
    assert digest(frozen) == before
    assert jax.tree.structure(state.trainable) == jax.tree.structure(start)
    for old, new in zip(jax.tree.leaves(start), jax.tree.leaves(state.trainable)):
        assert (old != new).any()


def test_a_learned_adapter_decays_towards_the_base(params):
    """AdamW's decay is on both halves, so that without a gradient what is added goes to nothing."""
    tx = make_optimizer(OptimizerConfig(learning_rate=0.1, weight_decay=0.5, warmup=0.0, schedule="wsd"))
    adapters = with_random_b(init_lora(CFG, params, KEY, LoraConfig(3, targets=("q", "v"))))
    nothing = jax.tree.map(jnp.zeros_like, adapters)
    updates, _ = tx.update(nothing, tx.init(adapters), adapters, progress=jnp.float32(0.01))
    for update, leaf in zip(jax.tree.leaves(updates), jax.tree.leaves(adapters)):
        np.testing.assert_allclose(update, -0.05 * leaf, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("kind", ["array", "full"])
def test_the_gradient_of_a_step_is_that_of_the_folded_model(params, rows, kind):
    base = params if kind == "array" else quantize(params, [(MATRICES, "full")])
    adapters = with_random_b(init_lora(CFG, base, KEY, LoraConfig(3, targets=("q", "v", "up", "down"))))
    batch = batch_of(0, rows)
    loss, gradient = jax.jit(loss_and_gradient, static_argnums=0)(CFG, adapters, base, batch)

    def folded_loss(adapters):
        table = jax.nn.log_softmax(forward(CFG, merge_lora(merge(adapters, base)), batch.tokens, batch.positions)[0])
        return -jnp.take_along_axis(table, batch.targets[..., None], -1).mean()

    expected, reference = jax.jit(jax.value_and_grad(folded_loss))(adapters)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert_near(gradient, reference, 1e-4)


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

    jaxpr = jax.make_jaxpr(lambda adapters: loss_and_gradient(CFG, adapters, base, batch_of(0)))(adapters).jaxpr
    jaxpr = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]
    shapes = {leaf.shape for leaf in jax.tree.leaves(params) if leaf.ndim == 2} | {(20, 28)}
    both = shapes | {shape[::-1] for shape in shapes}
    return [shape for shape, length in products(jaxpr) if length == 9 * T and shape in both]


def test_no_product_is_spent_on_the_gradient_of_a_frozen_matrix(params):
    adapters = init_lora(CFG, params, KEY, LoraConfig(3, targets=("q", "v", "down")))
    assert gradients_of_whole_matrices(params, adapters, params) == []
    assert gradients_of_whole_matrices(params, adapters, quantize(params, [(MATRICES, "full")])) == []
    assert gradients_of_whole_matrices(params, params, {}), "the check sees none even where there are some"


def test_the_saving_is_in_the_count():
    """On a model wide enough for the pairs to be thin: two thirds of the full step, as 4 N beside 6 N should be."""
    from engine.model.transformer import init_params

    cfg = tiny_config(width=256, heads=4, kv_heads=4, head_dim=64, ff=704, layers=3)
    params = jax.eval_shape(lambda key: init_params(cfg, key), KEY)
    batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, batch_of(0)))
    work = lambda *trees: jaxpr_cost(lambda *args: loss_and_gradient(cfg, *args), *trees, batch).matmul
    full = work(params, {})
    for targets, share in ((("q", "v"), 0.68), (("all",), 0.72)):
        adapters = jax.eval_shape(lambda targets=targets: init_lora(cfg, params, KEY, LoraConfig(2, targets=targets)))
        assert 0.6 < work(adapters, params) / full < share
    assert lora_only(cfg, LoraConfig(2, targets=("q",))).adapted == {f"blocks/{layer}/q" for layer in range(3)}


def test_optax_sees_an_adapter_as_its_two_halves(params):
    adapters = init_lora(CFG, params, KEY, LoraConfig(3, targets=("q", "v")))
    assert float(optax.tree.norm(adapters)) == pytest.approx(
        np.sqrt(sum(float((leaf.a**2).sum()) for leaf in leaf_paths(adapters).values())), rel=1e-5
    )
