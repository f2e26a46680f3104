"""Measures the anatomy of a model's steps: what they hold, keep and compute, and how fast they run."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from bench.anatomy import real_steps
from bench.anatomy.by_hand import block_residuals, by_hand_memory
from bench.anatomy.memory import KINDS, memory_over_time, thin
from bench.anatomy.operations import count_ways, operation_rows
from bench.anatomy.programs import B, T, compile_drawn
from bench.cli import Json, progress
from bench.models import BenchModel, tokens_for
from engine.counting.hardware import best_ceilings, ceiling_rounds, saved_ceilings
from engine.inference.decode import prepare_params
from engine.model.config import ModelConfig


def anatomy(model: BenchModel) -> Json:
    """Measures a model's programs, in turns with the machine's ceilings."""
    cfg, rows, served = model.cfg, list[Json](), None
    progress(f"compiling the steps of {model.name}, and taking some")
    rounds = ceiling_rounds()
    for name, work, program, compiled in compile_drawn(cfg):
        progress(f"compiled: {name}", replace=True)
        row = _memory_row(name, work, memory_over_time(compiled))
        if name in ("prefill", "decode"):
            served = served or prepare_params(cfg, model.params)
            row["seconds"] = real_steps.infer(name, compiled, model, served, rounds)
        else:
            row["seconds"] = real_steps.train(program, compiled, model, rounds)
        rows.append(row)
    ceilings = next(rounds)
    if saved := saved_ceilings():  # others' work only lowers them
        ceilings = best_ceilings(ceilings, saved)
    progress("running the NumPy model, forward and backward", replace=True)
    tokens = tokens_for(model, B, T + 1)
    return {
        "model": model.name, "config": cfg.to_json(), "rows": rows, "by_hand": by_hand_memory(cfg, model.params, tokens),
        "residuals": block_residuals(cfg, model.params, tokens[:, :-1]), "operations": operation_rows(cfg),
        "roofline": {
            "flops": ceilings.peak_flops(cfg.dtype), "bytes": 1e9 * ceilings.read_gbs, "points": list(_points(cfg, rows)),
        },
    }  # fmt: skip


def _memory_row(name: str, work: str, memory: Any) -> Json:
    alive, positions = memory.alive, thin(memory, 240)
    top = alive.index(max(alive))
    return {
        "program": name, "work": work, "positions": len(alive), "backward": memory.backward, "update": memory.update,
        "start_bytes": alive[0], "peak_bytes": alive[top], "xla_bytes": memory.xla,
        "holes": 1 - alive[top] / memory.xla, "peak": {kind: memory.bytes[kind][top] for kind in KINDS},
        "drawn_positions": positions,
        "bytes": {kind: [memory.bytes[kind][place] for place in positions] for kind in KINDS},
    }  # fmt: skip


def _points(cfg: ModelConfig, rows: list[Json]) -> Iterator[Json]:
    """Yields each program's point of the roofline: operations and bytes by formula, seconds measured."""
    ways = count_ways(cfg)
    ways["gradient checkpointing"] = count_ways(dataclasses.replace(cfg, remat="block"))["training"]
    for row in rows:
        way = ways[row["program"]]
        yield {
            "name": row["program"], "flops": way.flops, "bytes": way.bytes, "seconds": row["seconds"],
            "backward": row["backward"] is not None,
        }  # fmt: skip
