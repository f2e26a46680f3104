"""Compiles the six programs whose memory is drawn, for a model's shape: no array is allocated."""

import dataclasses
from collections.abc import Iterator

import jax

from bench.lowering.programs import CAPACITY, CHUNK, ROWS, B, Make, Program, T, decode_program, prefill_program, step_program
from engine.inference.decode import decode_step
from engine.model.config import ModelConfig


def drawn_programs(cfg: ModelConfig) -> dict[str, tuple[str, Make]]:
    """Returns name -> (what it works on, its maker). Half of a model needs two layers."""
    batch, half = f"{B} sequences of {T} tokens", cfg.layers // 2
    with_remat = lambda cfg: step_program()(dataclasses.replace(cfg, remat="block"))
    programs: dict[str, tuple[str, Make]] = {"training": (batch, step_program())}
    if half:
        programs["bottom half frozen"] = batch, step_program(freeze=[f"bottom:{half}"])
    programs |= {
        "LoRA": (batch, step_program(lora="plain")),
        "gradient checkpointing": (batch, with_remat),
        "prefill": (f"{ROWS} prompts of {CHUNK} tokens", prefill_program()),
        "decode": (f"one token for each of {ROWS} requests, caches of {CAPACITY} tokens", decode_program(decode_step)),
    }
    return programs


def compile_drawn(cfg: ModelConfig) -> Iterator[tuple[str, str, Program, jax.stages.Compiled]]:
    """Yields (name, what it works on, the program, the same compiled)."""
    for name, (work, make) in drawn_programs(cfg).items():
        program = make(cfg)
        yield name, work, program, program.function.lower(*program.arguments).compile(program.options)
