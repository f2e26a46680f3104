"""Barriers of a training step: without one, XLA's program needs more memory, or computes more often, by its own figures."""

import inspect

import jax
import pytest
from programs import PROGRAMS

from engine.model.config import ModelConfig

CFG = ModelConfig(vocab=512, width=128, layers=1, heads=4, kv_heads=2, ff=352, context=256, qk_norm=True)
BARRIER = jax.lax.optimization_barrier


def figures(without: str, monkeypatch) -> dict[str, float]:
    """Compiles the step without the barriers of one function: bytes of temporaries, transcendental functions, instructions."""
    removed = []

    def barrier(operand):
        frame = inspect.currentframe().f_back
        while frame.f_code.co_name.startswith("<"):  # a generator in the function
            frame = frame.f_back
        if frame.f_code.co_name != without:
            return BARRIER(operand)
        removed.append(operand)
        return operand

    monkeypatch.setattr(jax.lax, "optimization_barrier", barrier)
    jax.clear_caches()
    program = PROGRAMS["train step, AdamW"](CFG)
    compiled = program.function.lower(*program.arguments).compile()
    assert bool(removed) == bool(without)
    return {
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "transcendentals": compiled.cost_analysis()["transcendentals"],
        "instructions": compiled.as_text().count(" = "),
    }


@pytest.mark.night
def test_a_step_without_a_barrier_is_dearer(monkeypatch):
    with_all = figures("", monkeypatch)
    for function, figure, times in (
        ("_rms_norm_backward", "temporaries", 1.05), ("_gain_backward", "temporaries", 1.1),
        ("_swiglu_backward", "temporaries", 1.04), ("_rotate", "transcendentals", 1.01), ("train_step", "instructions", 1.05),
    ):  # fmt: skip
        assert figures(function, monkeypatch)[figure] > times * with_all[figure], function
    jax.clear_caches()
