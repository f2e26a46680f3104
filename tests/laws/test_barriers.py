"""Barriers of a training step: without one, XLA's program needs more memory, or computes more often, by its own figures."""

import dataclasses
import inspect

import jax
import pytest
from programs import PROGRAMS

from engine.model.config import ModelConfig

CFG = ModelConfig(vocab=512, width=128, layers=1, heads=4, kv_heads=2, ff=352, context=256, qk_norm=True)
CASES = {  # a program, its model, and the functions whose barriers it would miss: by what figure, at least how many times
    "train step, AdamW": (CFG, (
        ("_rms_norm_backward", "temporaries", 1.05), ("_gain_backward", "temporaries", 1.1),
        ("_swiglu_backward", "temporaries", 1.04), ("_rotate", "transcendentals", 1.01), ("train_step", "instructions", 1.05),
    )),
    "train step, LoRA on int8": (dataclasses.replace(CFG, vocab=20_000, width=64), (
        ("_forward", "temporaries", 1.1), ("_logits", "temporaries", 1.3),
    )),
}  # fmt: skip
BARRIER = jax.lax.optimization_barrier


def figures(name: str, without: str, monkeypatch) -> dict[str, float]:
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
    program = PROGRAMS[name](CASES[name][0])
    compiled = program.function.lower(*program.arguments).compile(program.options)
    assert bool(removed) == bool(without)
    return {
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "transcendentals": compiled.cost_analysis()["transcendentals"],
        "instructions": compiled.as_text().count(" = "),
    }


@pytest.mark.night
@pytest.mark.parametrize("name", CASES)
def test_a_step_without_a_barrier_is_dearer(name, monkeypatch):
    with_all = figures(name, "", monkeypatch)
    for function, figure, times in CASES[name][1]:
        assert figures(name, function, monkeypatch)[figure] > times * with_all[figure], function
    jax.clear_caches()
