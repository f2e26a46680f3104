"""What a fine-tuning step costs beside a full one: in time, in operations, in memory for the optimizer.

    python -m bench.finetuning                          6 layers, 512 wide, 256 tokens, batch 8
    python -m bench.finetuning --shape 8x768x256x8      layers x width x tokens x batch
    python -m bench.finetuning --model smollm2-135m-instruct    LoRA of a real model, beside full and the best product

Four ways to train one model, in turns: everything, the upper half, LoRA on q and v, LoRA on all seven. What is frozen
lies in the compute type. The step is the project's own `train_step` with AdamW and clipping; operations are read from
its program. The last line is JSON.
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from bench.cli import run_bench
from bench.shape import check_rounds, parse_shape
from engine.device import start_jax


@dataclasses.dataclass(frozen=True)
class FinetuningFlags:
    """What is measured."""

    shape: str = "6x512x256x8"
    """LAYERSxWIDTHxTOKENSxBATCH; heads are 64 wide."""
    model: str | None = None
    """A model to adapt in place of a shape: a run folder, a Hugging Face folder, a .gguf file, or a named model."""
    tokens: int = 256
    """Of a row, with --model."""
    batch: int = 2
    """Rows a step, with --model."""
    rank: int = 8
    """Of each LoRA pair."""
    rounds: int = 9
    """Interleaved rounds, at least 3; the median of the ratios within each counts."""


def measure_finetuning(flags: FinetuningFlags) -> dict[str, Any]:
    """Measures, prints the table and returns the document."""
    shape = parse_shape("--shape", flags.shape)
    check_rounds(flags.rounds)
    start_jax()
    # JAX is imported from here on: help is quick without it, and the allocator is told before it starts.
    from bench.finetuning_steps import measure_model, measure_shape

    if flags.model:
        return measure_model(flags.model, tokens=flags.tokens, batch=flags.batch, rank=flags.rank, rounds=flags.rounds)
    return measure_shape(shape, flags.rank, flags.rounds)


def main(args: Sequence[str] | None = None) -> int:
    """Measures, prints the table and, last, one line of JSON."""
    return run_bench("bench.finetuning", __doc__, FinetuningFlags, measure_finetuning, args)


if __name__ == "__main__":
    sys.exit(main())
