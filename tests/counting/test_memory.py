"""Laws of the memory formulas: what is exact, what must grow and shrink, one compiled step for the estimate; bytes moved."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from engine.counting.memory import inference_bytes, inference_memory, train_bytes, training_memory
from engine.counting.params import count_params
from engine.counting.xla import xla_peak
from engine.model.config import LoraConfig, ModelConfig, preset
from engine.model.paths import split
from engine.model.trainable import all_trainable, lora_only
from engine.model.weights.convert import cast_matrices
from engine.model.weights.int8 import quantize
from engine.model.weights.lora import init_lora
from engine.training.optimizer import OptimizerConfig, make_optimizer
from engine.training.step import init_state, train_step
from tests.counting.shapes_only import batch_of, cache_of, params_of, shaped
from tests.tiny import trainable_paths

CFG = ModelConfig(vocab=19, width=12, layers=3, heads=6, kv_heads=3, head_dim=4, ff=10, context=64)
NORMS, TABLE = 7 * 12, 19 * 12
ON_OUT = lora_only(CFG, LoraConfig(5, targets=("out",)))
COUNT = count_params(CFG)
DOWN = 3 * 10 * 12
ADAPTER = lora_only(CFG, LoraConfig(5, targets=("q", "v")))


def test_weights_gradients_and_moments_are_exact():
    cfg = preset("smollm2-135m")
    count = count_params(cfg)
    memory = training_memory(cfg, 1, 128)
    assert memory.params == memory.gradients == 4 * 134_515_008
    assert memory.optimizer == 8 * 134_515_008
    assert memory.copies == 2 * count.matmul
    assert training_memory(cfg, 1, 128, optimizer="muon").optimizer == 8 * count.total - 4 * (
        count.matmul - 49152 * 576
    )
    assert training_memory(dataclasses.replace(cfg, dtype="float32"), 1, 128).copies == 0


def test_frozen_weights_have_no_gradient_no_moments_and_keep_nothing_below():
    full = training_memory(CFG, 2, 7)
    half = training_memory(CFG, 2, 7, trainable=trainable_paths(CFG, freeze="bottom:2"))
    head = training_memory(CFG, 2, 7, trainable=trainable_paths(CFG, train="head"))
    stay = (
        2 * (48 * 12 + 24 * 12 + 12 * 20 + 10 * 12) + 19 * 12
    )  # numbers in two blocks' matrices and the table
    assert half.params == full.params - 2 * stay
    assert 3 * half.residuals == full.residuals
    assert (head.residuals, head.block, head.gradients, head.optimizer) == (0, 0, 4 * 12 * 19, 8 * 12 * 19)


def test_lora_adds_its_pairs_and_trains_only_those():
    memory = training_memory(CFG, 2, 7, trainable=ON_OUT)
    pairs = 3 * 5 * (24 + 12)
    assert memory.gradients == 4 * pairs
    assert memory.params == 4 * (NORMS + pairs) + 2 * (count_params(CFG).matmul + TABLE)
    assert memory.copies == 0  # what pairs are merged into is dropped at once, and merged again
    assert training_memory(CFG, 2, 7, trainable=ON_OUT, base="int8").params < memory.params


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["everything", "bottom", "top", "lora", "lora over int8"])
def test_weights_and_optimizer_are_those_of_a_real_run(name, tied):
    cfg = dataclasses.replace(CFG, qk_norm=True, qkv_bias=True, tied=tied)
    adapter = LoraConfig(2, targets=("q", "v", "down"))
    ways = {
        "everything": all_trainable(cfg),
        "bottom": trainable_paths(cfg, freeze="bottom:1"),
        "top": trainable_paths(cfg, freeze="top:1"),
    }
    chosen = ways.get(name) or lora_only(cfg, adapter)
    base = "int8" if "int8" in name else "float"
    params = params_of(cfg)
    trainable, frozen = split(params, chosen.weights)
    if chosen.adapted:
        trainable = jax.eval_shape(lambda params: init_lora(cfg, jax.random.key(0), adapter), params)
    if base == "int8":
        frozen = jax.eval_shape(lambda frozen: quantize(frozen, "full"), frozen)
    frozen = jax.eval_shape(lambda frozen: cast_matrices(frozen, cfg.dtype), frozen)
    state = jax.eval_shape(lambda tree: init_state(make_optimizer(OptimizerConfig()), tree), trainable)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((state, frozen)))
    memory = training_memory(cfg, 2, 7, trainable=chosen, base=base)
    assert 0 <= size - memory.params - memory.optimizer <= 16  # and the counters of steps


def test_what_saves_memory_saves_it():
    cfg = preset("nano")
    plain = training_memory(cfg, 16, 256)
    assert training_memory(dataclasses.replace(cfg, remat="block"), 16, 256).total < plain.total / 2
    assert training_memory(cfg, 16, 256, loss_chunks=4).logits == plain.logits // 4
    assert training_memory(cfg, 4, 256, microbatches=4).total < plain.total / 2
    assert training_memory(cfg, 32, 256).residuals == 2 * plain.residuals


@pytest.mark.parametrize("remat", [pytest.param("none", marks=pytest.mark.whole), "block"])
def test_the_estimate_is_within_30_percent_of_a_compiled_step(remat):
    cfg = ModelConfig(
        vocab=512, width=128, layers=3, heads=4, kv_heads=2, ff=352, context=256, qk_norm=True, remat=remat
    )
    tx = make_optimizer(OptimizerConfig())
    state = jax.eval_shape(lambda tree: init_state(tx, tree), params_of(cfg))
    program = train_step.lower(cfg, tx, state, {}, batch_of(8, 256), shaped(dtype=jnp.float32)).compile()
    assert 0.7 < training_memory(cfg, 8, 256).total / xla_peak(program) < 1.3


def test_served_weights_and_cache_are_exact():
    cache = cache_of(CFG, 5, 11)
    size = sum(array.size * array.dtype.itemsize for array in (*cache.k, *cache.v))
    memory = inference_memory(CFG, 5, 11)
    assert memory.cache == size
    assert memory.params == 2 * (count_params(CFG).matmul + TABLE) + 4 * NORMS
    assert memory.logits == 4 * 5 * 19
    assert inference_memory(CFG, 5, 0, tokens=11, every_logit=True).logits == 11 * memory.logits
    assert inference_memory(CFG, 5, 0, tokens=11).cache == 0
    assert memory.total == memory.params + memory.cache + memory.activations + memory.logits


def test_int8_weights_are_one_byte_and_a_scale_a_column():
    columns = 3 * (48 + 12 + 20 + 12) + 19
    memory = inference_memory(CFG, 1, 11, int8=True)
    assert memory.params == count_params(CFG).matmul + 2 * TABLE + 4 * (columns + NORMS)
    tied = dataclasses.replace(CFG, tied=True)
    assert inference_memory(tied, 1, 11, int8=True).params == memory.params - 2 * TABLE


# Bytes moved.


def test_adamw_moves_28_bytes_a_parameter_that_learns():
    assert train_bytes(CFG, 2, 7).optimizer == 28 * COUNT.total
    assert train_bytes(CFG, 2, 7, trainable=trainable_paths(CFG, train="head")).optimizer == 28 * TABLE
    assert train_bytes(CFG, 2, 7, trainable=ADAPTER).optimizer == 28 * 3 * 5 * (12 + 24 + 12 + 12)


def test_weights_are_read_forward_and_for_dx_and_again_with_remat():
    cfg = dataclasses.replace(CFG, dtype="float32")
    assert train_bytes(cfg, 2, 7).weights == 2 * 4 * COUNT.matmul  # all above the table has a dX
    assert train_bytes(CFG, 2, 7).weights == 2 * 2 * COUNT.matmul + (4 + 2) * COUNT.matmul
    assert train_bytes(dataclasses.replace(cfg, remat="block"), 2, 7).weights == 3 * 4 * COUNT.matmul - 4 * (
        TABLE + DOWN
    )
    assert train_bytes(cfg, 2, 7, trainable=trainable_paths(cfg, train="head")).weights == 4 * COUNT.matmul


@pytest.mark.parametrize(("remat", "blocks"), [("none", (9, 7, 6)), ("block", (15, 9, 6))])
def test_a_block_is_written_and_read_going_up_and_where_it_is_made_again_and_read_going_down(remat, blocks):
    """All of it; with two blocks of three frozen; with all frozen below the head, where nothing is
    made again.
    """
    cfg = dataclasses.replace(CFG, remat=remat)
    steps = [
        train_bytes(cfg, 2, 7, trainable=paths)
        for paths in (None, trainable_paths(CFG, freeze="bottom:2"), trainable_paths(CFG, train="head"))
    ]
    assert [step.activations for step in steps] == [
        count * training_memory(CFG, 2, 7).block for count in blocks
    ]
    assert steps[0].total > steps[1].total > steps[2].total


@pytest.mark.parametrize("slots", [1, 2, 32])
def test_slots_share_the_weights_and_nothing_else(slots):
    cfg = dataclasses.replace(CFG, tied=True)
    alone, many = inference_bytes(cfg, 1, 11), inference_bytes(cfg, slots, 11)
    assert many.weights == alone.weights
    assert (many.cache, many.activations, many.logits) == tuple(
        slots * part for part in (alone.cache, alone.activations, alone.logits)
    )


def test_decoding_reads_the_cache_and_writes_one_token_to_it():
    cache = cache_of(CFG, 5, 11)
    size = sum(array.size * array.dtype.itemsize for array in (*cache.k, *cache.v))
    assert inference_bytes(CFG, 5, 11).cache == size * 12 // 11
    assert inference_bytes(CFG, 5, 11, tokens=7).cache == size * 18 // 11
    assert inference_bytes(CFG, 5, 0, tokens=7, every_logit=True).cache == 0
