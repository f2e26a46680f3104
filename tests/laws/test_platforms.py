"""Every program lowers for CUDA, ROCm and TPU, on a machine that has none, and gives no weight away there either."""

import functools
import importlib
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from engine.mesh.shape import AXES
from engine.model.attention_in_blocks import QUERY_BLOCK
from tests.laws.exported import (
    TARGETS,
    Temporary,
    export,
    kernels,
    largest_temporary,
    make_for,
    weights_given_away,
)
from tests.laws.programs import INFERENCE, PAIRED, PROGRAMS, QWEN2, QWEN3, ROWS, B, Program, T, lay_out

DISPATCH = importlib.import_module("jax._src.dispatch")
CUDNN = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
# They read whole texts, so that a kernel computes their attention where there is one.
ATTENDING = [
    name for name in PROGRAMS if name.startswith(("train step", "loss", "pair log-prob", "log-prob"))
]
PREFILLING = [name for name in PROGRAMS if name.startswith("prefill") and "_" not in name]


@functools.cache
def make(name: str, device: str, cfg):
    """A program as a kind of device gets it, made once: JAX finds what it has traced by its
    arguments' identity.
    """
    with jax.default_device(device):
        return PROGRAMS[name](cfg)


@functools.cache
def exported(name: str, platform: str, cfg=QWEN3, with_cudnn=False):
    return export(*make(name, TARGETS[platform], cfg)[:2], platform)


