"""The anatomy of a step: the buffers found in a scheduled program, what a block keeps, what is computed, and what moves."""

import contextlib
import dataclasses
import functools
import inspect
import io
import itertools
import json
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_report import TABLE, Reader

from bench.anatomy.__main__ import AnatomyFlags, measure_anatomy
from bench.anatomy.by_hand import HALVES, block_residuals, by_hand_memory, field_reasons
from bench.anatomy.memory import KINDS, find_buffers, memory_over_time
from bench.anatomy.operations import count_ways, operation_rows
from bench.anatomy.page import roofline, stacked_areas
from bench.anatomy.programs import drawn_programs
from bench.cli import run_bench
from bench.models import random_model, tokens_for
from bench.report.page import page as report_page
from engine.by_hand.block import SwigluResiduals
from engine.by_hand.model import residual_count
from engine.counting.jaxpr import jaxpr_cost
from engine.errors import UserError
from engine.model.config import PRESETS, ModelConfig
from engine.training.step import loss_and_gradient

UNEVEN = {"vocab": 300, "width": 96, "layers": 4, "heads": 6, "ff": 160, "context": 64, "head_dim": 16, "dtype": "float32"}
main = functools.partial(run_bench, "bench.anatomy", None, AnatomyFlags, measure_anatomy)


def drawn(cfg: ModelConfig, name: str):
    program = drawn_programs(cfg)[name][1](cfg)
    return memory_over_time(program.function.lower(*program.arguments).compile(program.options))


@pytest.fixture(scope="module")
def memories():
    return {name: drawn(PRESETS["tiny"], name) for name in drawn_programs(PRESETS["tiny"])}


def test_the_peak_is_xlas_but_for_the_holes_of_its_heap(memories):
    assert set(KINDS) == {*memories["training"].bytes}
    assert all(0.85 < max(memory.alive) / memory.xla <= 1 for memory in memories.values())


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


def test_backward_is_found_where_a_frozen_head_makes_logits_in_parts():
    memory = drawn(dataclasses.replace(PRESETS["tiny"], vocab=16384), "LoRA")
    assert 0 < memory.backward < memory.update
    assert max(memory.bytes["residuals"]) > 1e6


def test_inference_keeps_nothing(memories):
    for name in ("prefill", "decode"):
        memory, kinds = memories[name], memories[name].bytes
        assert memory.backward is None
        assert not any(any(kinds[kind]) for kind in ("gradients", "residuals", "optimizer state"))
        assert len(set(kinds["parameters"])) == len(set(kinds["KV cache"])) == 1
        assert kinds["KV cache"][0] > 0


def test_a_loop_carries_its_buffers_and_no_two_values_lie_in_one_place():
    """1 MB goes round a loop, whose body makes two more: 3 MB beside the argument, however often it runs."""

    def looped(x):
        return jax.lax.fori_loop(0, 5, lambda _, x: jnp.sin(x @ x).T @ x, x).sum()

    compiled = jax.jit(looped).lower(jax.ShapeDtypeStruct((512, 512), jnp.float32)).compile()
    assert max(memory_over_time(compiled).alive) == pytest.approx(4 * 2**20, rel=0.01)
    program = drawn_programs(PRESETS["tiny"])["gradient checkpointing"][1](PRESETS["tiny"])
    buffers, positions = find_buffers(program.function.lower(*program.arguments).compile(program.options))
    for position in range(0, positions, 7):
        alive = sorted((each.place, each.bytes) for each in buffers if each.start <= position <= each.end)
        for ((allocation, offset), size), (after, _) in itertools.pairwise(alive):
            assert (allocation, offset + size) <= after


