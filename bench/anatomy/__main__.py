"""Shows what a step holds over time: training, LoRA, half frozen, checkpointing, prefill and decode, from what XLA compiled.

    python -m bench.anatomy                           a small model; the bytes that each program holds, by kind
    python -m bench.anatomy --preset tiny --out DIR   also writes DIR/anatomy.html, the same as pictures
    python -m bench.anatomy --model RUN               the shape of a run folder, a file or smollm2-135m-instruct

The bytes are those of the buffers in the program's schedule, and their peak is checked against XLA's own figure. The NumPy
model of `engine/by_hand` then runs once, and what it holds is measured after each half of a block.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro

from bench.cli import Json, check_out, print_table, progress, run_bench
from engine.device import start_jax
from engine.format import percent, si


@dataclasses.dataclass(frozen=True)
class AnatomyFlags:
    preset: str = "demo"
    """The architecture."""
    model: Annotated[str | None, tyro.conf.arg(help_behavior_hint="(default: the preset)")] = None
    """A run folder, a step folder in it, a Hugging Face folder, a .gguf file or smollm2-135m-instruct."""
    out: Annotated[Path | None, tyro.conf.arg(help_behavior_hint="(default: no page)")] = None
    """A folder for anatomy.html."""


def measure_anatomy(flags: AnatomyFlags) -> Json:
    """Prints the summary, writes the page and returns the document."""
    check_out(flags.out)
    start_jax()
    from bench.anatomy.by_hand import by_hand_memory
    from bench.anatomy.memory import KINDS, memory_over_time, thin
    from bench.anatomy.page import write_page
    from bench.anatomy.programs import B, T, compile_drawn
    from bench.models import load, random_model, tokens_for
    from engine.model.config import preset

    model = load(flags.model) if flags.model else random_model(flags.preset, preset(flags.preset))
    name, cfg = model.name, model.cfg
    rows, cells = [], []
    progress(f"compiling the steps of {name}")
    for program, work, compiled in compile_drawn(cfg):
        progress(f"compiled: {program}", replace=True)
        memory = memory_over_time(compiled)
        alive, positions = memory.alive, thin(memory, 240)
        top = alive.index(max(alive))
        rows.append({
            "program": program, "work": work, "positions": len(alive), "backward": memory.backward, "update": memory.update,
            "start_bytes": alive[0], "peak_bytes": alive[top], "allocated_bytes": memory.allocated, "xla_bytes": memory.xla,
            "error": memory.error, "peak": {kind: memory.bytes[kind][top] for kind in KINDS}, "drawn_positions": positions,
            "bytes": {kind: [memory.bytes[kind][place] for place in positions] for kind in KINDS},
        })  # fmt: skip
        by_kind = [si(memory.bytes[kind][top], "B") if memory.bytes[kind][top] else "–" for kind in KINDS]
        cells.append([program, si(alive[0], "B"), si(alive[top], "B"), *by_kind, percent(memory.error, signed=True)])
    print_table(f"What a step of {name} holds", ("program", "before", "peak", *KINDS, "off XLA's"), cells)
    progress("running the NumPy model, forward and backward", replace=True)
    by_hand = by_hand_memory(cfg, model.params, tokens_for(model, B, T + 1))
    for row in by_hand:
        print(f"By hand, measured: {row['program']} holds at most {si(row['peak_bytes'], 'B')}.")
    document = {"model": name, "config": cfg.to_json(), "rows": rows, "by_hand": by_hand}
    if flags.out:
        print(f"the page: {write_page(flags.out, document)}", file=sys.stderr)
    return document


if __name__ == "__main__":
    sys.exit(run_bench("bench.anatomy", __doc__, AnatomyFlags, measure_anatomy))
