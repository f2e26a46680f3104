"""XLA's opinion beside the walker's, within a few percent on programs without loops; what a program's collectives move."""

import dataclasses
import functools
import os
import subprocess
import sys

import jax
import pytest

from engine.counting.jaxpr import jaxpr_cost
from engine.counting.params import count_params
from engine.counting.xla import Collective, read_collectives, xla_flops, xla_peak
from engine.errors import UserError
from engine.inference.decode import prefill
from engine.model.config import ModelConfig
from engine.model.loss import score
from engine.model.paths import split
from engine.training.step import loss_and_gradient
from tests.counting.shapes_only import batch_of, cache_of, params_of, shaped
from tests.tiny import trainable_paths

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
        "gradient of the top, with remat": gradient(
            dataclasses.replace(CFG, remat="block"), trainable_paths(CFG, freeze="bottom:1")
        ),
        "evaluation": (functools.partial(score, CFG), (params_of(CFG), BATCH)),
        "prefill": (
            functools.partial(prefill, CFG),
            (params_of(CFG), BATCH.tokens, shaped(B), cache_of(CFG, B, CAPACITY)),
        ),
        "decode": (
            functools.partial(prefill, CFG),
            (params_of(CFG), shaped(8, 1), shaped(8), cache_of(CFG, 8, CAPACITY)),
        ),
    }


@pytest.mark.parametrize("name", programs())
def test_xla_counts_what_the_walker_counts(name):
    """Before compiling the two agree to a thousandth. After it, within 5%: elementwise work fused
    into two loops is done twice, and bfloat16 is converted to and fro on a CPU.
    """
    f, arguments = programs()[name]
    work = jaxpr_cost(f, *arguments)
    lowered = jax.jit(f).lower(*arguments)
    lowered_flops, compiled_flops = xla_flops(lowered), xla_flops(lowered.compile())
    seen = work.flops - work.in_kernels
    assert lowered_flops == pytest.approx(seen, rel=1e-3)
    assert compiled_flops == pytest.approx(seen, rel=0.05)
    assert lowered.cost_analysis()["transcendentals"] == work.transcendental


def test_peak_memory_is_what_is_held_less_what_is_donated():
    cache = cache_of(CFG, 8, CAPACITY)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    weights = 4 * count_params(CFG).total
    program = prefill.lower(CFG, params_of(CFG), shaped(8, 1), shaped(8), cache).compile()
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes == size
    assert memory.argument_size_in_bytes == pytest.approx(weights + size, rel=0.01)
    assert weights + size <= xla_peak(program) < weights + 2 * size + memory.temp_size_in_bytes


# ---- collectives: counted as often as they run, with the bytes that the formula for a ring says

# Three layers of x @ w, weights cut in 4 along `fsdp`, rows in 8; the loss is a sum over all.
PROGRAM = """
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
shaped = lambda shape, *spec: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))

def step(weights, x):
    def layer(x, w):
        return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), P(("data", "fsdp"), None)), None
    return jax.grad(lambda weights: jax.lax.scan(layer, x, weights)[0].sum())(weights)

with jax.set_mesh(mesh):
    weights, x = shaped((3, 64, 64), None, "fsdp", None), shaped((16, 64), ("data", "fsdp"), None)
    print(jax.jit(step, out_shardings=weights.sharding).lower(weights, x).compile().as_text())
"""


def test_a_scan_over_sharded_layers_gathers_and_reduces_each():
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    hlo = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, check=True
    ).stdout
    collectives = read_collectives(hlo)
    size = 4 * 64 * 64
    gathers = [one for one in collectives if one.kind == "all-gather"]
    assert gathers == [Collective("all-gather", size, (0, 1, 2, 3), 3)] * 2, "forward and backward"
    assert sum(one.wire_bytes for one in gathers) == 6 * size * 3 / 4
    reductions = {
        one.group: one for one in collectives if one.kind == "all-reduce"
    }  # a CPU does not reduce-scatter
    assert reductions[0, 1, 2, 3] == Collective("all-reduce", size, (0, 1, 2, 3), 3)
    assert reductions[0, 1, 2, 3].wire_bytes == 2 * 3 * size * 3 / 4
    assert reductions[0, 4] == Collective("all-reduce", size // 4, (0, 4), 3)


def module(entry: str, others: str = "", devices: int = 8) -> str:
    return f"HloModule jit_f, num_partitions={devices}\n\n{others}\nENTRY %main (p: f32[8]) -> f32[8] {{\n{entry}\n}}\n"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "  %a = f32[16,4]{1,0:T(8,128)} all-gather(%p), replica_groups={{0,2},{1,3}}",
            ("all-gather", 256, (0, 2)),
        ),
        (
            "  ROOT %a = (bf16[6]{0}, s4[4]{0}, pred[2]) all-reduce(%p, %q, %r), to_apply=%add",
            ("all-reduce", 16, (*range(8),)),
        ),
        (
            "  %a = f32[2]{0} reduce-scatter(%p), replica_groups=[2,4]<=[8], to_apply=%add",
            ("reduce-scatter", 32, (0, 1, 2, 3)),
        ),
        (
            "  %a = (f32[1,3], f32[1,3]) all-to-all(%p, %q), replica_groups=[4,2]<=[2,4]T(1,0)",
            ("all-to-all", 24, (0, 4)),
        ),
        (
            "  %a = f32[5] collective-permute(%p), source_target_pairs={{0,1},{1,0}}",
            ("collective-permute", 20, (0, 1)),
        ),
        (
            "  %s = ((f32[2]{0}, bf16[2]{0}), (f32[8]{0}, bf16[8]{0})) all-gather-start(%p, %q), "
            "replica_groups=[2,4]<=[8]\n"
            "  %d = (f32[8]{0}, bf16[8]{0}) all-gather-done(%s), calls=%add",
            ("all-gather", 48, (0, 1, 2, 3)),
        ),
        (
            "  %s = f32[4]{0} all-reduce-start(%p), replica_groups={{0,1}}, to_apply=%add",
            ("all-reduce", 16, (0, 1)),
        ),
        (
            "  %s = (f32[3], f32[3], u32[], u32[]) collective-permute-start(%p)",
            ("collective-permute", 12, (0, 1)),
        ),
        (
            "  %a = f32[8] all-gather(%p), replica_groups=mesh['x'=2,'y'=2,'z'=2] {'x','z'}",
            ("all-gather", 32, (0, 1, 4, 5)),
        ),
        (
            "  %a = f32[8] all-reduce(%p), replica_groups=mesh['x'=2,'y'=4] {'y':(2)2}",
            ("all-reduce", 32, (0, 1)),
        ),
        (
            "  %a = f32[8] all-reduce(%p), replica_groups=mesh['y'=4,'x'=2] {'x','y':(1)2}",
            ("all-reduce", 32, (0, 1, 4, 5)),
        ),
    ],
)
def test_every_notation_of_the_compiler(line, expected):
    assert read_collectives(module(line, "%add (x: f32[], y: f32[]) -> f32[] {\n}\n")) == [
        Collective(*expected, 1)
    ]