def test_a_backend_that_does_not_say_where_values_lie_is_refused():
    with pytest.raises(UserError, match="does not say where"):
        memory_over_time(types.SimpleNamespace(memory_analysis=lambda: None))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The folder of --out, and what the command printed."""
    folder, printed = tmp_path_factory.mktemp("page"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["--preset", "tiny", "--out", str(folder)]) == 0
    return folder, printed.getvalue()


@pytest.fixture(scope="module")
def document(page):
    return json.loads((page[0] / "anatomy.json").read_text())


def test_the_page_draws_each_program_to_scale(page, document):
    source = (page[0] / "anatomy.html").read_text()
    assert source.count("Memory over time") == len(document["rows"]) + 2 == 8
    assert "None" not in source
    assert "http" not in source
    assert "<script" not in source
    top = max(row["peak_bytes"] for row in document["rows"])
    for row in document["rows"]:
        phases = [("forward", 0)]
        picture = stacked_areas(row["bytes"], row["drawn_positions"], row["positions"], top, phases)
        heights = [float(y) for area in picture["areas"] for y in re.findall(r" ([\d.]+)", area["path"])]
        assert picture["peak"][1] == pytest.approx(min(heights), abs=0.01)
        assert (picture["lower"] - min(heights)) / (picture["lower"] - picture["upper"]) == pytest.approx(
            row["peak_bytes"] / top, abs=0.001
        )


def test_the_switches_of_the_page_work_by_keyboard(page, chrome):
    from selenium.webdriver import Keys

    chrome.get((page[0] / "anatomy.html").as_uri())
    shown = lambda css: [each.text for each in chrome.find_elements("css selector", css) if each.is_displayed()]
    assert [text.split(":")[0] for text in shown(".way > p")] == ["Training"]
    chrome.find_element("id", "o-1").send_keys(Keys.ARROW_RIGHT)
    assert [text.split(":")[0] for text in shown(".way > p")] == ["LoRA"]
    assert shown(".kept em") == []
    chrome.find_element("id", "k-1").send_keys(Keys.ARROW_LEFT)  # round to the last: gradient checkpointing
    assert shown(".kept em") == ["not kept"] * 13
    for width in (390, 1280):
        chrome.set_window_size(width, 900)
        assert chrome.execute_script("return document.documentElement.scrollWidth <= innerWidth"), width
    assert [line for line in chrome.get_log("browser") if line["level"] == "SEVERE"] == []


def test_the_report_opens_with_these_pictures(document):
    """And its roofline has the points of the table."""
    table = json.loads(TABLE)
    reader = Reader(report_page(table | {"anatomy": document}))
    assert (reader.faults, reader.open) == ([], [])
    names = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(names) == len(set(names))
    order = ["memory", "operations", "roofline", "kept", "by-hand", "figures", "stages", "claims", "method"]
    assert [name for name in names if name in order] == order
    drawn = [row["name"] for row in table["rows"] if row["stage"] != "by hand" and not row.get("series")]
    text = reader.page_text()
    assert [name for name in drawn if not re.search(rf"\d+\. {name} ", text)] == []


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


def test_the_reason_of_each_residual_is_read_from_its_code():
    reasons = [field_reasons(inspect.getsource(kind)) for kind, *_ in HALVES.values()]
    assert [len(each) for each in reasons] == [9, 5]
    assert reasons[0]["mixed"] == ("(B, T, N H)", "dweight of out, whose input it was")
    with pytest.raises(ValueError, match="up does not say"):
        field_reasons(inspect.getsource(SwigluResiduals).replace("    up: ndarray  # (B, T, F)", "    up: ndarray  #"))


@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "kv_heads": 2}, {"qkv_bias": True}], ids=str)
def test_what_a_block_keeps_is_what_its_derivatives_need(options):
    """By rule, beside the experiment: a matrix needs its input, and nothing else is for a weight alone."""
    model = random_model("uneven", ModelConfig(**{"kv_heads": 6} | options, **UNEVEN))
    table = block_residuals(model.cfg, model.params, tokens_for(model, 2, 7))
    rows = {(row["half"], row["name"]): row for row in table["rows"]}
    K = model.cfg.kv_heads
    sizes = dict(zip("BTDNKGHF", (2, 7, 96, 6, K, 6 // K, 16, 160)))
    inputs = {("attention", "h"): ["v", "k", "q"], ("attention", "mixed"): ["out"]}
    inputs |= {("feed-forward", "h"): ["gate", "up"], ("feed-forward", "hidden"): ["down"]}
    for place, row in rows.items():
        assert row["lines"], place
        assert ("dx" in row["needed_for"]) == (place not in inputs)
        if place in inputs:
            assert sorted(row["needed_for"]) == sorted(inputs[place])
            assert ("LoRA on q and v" in row["kept_by"]) == ("q" in inputs[place])
            assert "frozen" not in row["kept_by"]
        axes = row["axes"].replace(" + ", "+").replace(", ", ",").replace(" ", "*")
        assert row["shape"] == [*eval(axes, sizes)]
        assert row["bytes"] == 4 * math.prod(row["shape"])
    count = residual_count(model.cfg, 2, 7) - 2 * 2 * 7 * model.cfg.width
    assert table["kept"]["all weights"] == 4 * count // model.cfg.layers
    assert table["kept"]["gradient checkpointing"] == 4 * 2 * 7 * model.cfg.width
    assert (("attention", "raw_q") in rows) == bool(options.get("qk_norm"))


def test_the_operations_drawn_are_those_of_the_programs():
    cfg = PRESETS["tiny"]
    ways = count_ways(cfg)
    for name in ("training", "bottom half frozen", "LoRA", "prefill", "decode"):
        program = drawn_programs(cfg)[name][1](cfg)
        if name in ("prefill", "decode"):
            function, arguments = functools.partial(program.function, cfg), program.arguments[1:]
        else:
            _, _, state, frozen, batch, *_ = program.arguments
            function, arguments = functools.partial(loss_and_gradient, cfg), (state.trainable, frozen, batch)
        assert jaxpr_cost(function, *arguments).matmul == ways[name].flops, name
    for row in operation_rows(cfg):
        assert sum(map(sum, row["by_layer"])) == pytest.approx(row["flops_per_token"])
        assert sum(map(sum, row["by_product"].values())) == pytest.approx(row["flops_per_token"])
        assert row["by_layer"][0][0] > 0
    frozen, top = (np.array(operation_rows(cfg)[n]["by_layer"]) for n in (2, 3))
    assert not frozen[0, 1:].any()
    assert frozen[1].all()
    assert top[1, 2] == 0
    assert top[1, 1] > 0


def test_the_roofline_draws_the_points_to_scale():
    points = [
        {"name": name, "flops": flops, "bytes": 1e6, "seconds": seconds, "backward": False}
        for name, flops, seconds in (("left", 1e6, 0.001), ("right", 1e9, 0.01), ("near", 1.1e9, 0.02))
    ]
    chart = roofline(200e9, 4e9, points, 360.0)
    assert [point["name"] for point in chart["points"]] == ["left", "right", "near"]
    assert [point["share"] for point in chart["points"]] == pytest.approx([0.25, 0.5, 0.275])
    left, right, near = chart["points"]
    decade = abs(right["y"] - left["y"]) / 2  # 1e9 to 1e11 operations a second
    assert near["y"] - right["y"] == pytest.approx(decade * math.log10(100 / 55))
    assert (right["x"] - left["x"]) / 3 == pytest.approx((near["x"] - right["x"]) / math.log10(1.1))
    number = {point["name"]: complex(*point["at"]) for point in chart["points"]}
    assert abs(number["near"] - number["right"]) >= 12
    for name, place in number.items():  # beside its own dot
        assert min(chart["points"], key=lambda point: abs(place - complex(point["x"], point["y"])))["name"] == name
    assert all(chart["left"] <= point["x"] <= chart["right"] for point in chart["points"])


def test_bad_input_is_a_sentence(tmp_path, capsys):
    (tmp_path / "file").touch()
    for flags, words in ((["--preset", "nan"], "Did you mean"), (["--out", str(tmp_path / "file")], "cannot be written")):
        assert main(flags) == 2
        assert words in capsys.readouterr().err
