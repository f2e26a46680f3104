"""What a run says before it starts: how long it takes, what would suit better, and why it measures this machine."""

import dataclasses
import functools
import io
import math
import re
from contextlib import redirect_stderr, redirect_stdout

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.counting import accelerators, hardware
from engine.counting.accelerators import find_networked
from engine.counting.hardware import Ceilings
from engine.counting.params import count_params
from engine.counting.xla import Collective
from engine.errors import UserError
from engine.format import format_bytes, format_count
from engine.mesh import processes
from engine.mesh.shape import MeshShape
from engine.model.config import PRESETS, LoraConfig, preset
from engine.model.shapes import leaf_shapes
from engine.model.trainable import lora_only
from engine.model.transformer import init_params
from engine.training.optimizer import make_optimizer
from engine.training.step import init_state, train_step
from stages.cli.console import Console
from stages.runs import estimate
from stages.runs.estimate import find_ceilings
from stages.runs.plan import RunPlan
from stages.train import __main__ as train
from stages.train import mesh_plan
from stages.train import run as train_run
from stages.train.run import TrainingPlan, recipe

HERE = Ceilings(
    "a chip",
    "cpu",
    2,
    "0",
    bf16_gflops=400.0,
    f32_gflops=200.0,
    int8_gflops=300.0,
    read_gbs=26.0,
    update_gbs=20.0,
)


def plan_of(monkeypatch, capsys, *args) -> dict[str, str]:
    """The rows that a dry run prints, on a machine of known speed."""
    monkeypatch.setattr(train_run, "find_ceilings", lambda console: HERE)
    assert train.main([*map(str, args), "--dry-run"]) == 0
    return dict(re.findall(r"^([\w/]+)  +(.+)$", capsys.readouterr().out, re.MULTILINE))


def test_another_batch_is_read_in_parts_no_larger_than_the_recipes():
    large, small = recipe("gpt2-124m", 300), recipe("demo", 300)
    assert (large.batch, large.context, large.accumulate) == (32, 1024, 8)
    shapes = {
        (4, 256): 1,
        (6, 1024): 2,
        (64, 1024): 16,
        (32, 1024): 8,
        (7, 2048): 7,
        (1, 8192): 1,
        (10**9, 1024): 25 * 10**7,
    }
    assert {shape: large.resize(*shape).accumulate for shape in shapes} == shapes
    assert small.resize(64, 512).accumulate == 1, "a recipe of one part stays so"


@pytest.fixture
def measurements(tmp_path, monkeypatch):
    """An empty cache; a measurement takes one of these from the list."""
    monkeypatch.setenv("THRICE_CACHE", str(tmp_path / "cache"))
    left = [HERE]
    monkeypatch.setattr(estimate, "measure_apart", lambda: left.pop(0))
    return left


def test_ceilings_are_measured_once(measurements):
    output = io.StringIO()
    assert find_ceilings(Console(output)) == HERE
    assert "measuring this machine's ceilings, once ... " in output.getvalue()
    output.truncate(0)
    assert find_ceilings(Console(output)) == HERE
    assert (output.getvalue(), measurements) == ("", [])


def test_a_process_that_cannot_measure_gives_no_ceilings(monkeypatch):
    for code in ("print('no JSON')", "print('{}')", "1 / 0"):
        monkeypatch.setattr(hardware, "MEASURE_PROGRAM", code)
        assert hardware.measure_apart() is None


