"""Barriers: without one, XLA's program needs more memory, computes more often or sorts, by its own figures and text."""

import dataclasses
import inspect
import re

import jax
import pytest

from engine.model.config import ModelConfig
from tests.laws.programs import PROGRAMS

CFG = ModelConfig(vocab=512, width=128, layers=1, heads=4, kv_heads=2, ff=352, context=256, qk_norm=True)
# a program, its model, and the functions whose barriers it would miss: by what figure, more than
# how many times
CASES = [
    (
        "train step, AdamW",
        CFG,
        (
            ("_rms_norm_backward", "temporaries", 1.05),
            ("_gain_backward", "temporaries", 1.1),
            ("_swiglu_backward", "temporaries", 1.04),
            ("_rotate", "transcendentals", 1.01),
            ("train_step", "instructions", 1.05),
            ("transpose", "slow products", 0),
        ),
    ),
    (
        "train step, LoRA on int8",
        dataclasses.replace(CFG, vocab=60_000, width=64),
        (
            ("_forward", "temporaries", 1.1),
            ("_logits", "temporaries", 1.3),
            ("_head_backward", "temporaries", 1.03),
        ),
    ),
    (
        "train step, LoRA on int8",
        dataclasses.replace(CFG, width=768, ff=2048, layers=2),
        (("widened_backward", "temporaries", 1.2),),
    ),
    (
        "loss with an adapter on int8",
        dataclasses.replace(CFG, width=768, ff=2048, layers=3),
        (("_after", "temporaries", 1.5),),
    ),
    (
        "prefill, int8 widened",
        dataclasses.replace(CFG, width=768, ff=2048, layers=3),
        (("_multiply_widened", "temporaries", 2),),
    ),
    (
        "train step, LoRA",
        dataclasses.replace(CFG, width=512, ff=1408, layers=4),
        (("_after", "temporaries", 1.1),),
    ),
    ("decode_slots", CFG, (("_threshold", "sorts", 0),)),
]
BARRIER = jax.lax.optimization_barrier


def figures(name: str, cfg: ModelConfig, without: str, monkeypatch) -> dict[str, float]:
    """Compiles a program without the barriers of one function, and returns what it costs. A product
    whose left side is read along its first axis takes XLA's slow path: see `ops.transpose`.
    """
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
    program = PROGRAMS[name](cfg)
    compiled = program.function.lower(*program.arguments).compile(program.options)
    assert bool(removed) == bool(without)
    text = compiled.as_text()
    return {
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "transcendentals": compiled.cost_analysis()["transcendentals"],
        "instructions": text.count(" = "),
        "sorts": text.count(" sort("),
        "slow products": len(re.findall(r" dot\(.*lhs_contracting_dims={0}", text)),
    }


@pytest.mark.night
@pytest.mark.parametrize(("name", "cfg", "functions"), CASES)
def test_a_program_without_a_barrier_is_dearer(name, cfg, functions, monkeypatch):
    with_all = figures(name, cfg, "", monkeypatch)
    for function, figure, times in functions:
        assert figures(name, cfg, function, monkeypatch)[figure] > times * with_all[figure], function
    jax.clear_caches()
