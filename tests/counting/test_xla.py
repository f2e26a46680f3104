"""XLA's opinion beside the walker's: within a few percent on programs without loops, and why not on those with."""

import dataclasses
import functools

import jax
import pytest
from plain_model import batch_of, cache_of, params_of, shaped

from engine.counting.flops import add_layers
from engine.counting.jaxpr import jaxpr_cost
from engine.counting.params import count_params
from engine.counting.program_flops import gradient_layer_flops, score_program_flops
from engine.counting.trainable_paths import bottom_frozen
from engine.counting.xla import xla_flops, xla_peak
from engine.inference.decode import decode_step, prefill
from engine.inference.score import score
from engine.model.config import ModelConfig
from engine.model.paths import split
from engine.training.step import loss_and_gradient

CFG = ModelConfig(vocab=512, width=256, layers=2, heads=4, kv_heads=2, ff=704, context=128, qk_norm=True)
B, T, CAPACITY = 2, 64, 96


BATCH = batch_of(B, T)


def gradient(cfg, paths=None):
    """(function, arguments) of a gradient by what learns."""
    trainable, frozen = split(params_of(cfg), paths.weights) if paths else (params_of(cfg), {})
    return functools.partial(loss_and_gradient, cfg), (trainable, frozen, BATCH)


def programs():
    return {
        "gradient": gradient(CFG),
        "gradient of the top, with remat": gradient(dataclasses.replace(CFG, remat="block"), bottom_frozen(CFG, 1)),
        "evaluation": (functools.partial(score, CFG), (params_of(CFG), BATCH)),
        "prefill": (functools.partial(prefill, CFG), (params_of(CFG), BATCH.tokens, shaped(B), cache_of(CFG, B, CAPACITY))),
        "decode": (functools.partial(decode_step, CFG), (params_of(CFG), shaped(8), cache_of(CFG, 8, CAPACITY))),
    }


@pytest.mark.parametrize("name", programs())
def test_xla_counts_what_the_walker_counts(name):
    """Before compiling the two agree to a thousandth. After it, within 5%: elementwise work fused into two loops is done
    twice, and bfloat16 is converted to and fro on a CPU."""
    f, arguments = programs()[name]
    work = jaxpr_cost(f, *arguments)
    lowered = jax.jit(f).lower(*arguments)
    lowered_flops, compiled_flops = xla_flops(lowered), xla_flops(lowered.compile())
    assert lowered_flops == pytest.approx(work.flops, rel=1e-3)
    assert compiled_flops == pytest.approx(work.flops, rel=0.05)
    assert lowered.cost_analysis()["transcendentals"] == work.transcendental


def test_a_scan_reports_one_layer_however_many_there_are():
    """So never trust XLA's count of a program with a loop in it."""
    layers = 8
    cfg = dataclasses.replace(CFG, layers=layers, dtype="float32")
    arguments = (params_of(cfg), BATCH)
    unrolled, looped = (functools.partial(score, dataclasses.replace(cfg, scan=scan)) for scan in (False, True))
    formula = score_program_flops(cfg, B, T)
    blocks = formula.total - formula.parts["head"].forward
    unrolled_flops, looped_flops = (xla_flops(jax.jit(f).lower(*arguments)) for f in (unrolled, looped))
    assert unrolled_flops - looped_flops == pytest.approx(blocks * (layers - 1) / layers, rel=0.03)
    assert jaxpr_cost(unrolled, *arguments).matmul == jaxpr_cost(looped, *arguments).matmul


# ---- what the project says, on the compiled programs of the engine itself


def test_forward_is_a_third_of_a_step_by_all_three_counters():
    f, arguments = gradient(CFG)
    ahead = (functools.partial(score, CFG), (params_of(CFG), BATCH))
    assert add_layers(gradient_layer_flops(CFG, B, T)).total == 3 * score_program_flops(CFG, B, T).total
    assert jaxpr_cost(f, *arguments).matmul == 3 * jaxpr_cost(ahead[0], *ahead[1]).matmul
    step, third = (xla_flops(jax.jit(f).lower(*arguments)) for f, arguments in ((f, arguments), ahead))
    assert step / third == pytest.approx(3.00, rel=0.01)


def test_zeroing_the_gradients_of_what_is_frozen_saves_nothing():
    """Three times a forward, as if all learned; leaving them out of what is differentiated does save."""

    def masked(params, batch):
        _, slopes = loss_and_gradient(CFG, params, {}, batch)
        return slopes | {"blocks": {name: jax.tree.map(lambda s: s * 0.0, block) for name, block in slopes["blocks"].items()}}

    forward = score_program_flops(CFG, B, T).total
    assert jaxpr_cost(masked, params_of(CFG), BATCH).matmul == 3 * forward
    assert xla_flops(jax.jit(masked).lower(params_of(CFG), BATCH)) > 3 * forward
    top, arguments = gradient(CFG, bottom_frozen(CFG, CFG.layers))
    assert jaxpr_cost(top, *arguments).matmul < 1.3 * forward


def test_peak_memory_is_what_is_held_less_what_is_donated():
    cache = cache_of(CFG, 8, CAPACITY)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    weights = 4 * count_params(CFG).total
    program = decode_step.lower(CFG, params_of(CFG), shaped(8), cache).compile()
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes == size
    assert memory.argument_size_in_bytes == pytest.approx(weights + size, rel=0.01)
    assert weights + size <= xla_peak(program) < weights + 2 * size + memory.temp_size_in_bytes