@pytest.mark.whole
def test_a_mesh_that_is_not_here_is_planned(text, monkeypatch, capsys):
    """A device holds what the rules on paths leave of 12 bytes a parameter; more than there is, is
    said.
    """
    tiny_plan = [
        "tiny",
        "--data",
        text,
        "--context",
        32,
        "--batch",
        8,
        "--optimizer",
        "adamw",
        "--mesh",
        "fsdp=8",
    ]
    shapes = leaf_shapes(dataclasses.replace(preset("tiny"), vocab=258)).values()
    held = 12 * sum(math.prod(shape) // (8 if len(shape) > 1 else 1) for shape in shapes)
    small = dataclasses.replace(find_networked("tpu-v5e"), memory_gb=held / 4e9)
    known = {"h100": find_networked("h100"), "tpu-v5e": small}
    monkeypatch.setattr(accelerators, "read_accelerators", lambda: known)
    plan = plan_of(monkeypatch, capsys, *tiny_plan, "--accelerator", "tpu-v5e")
    assert plan["holds"].startswith(f"a device: {format_bytes(held)} of state, ")
    assert re.search(r"tpu-v5e has .* too little: about fsdp=\d+ or --remat would fit", plan["holds"])
    assert "all-gather of " in plan["sends"]
    for flags, error in (
        (["--accelerator", "h101"], "Did you mean 'h100'?"),
        (["--mesh", "fsdp=3"], "fsdp=3 of the mesh fsdp=3 does not divide the 8 rows"),
        (["--mesh", "fdsp=2"], "Did you mean 'fsdp'?"),
    ):
        assert train.main([*map(str, tiny_plan), "--dry-run", *flags]) == 2
        assert error in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("total", [1_057_000_000, 949_600_000, 9_944_000_000])
def test_the_memory_in_all_is_printed_to_three_figures(total):
    """Promise T14 holds a run's peak to what is printed: 1.057 GB as `1.1 GB` would be 4% of its
    15.
    """
    plan = RunPlan("demo", preset("demo"), recipe("demo", 2048), 0, 5, None)
    phrase = estimate.memory_estimate(plan, total - plan.memory.saved - estimate.process_bytes(plan))
    printed, unit = re.search(r"([\d.]+) ([MG]B) in all with Python", phrase).groups()
    assert float(printed) * {"MB": 1e6, "GB": 1e9}[unit] == pytest.approx(total, rel=0.005)


def test_the_memory_in_all_holds_the_weights_that_answer_between_steps():
    """An adapter on int8 is merged into a copy in the compute type, twice the base: more than a
    small step takes.
    """
    cfg = preset("smollm2-135m")
    lora = lora_only(cfg, LoraConfig(rank=8))
    plan = RunPlan("small", cfg, recipe("demo", 2048).resize(1, 128), 0, 5, None, trainable=lora, base="int8")
    served = 2 * count_params(cfg).total
    assert plan.step.answering_bytes == plan.memory.params + plan.memory.optimizer + served
    assert plan.step.answering_bytes > plan.memory.total + plan.memory.saved
    in_all = format_count(plan.step.answering_bytes + estimate.process_bytes(plan))
    assert estimate.memory_estimate(plan, plan.memory.total).endswith(
        f"; {in_all}B in all with Python and JAX"
    )


def test_memory_and_speed_are_those_of_all_devices_of_a_mesh(monkeypatch):
    plan = RunPlan("demo", preset("demo"), recipe("demo", 2048), 0, 5, None)
    mesh = dataclasses.replace(plan, mesh=MeshShape(fsdp=4))
    need = lambda plan: estimate.require_room(plan, plan.memory.total, "A step needs", "buy more.")
    monkeypatch.setattr(
        estimate, "device_memory_bytes", lambda: estimate.process_bytes(plan) + plan.memory.total // 2
    )
    need(mesh)  # on four machines like this one
    with pytest.raises(UserError, match=r"A step needs \S+ .B, and"):
        need(plan)
    # virtual devices, which share its memory
    monkeypatch.setattr(jax, "local_device_count", lambda: 4)
    with pytest.raises(UserError, match=r"on each of 4 devices, and"):
        need(mesh)
    assert estimate.mesh_ceilings(HERE, mesh.mesh) == HERE, "and its cores"
    monkeypatch.setattr(processes.group, "processes", 2, raising=False)  # on one machine
    assert estimate.mesh_ceilings(HERE, mesh.mesh) == HERE
    monkeypatch.setattr(jax, "local_device_count", lambda: 2)
    with pytest.raises(UserError, match=r"on each of 4 devices, and"):
        need(mesh)
    monkeypatch.setattr(processes.group, "machines", 2, raising=False)  # each on its own
    assert estimate.mesh_ceilings(HERE, mesh.mesh).bf16_gflops == 2 * HERE.bf16_gflops
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert estimate.mesh_ceilings(HERE, mesh.mesh).bf16_gflops == 4 * HERE.bf16_gflops


def test_a_step_that_does_not_compile_is_one_sentence(text, monkeypatch, capsys):
    monkeypatch.setattr(mesh_plan, "COMMAND", ("-c", "raise SystemExit('no memory')"))
    assert train.main(["tiny", "--data", str(text), "--batch", "4", "--dry-run", "--mesh", "fsdp=4"]) == 2
    assert capsys.readouterr().err == "error: The step does not compile for fsdp=4: no memory\n"


def test_a_ring_over_nodes_is_as_fast_as_the_network_of_a_node():
    device = find_networked("h100")
    seconds = lambda *group: (
        device.send_seconds(Collective("all-gather", 10**9, group, 1)) / (1 - 1 / len(group))
    )
    assert [seconds(*range(8)), seconds(*range(16)), seconds(0, 8)] == pytest.approx(
        [1 / 450, 1 / 400, 1 / 50]
    )


ODD_FLAGS = {
    "--batch": [1, 3, 7, 33, 1000],
    "--accumulate": [1, 2, 3, 8, 1000],
    "--context": [2, 5, 127, 128, 10**6],
    "--dtype": ["float32", "bfloat16"],
    "--optimizer": ["adamw", "muon"],
    "--schedule": ["cosine", "wsd"],
    "--warmup": [0, 0.9, 1],
    "--decay": [0, 0.6, 1],
    "--clip": ["inf", 1e-9],
    "--learning-rate": [1e-300, 10],
    "--steps": [1, 10**30],
    "--seed": [2**31 - 1],
    "--max-time": ["1ms", "99999d"],
    "--tokenizer": ["bpe:257", "bpe:256", "nothing"],
    "--scan": [()],
    "--remat": [()],
}


@settings(max_examples=8)
@given(
    st.sampled_from(sorted(PRESETS)),
    st.fixed_dictionaries({}, optional={flag: st.sampled_from(ODD_FLAGS[flag]) for flag in ODD_FLAGS}),
)
def test_any_flags_give_a_plan_that_can_be_traced_or_one_sentence(text, preset, values):
    planned: list[TrainingPlan] = []
    plan_training = train_run.plan_training

    def plan_and_note(*args: object) -> TrainingPlan:
        planned.append(plan_training(*args))
        return planned[-1]

    words = [
        preset,
        "--data",
        text,
        "--dry-run",
        *([] if "--tokenizer" in values else ["--tokenizer", "bytes"]),
    ]
    words += [word for flag, value in values.items() for word in ([flag] if value == () else [flag, value])]
    error = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(error), redirect_stdout(io.StringIO()):
        patch.setattr(train_run, "find_ceilings", lambda console: HERE)
        patch.setattr(train_run, "plan_training", plan_and_note)
        code = train.main([*map(str, words)])
    assert (code, len(planned)) in ((0, 1), (2, 0))
    assert bool(code) == bool(error.getvalue())
    assert "Traceback" not in error.getvalue()
    if code == 0 and planned[0].plan.step_tokens < 2**17:
        plan, cfg = planned[0].plan, dataclasses.replace(planned[0].plan.cfg, layers=1)
        tx = make_optimizer(plan.recipe.optimizer)
        state = jax.eval_shape(lambda: init_state(tx, init_params(cfg, jax.random.key(0))))
        step = functools.partial(train_step, cfg, tx, microbatches=plan.recipe.accumulate)
        jax.eval_shape(step, state, {}, planned[0].batches.at(0), np.float32(0))
