"""No program of ours holds a product that XLA gets wrong on a CPU.

From jaxlib 0.10.2 to 0.12 a product whose right side is one number spread over a matrix is garbage
when its result is summed in the same loop: `sum(x @ full_like(x, 2.5), -1)` of 5 x 60 x 60 numbers
is off by 1e30, for nobody writes the spread matrix to memory. So no product of ours reads a
broadcast that is made beside it, of one number or of many; behind `jax.lax.optimization_barrier` it
is made first, and is an array like any other.
"""

import functools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.laws.programs import PROGRAMS, QWEN2, QWEN3, WITHOUT_WEIGHTS
from tests.tiny import normal, tiny_config

# Vocabularies whose logits are made in parts: of the columns or rows of a batch, of int8 columns,
# of a served head.
LARGE = {
    "train step, AdamW": 140_000,
    "train step, LoRA": 20_000,
    "train step, LoRA on int8": 20_000,
    "score": 60_000,
    "score, int8": 60_000,
    "decode_slots, int8": 20_000,
}
CASES = {f"{name}, Qwen3": (name, QWEN3) for name in PROGRAMS}
OTHERWISE = (
    "train step, AdamW",
    "train step, LoRA",
    "score",
    "prefill, one prompt",
    "decode_steps",
    "decode_slots",
)
CASES |= {
    f"{name}, Qwen2": (name, QWEN2) for name in OTHERWISE
}  # tied, with biases, one query head for each key head
CASES |= {
    f"{name}, {vocab}": (name, tiny_config(vocab=vocab, width=64, dtype="bfloat16"))
    for name, vocab in LARGE.items()
}
# The results of these are arrays in memory, or differ from place to place.
MATERIALIZED = {
    "parameter",
    "iota",
    "dot",
    "reduce",
    "fusion",
    "call",
    "while",
    "conditional",
    "custom-call",
    "opt-barrier",
    "get-tuple-element",
    "rng-bit-generator",
    "gather",
    "dynamic-slice",
}


def spread_operands(text: str) -> list[str]:
    """Finds each product in a module's HLO with an operand that is made of broadcasts alone, in the
    same computation.
    """
    return [name for computation in re.split(r"\n(?=\S)", text) for name in _spread_operands(computation)]


def _spread_operands(computation: str) -> list[str]:
    lines = re.findall(r"^\s+(?:ROOT )?%?(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)", computation, re.MULTILINE)
    instructions = {
        name: (shape, opcode, re.findall(r"[\w.-]+(?=,|$)", operands))
        for name, shape, opcode, operands in lines
    }

    @functools.cache
    def is_spread(name: str) -> bool:
        shape, opcode, operands = instructions[name]
        if opcode == "constant":
            return "[]" in shape
        return opcode == "broadcast" or (opcode not in MATERIALIZED and all(map(is_spread, operands)))

    return [
        name
        for name, (_, opcode, operands) in instructions.items()
        if opcode == "dot" and any(map(is_spread, operands))
    ]


def spread_in(program, *arguments) -> list[str]:
    """Looks at a program as it is traced and as it is compiled."""
    lowered = program.lower(*arguments)
    return spread_operands(lowered.as_text("hlo")) + spread_operands(lowered.compile().as_text())


# Qwen2's own products are those of a training step and of scoring too; these steps multiply as
# AdamW's, Muon's, LoRA's and a preference's do, and these programs of inference as those that read
# more tokens, rows or slots.
ALIKE = ("microbatches", "bottom frozen", "top frozen", "Muon, scan", "LoRA, remat", "preference, all")
NIGHT = {
    f"{name}, Qwen2" for name in ("train step, LoRA", "prefill, one prompt", "decode_steps", "decode_slots")
}
NIGHT |= {f"train step, {kind}, Qwen3" for kind in ALIKE}
NIGHT |= {
    f"{name}, Qwen3"
    for name in ("decode_slots, float32 cache", "decode in one slot", "prefill_tail", "decode_steps")
}
assert {*CASES} >= NIGHT
# Those that take longest to compile, and differ from others of the default run in a part alone.
WHOLE = {
    f"train step, {kind}, Qwen3"
    for kind in ("scan and remat", "Muon", "reinforce", "LoRA", "KTO", "preference")
}
WHOLE |= {
    f"{name}, Qwen3"
    for name in (
        "decode_steps, int8",
        "decode_steps, int8 widened",
        "decode_slots, adapters",
        "decode_slots, int8",
    )
}
WHOLE |= {"train step, LoRA on int8, 20000", "train step, LoRA, 20000", "decode_slots, int8, 20000"}
assert {*CASES} >= WHOLE


@pytest.mark.law("lowering")
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case, marks=[pytest.mark.night] * (case in NIGHT) + [pytest.mark.whole] * (case in WHOLE)
        )
        for case in sorted(CASES)
    ],
)
def test_no_product_reads_a_broadcast(case):
    name, cfg = CASES[case]
    program = PROGRAMS[name](cfg)
    lowered = program.function.lower(*program.arguments)
    compiled = lowered.compile(program.options).as_text()
    for text in (lowered.as_text("hlo"), compiled):
        products = " dot(" in text or "thrice_" in text  # by XLA, or all by kernels in C
        assert products or name in WITHOUT_WEIGHTS or "initial" in name
        assert spread_operands(text) == []


BAD = {
    "summed": lambda x: jnp.sum(x @ jnp.full_like(x, 2.5), -1),
    "multiplied and summed": lambda x: jnp.sum((x @ jnp.ones_like(x)) * x, -1),
    "a number of the data": lambda x: jnp.sum(x @ jnp.broadcast_to(x[0, 0, 0], x.shape), -1),
    "computed on": lambda x: jnp.max(x @ jnp.exp(jnp.zeros_like(x) + x[:, :1, :1]), -1),
    "transposed": lambda x: jnp.sum(jnp.einsum("bij,bkj->bik", x, jnp.full_like(x, 2.5)), -1),
    "a gradient of ones": jax.grad(lambda x: jnp.sum(x @ x)),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", BAD)
def test_the_check_sees_one(name, dtype):
    assert spread_in(jax.jit(BAD[name]), normal(0, 5, 60, 60, dtype=dtype))


@pytest.mark.parametrize("shape", [(5, 60, 60), (4, 128, 128), (2, 256, 64)])
def test_behind_a_barrier_it_is_right(shape):
    """At sizes of which the unguarded form is off by 1e27 and more."""
    x, y = normal(0, *shape), np.full((shape[0], shape[2], 96), 2.5, np.float32)
    guarded = jax.jit(lambda x: jnp.sum(x @ jax.lax.optimization_barrier(jnp.full_like(y, 2.5)) * 3, -1))
    assert spread_in(guarded, x) == []
    expected = (np.asarray(x, float) @ y * 3).sum(-1)
    for _ in range(3):  # garbage differs from run to run
        np.testing.assert_allclose(guarded(x), expected, atol=1e-5 * np.abs(expected).max())


def test_every_program_of_the_engine_is_looked_at():
    """The list holds each jitted function that a module of the engine names."""
    kind = type(jax.jit(abs))
    modules = [module for name, module in sys.modules.items() if name.startswith("engine.")]
    jitted = {
        value.__wrapped__: name
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, kind)
    }
    listed = {make(QWEN3).function.__wrapped__ for make in PROGRAMS.values()}
    assert {name for function, name in jitted.items() if function not in listed} == set()