def test_what_follows_a_kernels_text_over_several_lines_is_read_too():
    """A TPU's compiler ends such a kernel with a line that looks like a computation's end."""
    kernel = (
        '  %k = f32[8] custom-call(%p), custom_call_target="tpu_custom_call", backend_config={"kernel":{\n'
        '"body":"AAAA"\n'
        '}}, metadata={op_name="jit(step)/attend"}\n'
    )
    gather = "  %a = f32[8] all-gather(%p), replica_groups={{0,1}}"
    expected = [Collective("all-gather", 32, (0, 1), 1)]
    assert read_collectives(module(kernel + gather)) == expected
    apart = f'%apart (p: f32[8]) -> f32[8] {{\n{kernel}{gather}\n}}, execution_thread="parallel"\n'
    assert read_collectives(module("  %s = f32[8] call(%p), to_apply=%apart", apart)) == expected


def test_an_all_reduce_that_is_fused_with_a_slice_is_sent_as_a_reduce_scatter():
    reduction = "  %r = f32[8] all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add"
    add = "%add (x: f32[], y: f32[]) -> f32[] {\n}\n"
    fused = f"%all-reduce-scatter.1 (p: f32[8]) -> f32[2] {{\n{reduction}\n}}\n"
    call = "  %f = f32[2] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1"
    (sent,) = read_collectives(module(call, add + fused))
    assert sent == Collective("reduce-scatter", 32, (0, 1, 2, 3), 1)
    (alone,) = read_collectives(module(reduction, add))
    assert alone.wire_bytes == 2 * sent.wire_bytes


CONDITION = "%less (s: s32[]) -> pred[] {{\n  %n = s32[] constant(5)\n  ROOT %c = pred[] compare(%s, %n), direction={}\n}}\n"
BODY = "%body (s: s32[]) -> s32[] {\n  %a = f32[4] all-reduce(%s), replica_groups={{0,1}}\n}\n"
WHILE = '%w = s32[] while(%s), condition=%less, body=%body, x={"known_trip_count":{"n":"7"}}'
OUTER = f"%outer (s: s32[]) -> s32[] {{\n  {WHILE}\n}}\n"


def test_loops_multiply_and_alone_groups_move_nothing():
    loop = "  %w = s32[] while(%p), condition=%less, body=%{}"
    count = lambda name, compared="LT": [
        one.times
        for one in read_collectives(module(loop.format(name), CONDITION.format(compared) + BODY + OUTER))
    ]
    assert count("body") == [5], "the constant of the condition"
    assert count("outer") == [5 * 7], "a loop in a loop, whose count the compiler noted"
    with pytest.raises(UserError, match="loop %w holds collectives"):
        count("body", "NE")
    pair = "  %s = (f32[4], f32[2], u32[]) async-start(%p), calls=%body\n  %d = f32[2] async-done(%s), calls=%body"
    assert [one.times for one in read_collectives(module(pair, BODY))] == [1], "both halves of one"
    both = "  %c = f32[4] conditional(%i, %p, %q), branch_computations={%body, %body}"
    assert [one.times for one in read_collectives(module(both, BODY))] == [1, 1]
    assert read_collectives(module("  %a = f32[8] all-gather(%p), replica_groups={{0},{1}}")) == []
    with pytest.raises(UserError, match="not known here: "):
        read_collectives(
            module("  %a = f32[8] all-gather(%p), replica_groups=mesh['x'=8], device_ids=[8] {'x'}")
        )