@pytest.fixture
def cudnn():
    """In the test JAX believes that cuDNN is here, with a GPU that it serves: enough to lower."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CUDNN, "check_cudnn_version", lambda: 91000)
        patch.setattr(CUDNN, "check_compute_capability", lambda _: True)
        patch.setattr(CUDNN, "is_cuda_compute_capability_equal", lambda _: False)
        jax.clear_caches()
        yield
    jax.clear_caches()


# By day of training steps these; the others attend as they do, and train other parameters.
BY_DAY = {
    f"train step, {kind}" for kind in ("AdamW", "scan and remat", "LoRA, remat", "preference", "reinforce")
}
OTHERS = ("train step, Muon, scan", "train step, LoRA on int8")  # what else lowers otherwise
DAILY = [name for name in PROGRAMS if " step, " not in name or name in (*BY_DAY, *OTHERS)]


# Programs for ROCm are traced as for CUDA; by day three of them are lowered below.
@pytest.mark.law("immutable weights", "lowering")
@pytest.mark.parametrize(
    ("platform", "names"),
    [
        pytest.param("cpu", INFERENCE, id="cpu"),
        pytest.param("cuda", DAILY, id="cuda"),
        pytest.param("tpu", DAILY, id="tpu"),
        *(
            pytest.param(name, PROGRAMS, id=f"all, {name}", marks=pytest.mark.night)
            for name in ("cuda", "rocm", "tpu")
        ),
    ],
)
def test_every_program_lowers_and_no_weight_is_given_away(platform, names):
    for name in names:
        program = exported(name, platform)
        assert program.platforms == (platform,)
        if name in INFERENCE:
            function, arguments, _ = make(name, TARGETS[platform], QWEN3)
            assert not weights_given_away(program, arguments[1]), name
            assert not donates_weights(function, arguments), name
        known = {"tpu_custom_call"} if platform == "tpu" else set()
        assert platform == "cpu" or set(kernels(program)) <= known, name


def donates_weights(function, arguments) -> bool:
    """Whether the first argument that is not static is donated, though no result may be as large."""
    return any(info.donated for info in jax.tree.leaves(function.trace(*arguments).args_info[0][0]))


@pytest.mark.law("donation")
def test_the_check_sees_what_is_given_away():
    params = {"a": jax.ShapeDtypeStruct((2, 3), jnp.float32), "b": jax.ShapeDtypeStruct((5,), jnp.float32)}
    updating = jax.jit(lambda params: jax.tree.map(lambda leaf: leaf + 1, params), donate_argnums=0)
    assert weights_given_away(export(updating, (params,), "tpu"), params)[:2] == ["argument 0", "argument 1"]
    returning = jax.jit(lambda params: (params["a"].sum(), params["b"]))
    assert weights_given_away(export(returning, (params,), "cpu"), params) == ["argument 1", "a result (5,)"]
    assert donates_weights(jax.jit(lambda params: params["a"].sum(), donate_argnums=0), (params,))
    like = jax.jit(lambda params: params["a"] + params["b"].sum())
    assert weights_given_away(export(like, (params,), "cpu"), params) == ["a result (2, 3)"]


def test_the_largest_temporary_is_found():
    big = Program(
        jax.jit(lambda x: (x[:, None] * x[None]).sum()), (jax.ShapeDtypeStruct((70,), jnp.bfloat16),)
    )
    assert largest_temporary(export(*big[:2], "cuda")) in (
        Temporary("f32", (70, 70)),
        Temporary("bf16", (70, 70)),
    )


def test_the_other_family_lowers_too():
    for name in ("train step, Muon", "decode_slots", "prefill"):
        for platform in {*TARGETS} - {"cpu"}:
            assert exported(name, platform, QWEN2).platforms == (platform,)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.night] * (" step" in name and name not in BY_DAY))
        for name in ATTENDING
    ],
)
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_no_scores_reach_memory_where_a_kernel_exists(name, platform, cudnn):
    """Attention is a kernel, and no value is as large as the scores of a block of queries, (rows,
    N, QUERY_BLOCK, T).

    Splash attention keeps LANES numbers a query and head, here as many.
    """
    program = (
        exported(name, "cuda", QWEN3, True) if platform == "cuda" else exported(name, "tpu")
    )  # which was lowered above
    assert kernels(program), "blocks that are alike may share one call"
    rows = B * (2 if "preference" in name or name.startswith("pair") else 1)
    block = 4 * rows * QWEN3.heads * QUERY_BLOCK * T
    assert largest_temporary(program).bytes < (block if platform == "cuda" else 1.01 * block)


@pytest.mark.parametrize("name", PREFILLING)
def test_a_gpu_prefills_by_a_kernel_too(name, cudnn):
    assert kernels(exported(name, "cuda", QWEN3, True))


MESHED = ["train step, AdamW", "train step, LoRA", "train step, preference", "train step, scan and remat"]


@pytest.mark.parametrize("name", [*MESHED, "prefill", "decode_steps"])
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_on_a_mesh_a_kernel_computes_the_rows_and_heads_of_its_device(name, platform, cudnn, monkeypatch):
    """No value around a kernel is as large as a device's share of a block of scores, none elsewhere
    as the whole block.
    """
    # JAX wants to see the devices where it meets cuDNN's primitives, though inside `shard_map` it
    # does without.
    monkeypatch.setattr(DISPATCH, "prim_requires_devices_during_lowering", set())
    trains, tensor = name not in INFERENCE, 2
    mesh = AbstractMesh((1, 2 if trains else 1, tensor), AXES, axis_types=(AxisType.Auto,) * 3)
    with jax.sharding.use_abstract_mesh(mesh):
        function, arguments, _ = lay_out(make_for(platform, PROGRAMS[name], PAIRED), mesh)
        program = export(function, arguments, platform)
    text, called = program.mlir_module(), sum(kernels(program).values())
    assert program.nr_devices == mesh.size
    assert trains or not weights_given_away(program, arguments[1])
    assert (called > 0) == (trains or (name, platform) == ("prefill", "cuda")), (
        "other products are XLA's to cut"
    )
    inputs = re.findall(r"custom_call @(?:__cudnn|tpu).*: \((.*)\) -> ", text)
    rows, heads = B * (2 if "preference" in name else 1) if trains else ROWS, PAIRED.heads
    queries = rf"<{rows // mesh.shape['fsdp']}x(\d+x)?{heads // tensor}x(\d+x)?{PAIRED.head_dim}x"
    assert [bool(re.search(queries, types)) for types in inputs] == [True] * called
    if trains:
        limit = (1 if platform == "cuda" else 1.01) * rows * heads * QUERY_BLOCK * T
        assert largest_temporary(program).bytes < 4 * limit
        around = "".join(re.findall(r"sdy.manual_computation.*?\n(.*?)sdy.return", text, re.DOTALL))
        sizes = [
            math.prod(map(int, sides[:-1].split("x"))) for sides in re.findall(r"tensor<((?:\d+x)+)", around)
        ]
        assert max(sizes) < limit / mesh.size
