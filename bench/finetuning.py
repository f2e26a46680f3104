"""Measures fine-tuning steps beside a full training step: time, operations, optimizer memory.

    python -m bench.finetuning                                6 layers, 512 wide, 256 tokens, batch 8
    python -m bench.finetuning --shape 8x768x256x8            layers x width x tokens x batch
    python -m bench.finetuning --model smollm2-135m-instruct  a real model

The steps train everything, the upper half, LoRA on q and v, LoRA on all seven matrices, and that over an int8 base, whole
and row by row, in turns with a large matmul. Frozen matrices are stored in the compute type. The step is `train_step` with
AdamW and clipping.
"""

import dataclasses
import sys

from bench.cli import Json, check_rounds, parse_shape, run_bench
from engine.device import start_jax


@dataclasses.dataclass(frozen=True)
class FinetuningFlags:
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
    """Interleaved rounds, at least 6; the medians count."""


def measure_finetuning(flags: FinetuningFlags) -> Json:
    shape = parse_shape("--shape", flags.shape)
    check_rounds(flags.rounds)
    start_jax()
    from bench.finetuning_steps import measure_steps
    from bench.models import load, make_step_inputs

    if flags.model:
        model = load(flags.model)
        return measure_steps(model.name, model.cfg, model.params, flags.batch, flags.tokens, flags.rank, flags.rounds)
    inputs = make_step_inputs(shape, "bfloat16")
    return measure_steps(str(shape), inputs.cfg, inputs.params, shape.batch, shape.tokens, flags.rank, flags.rounds)


if __name__ == "__main__":
    sys.exit(run_bench("bench.finetuning", __doc__, FinetuningFlags, measure_finetuning))
