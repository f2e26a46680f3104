"""The anatomy of a step: the buffers found in a scheduled program, and their kinds."""

import functools
import itertools
import json
import re

import jax
import jax.numpy as jnp
import pytest

from bench.anatomy.__main__ import AnatomyFlags, measure_anatomy
from bench.anatomy.by_hand import by_hand_memory
from bench.anatomy.drawing import stacked_areas
from bench.anatomy.hlo import array_bytes, read_program
from bench.anatomy.liveness import find_buffers, heap_bytes
from bench.anatomy.memory import KINDS, memory_over_time, thin
from bench.anatomy.programs import drawn_programs
from bench.cli import run_bench
from bench.models import random_model, tokens_for
from engine.by_hand.model import residual_count
from engine.model.config import PRESETS, ModelConfig

TOLERANCE = 0.05
main = functools.partial(run_bench, "bench.anatomy", None, AnatomyFlags, measure_anatomy)


def drawn(cfg: ModelConfig, name: str):
    program = drawn_programs(cfg)[name][1](cfg)
    return memory_over_time(program.function.lower(*program.arguments).compile(program.options))


@pytest.fixture(scope="module")
def memories():
    return {name: drawn(PRESETS["tiny"], name) for name in drawn_programs(PRESETS["tiny"])}


def test_the_peak_is_that_of_xla(memories):
    assert set(KINDS) == {*memories["training"].bytes}
    assert {name: memory.error for name, memory in memories.items() if abs(memory.error) > TOLERANCE} == {}


def test_without_the_holes_of_the_heap_it_would_not_be(memories):
    assert max(1 - max(memory.alive) / memory.xla for memory in memories.values()) > TOLERANCE


def test_training_climbs_through_forward_and_comes_down_through_backward(memories):
    for name in ("training", "LoRA", "bottom half frozen"):
        memory, residuals = memories[name], memories[name].bytes["residuals"]
        forward = residuals[: memory.backward : memory.backward // 4]
        assert all(low <= high for low, high in itertools.pairwise(forward)), name
        assert residuals[memory.backward - 1] > 0.4 * max(memory.alive), name
        assert max(residuals[memory.update + 1 :]) < 100, name


def test_a_way_of_training_holds_what_it_needs(memories):
    most = {name: {kind: max(values) for kind, values in memory.bytes.items()} for name, memory in memories.items()}
    assert 4 * most["gradient checkpointing"]["residuals"] < most["training"]["residuals"]
    assert most["bottom half frozen"]["residuals"] < 0.7 * most["training"]["residuals"]
    assert 4 * most["LoRA"]["gradients"] < most["training"]["gradients"]
    state = {name: memory.bytes["optimizer state"][0] for name, memory in memories.items()}
    assert state["LoRA"] < state["bottom half frozen"] < state["training"]
    assert state["decode"] == 0


def test_inference_keeps_nothing(memories):
    for name in ("prefill", "decode"):
        memory, kinds = memories[name], memories[name].bytes
        assert memory.backward is None
        assert not any(any(kinds[kind]) for kind in ("gradients", "residuals", "optimizer state"))
        assert len(set(kinds["parameters"])) == len(set(kinds["KV cache"])) == 1
        assert kinds["KV cache"][0] > 0


def test_thin_keeps_the_peak(memories):
    memory = memories["training"]
    positions = thin(memory, 20)
    assert len(positions) == 20
    assert positions == sorted(positions)
    assert max(memory.alive[place] for place in positions) == max(memory.alive)
    assert thin(memory, 10**6) == list(range(len(memory.alive)))


def test_a_loop_carries_its_buffers():
    """1 MB goes round a loop, whose body makes two more: 3 MB of heap, however often it runs."""

    def looped(x):
        return jax.lax.fori_loop(0, 5, lambda _, x: jnp.sin(x @ x).T @ x, x).sum()

    x = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    compiled = jax.jit(looped).lower(x).compile()
    buffers, _ = find_buffers(read_program(compiled.as_text()))
    assert heap_bytes(buffers) == pytest.approx(compiled.memory_analysis().temp_size_in_bytes, rel=TOLERANCE)


def test_a_donated_argument_takes_no_second_place():
    x = jax.ShapeDtypeStruct((300, 70), jnp.float32)
    add = lambda x: x + 1
    for donated, size in (((), 2), ((0,), 1)):
        program = read_program(jax.jit(add, donate_argnums=donated).lower(x).compile().as_text())
        assert sum(buffer.bytes for buffer in find_buffers(program)[0]) == size * 4 * 300 * 70


def test_a_program_without_an_order_is_refused():
    with pytest.raises(ValueError, match="not scheduled"):
        read_program("HloModule m\nENTRY %e () -> f32[] {\n}")
    assert [array_bytes(shape) for shape in ("bf16[4,3]{1,0}", "pred[]", "token[]")] == [24, 1, 0]


def test_the_page_draws_each_program_to_scale(tmp_path, capsys):
    assert main(["--preset", "tiny", "--out", str(tmp_path)]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    page = (tmp_path / "anatomy.html").read_text()
    assert page.count("<svg") == len(document["rows"]) + 2 == 8
    assert "None" not in page
    assert "http" not in page
    top = max(row["peak_bytes"] for row in document["rows"])
    for row in document["rows"]:
        phases = [("forward", 0)]
        picture = stacked_areas(row["bytes"], row["drawn_positions"], row["positions"], top, phases)
        heights = [float(y) for area in picture["areas"] for y in re.findall(r" ([\d.]+)", area["path"])]
        assert (picture["lower"] - min(heights)) / (picture["lower"] - picture["upper"]) == pytest.approx(
            row["peak_bytes"] / top, abs=0.001
        )


def test_by_hand_training_climbs_and_comes_down():
    """By hand the sum is measured: beside it stand the bytes that `residual_count` and the gradients' shapes say."""
    model = random_model("uneven", ModelConfig(300, 96, 4, 6, 160, 64, 3, 16, dtype="float32"))
    training, inference = by_hand_memory(model.cfg, model.params, tokens_for(model, 3, 41))
    kinds, layers = training["bytes"], model.cfg.layers
    assert training["backward"] == 2 * layers + 1
    forward, backward = kinds["residuals"][: 2 * layers], kinds["residuals"][2 * layers + 1 :]
    assert forward == sorted(set(forward))
    assert backward == sorted(backward, reverse=True)
    assert backward[-1] < 0.3 * forward[-1]
    assert forward[-1] == 4 * (residual_count(model.cfg, 3, 40) - 2 * 3 * 40 * model.cfg.width)
    assert kinds["gradients"][-1] == sum(leaf.nbytes for leaf in jax.tree.leaves(model.params["blocks"]))
    held = [sum(kinds[kind][place] for kind in ("residuals", "gradients", "temporaries")) for place in range(len(forward))]
    assert held == pytest.approx(forward, abs=0.1 * forward[-1])
    rest = inference["bytes"]["temporaries"]
    assert max(rest) - min(rest) < 0.02 * forward[-1]


def test_bad_input_is_a_sentence(tmp_path, capsys):
    (tmp_path / "file").touch()
    for flags, words in ((["--preset", "nan"], "Did you mean"), (["--out", str(tmp_path / "file")], "cannot be written")):
        assert main(flags) == 2
        assert words in capsys.readouterr().err
