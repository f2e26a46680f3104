"""The memory of a step over time, from what XLA compiled for rows of the stage table; what a block keeps for backward."""

import dataclasses
import inspect
import itertools
import math
import types

import jax
import jax.numpy as jnp
import pytest

from bench.models import next_token_batch, random_model, tokens_for
from bench.stages.memory import KINDS, POSITIONS, find_buffers, memory_over_time
from bench.stages.residuals import HALVES, block_residuals, field_reasons
from bench.stages.rows import decode_row, prefill_row, training_kinds, training_row
from engine.by_hand.block import SwigluResiduals
from engine.by_hand.model import residual_count
from engine.errors import UserError
from engine.inference.decode import prepare_params
from engine.model.config import PRESETS, ModelConfig

TINY = random_model("tiny", PRESETS["tiny"])
LORA = "LoRA rank 8 on q and v"
UNEVEN = {
    "vocab": 300,
    "width": 96,
    "layers": 4,
    "heads": 6,
    "ff": 160,
    "context": 64,
    "head_dim": 16,
    "dtype": "float32",
}


def trained(name, **changes):
    """The program of a training row."""
    cfg = dataclasses.replace(TINY.cfg, **changes)
    model = random_model("changed", cfg) if "vocab" in changes else TINY
    kind = next(kind for kind in training_kinds(cfg) if kind.name == name)
    return training_row(cfg, model.params, kind, next_token_batch(tokens_for(model, 4, 257))).program


@pytest.fixture(scope="module")
def memories():
    served = prepare_params(TINY.cfg, TINY.params)
    programs = {name: trained(name) for name in ("pre-training step", "bottom half frozen", LORA)} | {
        "gradient checkpointing": trained("pre-training step", remat="block"),
        "prefill": prefill_row(TINY.cfg, served, tokens_for(TINY, 5, 64)).program,
        "decode": decode_row(TINY.cfg, served, 8, 128, name="decode", weights=None).program,
    }
    return {name: memory_over_time(program) for name, program in programs.items()}


@pytest.mark.whole
def test_the_peak_is_xlas_but_for_the_holes_of_its_heap(memories):
    assert set(KINDS) == {*memories["decode"].bytes}
    assert all(0.85 < max(memory.alive) / memory.xla <= 1 for memory in memories.values())


@pytest.mark.whole
def test_training_climbs_through_forward_and_comes_down_through_backward(memories):
    for name in ("pre-training step", LORA, "bottom half frozen"):
        memory, residuals = memories[name], memories[name].bytes["residuals"]
        forward = residuals[: memory.backward : memory.backward // 4]
        assert all(low <= high for low, high in itertools.pairwise(forward)), name
        assert residuals[memory.backward - 1] > 0.4 * max(memory.alive), name
        assert max(residuals[memory.update + 1 :]) < 100, name


@pytest.mark.whole
def test_a_way_of_training_holds_what_it_needs(memories):
    most = {
        name: {kind: max(values) for kind, values in memory.bytes.items()}
        for name, memory in memories.items()
    }
    # Attention in C keeps no weights, so that a block's residuals are fewer, and its input the
    # larger share of them.
    assert 2 * most["gradient checkpointing"]["residuals"] < most["pre-training step"]["residuals"]
    assert most["bottom half frozen"]["residuals"] < 0.7 * most["pre-training step"]["residuals"]
    assert 4 * most[LORA]["gradients"] < most["pre-training step"]["gradients"]
    state = {name: memory.bytes["optimizer state"][0] for name, memory in memories.items()}
    assert state[LORA] < state["bottom half frozen"] < state["pre-training step"]
    assert state["decode"] == 0


@pytest.mark.whole
def test_backward_is_found_where_a_frozen_head_makes_logits_in_parts():
    memory = memory_over_time(trained(LORA, vocab=16384))
    assert 0 < memory.backward < memory.update
    assert max(memory.bytes["residuals"]) > 1e6


@pytest.mark.whole
def test_inference_keeps_nothing(memories):
    for name in ("prefill", "decode"):
        memory, kinds = memories[name], memories[name].bytes
        assert memory.backward is None
        assert not any(any(kinds[kind]) for kind in ("gradients", "residuals", "optimizer state"))
        assert len(set(kinds["parameters"])) == len(set(kinds["KV cache"])) == 1
        assert kinds["KV cache"][0] > 0


@pytest.mark.whole
def test_a_document_has_fewer_positions_and_the_same_peak(memories):
    memory = memories["pre-training step"]
    document = memory.document()
    alive = [sum(column) for column in zip(*document["bytes"].values())]
    assert len(alive) == POSITIONS < len(memory.alive)
    assert max(alive) == max(memory.alive)
    assert document["backward"] / POSITIONS == pytest.approx(memory.backward / len(memory.alive), abs=0.01)


@pytest.mark.whole
def test_a_loop_carries_its_buffers_and_no_two_values_lie_in_one_place():
    """1 MB goes round a loop, whose body makes two more: 3 MB beside the argument, however often it
    runs.
    """

    def looped(x):
        return jax.lax.fori_loop(0, 5, lambda _, x: jnp.sin(x @ x).T @ x, x).sum()

    compiled = jax.jit(looped).lower(jax.ShapeDtypeStruct((512, 512), jnp.float32)).compile()
    assert max(memory_over_time(compiled).alive) == pytest.approx(4 * 2**20, rel=0.01)
    buffers, positions = find_buffers(trained("pre-training step", remat="block"))
    for position in range(0, positions, 7):
        alive = sorted((each.place, each.bytes) for each in buffers if each.start <= position <= each.end)
        for ((allocation, offset), size), (after, _) in itertools.pairwise(alive):
            assert (allocation, offset + size) <= after


def test_a_backend_that_does_not_say_where_values_lie_is_refused():
    with pytest.raises(UserError, match="does not say where"):
        memory_over_time(types.SimpleNamespace(memory_analysis=lambda: None))


def test_the_reason_of_each_residual_is_read_from_its_code():
    reasons = [field_reasons(inspect.getsource(kind)) for kind, *_ in HALVES.values()]
    assert [len(each) for each in reasons] == [9, 5]
    assert reasons[0]["mixed"] == ("(B, T, N H)", "dweight of out, whose input it was")
    with pytest.raises(ValueError, match="up does not say"):
        field_reasons(
            inspect.getsource(SwigluResiduals).replace("    up: ndarray  # (B, T, F)", "    up: ndarray  #")
        )


@pytest.mark.whole
@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "kv_heads": 2}, {"qkv_bias": True}], ids=str)
def test_what_a_block_keeps_is_what_its_derivatives_need(options):
    """By rule, beside the experiment: a matrix needs its input, and nothing else is for a weight
    alone.
    """
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
