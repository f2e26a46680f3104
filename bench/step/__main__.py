"""Measures a training step: against the machine's fastest matmul, fine-tuning, while a checkpoint is written.

    python -m bench.step                                  a few shapes beside a matmul of the same rounds, and Muon over AdamW
    python -m bench.step --allocator default              without keeping freed memory: the cost of page faults
    python -m bench.step --of finetuning                  LoRA and a frozen half over a full step; --model measures a real model
    python -m bench.step --of saving --preset nano        how long a save stops training, and how much its write slows it
    python -m bench.step --of recipes                     every experiment on the default training run, and what it gave

A step is `train_step`: bfloat16 products, float32 weights, clipping, AdamW, and the guard against
non-finite steps. Steps that are compared run interleaved. Models of --shapes read bytes.
"""

import csv
import dataclasses
import sys
from typing import Literal

from bench.cli import ROOT, check_rounds, parse_shape, run_bench
from bench.machine import Json
from bench.terminal import print_table
from engine.device import start_jax
from engine.errors import UserError

EXPERIMENTS = ROOT / "bench" / "results" / "tries" / "recipes.csv"
SHAPES = {
    "training": ("4x256x256x16", "6x384x256x16", "8x768x256x8"),
    "finetuning": ("6x512x256x8",),
}
# the flags of each measurement
USED = {
    "training": ("shapes", "dtype", "allocator", "rounds"),
    "finetuning": ("shapes", "model", "context", "batch", "rank", "rounds"),
    "saving": ("preset", "interval", "batch", "context", "steps", "rounds"),
    "recipes": (),
}


@dataclasses.dataclass(frozen=True)
class StepFlags:
    of: Literal["training", "finetuning", "saving", "recipes"] = "training"
    """What to measure."""
    shapes: tuple[str, ...] = ()
    """Each as LAYERSxWIDTHxTOKENSxBATCH; heads are 64 wide. By default three of training, else one."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    allocator: Literal["keep", "default"] = "keep"
    """Of training: whether freed memory is kept, as training does."""
    model: str | None = None
    """Of fine-tuning, in place of shapes: a run folder, a Hugging Face folder, a .gguf file, or a named model."""
    rank: int = 8
    """Of each LoRA pair."""
    preset: str = "smollm2-135m"
    """Of saving: the model; its state is weights and both moments of AdamW, in float32."""
    interval: float = 60.0
    """Of saving: seconds between checkpoints."""
    steps: int = 4
    """Of saving: steps alone in a round."""
    batch: int = 2
    """Rows a step, with --model or of saving."""
    context: int = 128
    """Tokens of such a row."""
    rounds: int = 9
    """Interleaved rounds; the median counts, and from 6 on it has an interval."""


def measure_step(flags: StepFlags) -> Json:
    """Measures what --of names, prints its tables and returns the document."""
    check_used(flags)
    if flags.of == "recipes":
        return show_experiments()
    shapes = [parse_shape("a shape of --shapes", text) for text in flags.shapes or SHAPES.get(flags.of, ())]
    check_rounds(flags.rounds)
    if min(flags.interval, flags.steps, flags.batch, flags.context, flags.rank) <= 0:
        raise UserError("--interval, --steps, --batch, --context and --rank must be above 0.")
    if flags.allocator == "keep":
        start_jax()  # without it JAX starts by itself, with glibc's own settings
    from bench.models import BenchModel, load, make_step_inputs
    from bench.step import ways

    if flags.of == "saving":
        return ways.measure_saving(
            flags.preset, flags.interval, flags.batch, flags.context, flags.steps, flags.rounds
        )
    if flags.model:
        model = load(flags.model)
        tokens = flags.batch * flags.context
        steps = ways.finetuning_ways(model, flags.batch, flags.context, flags.rank)
        return {"shapes": [ways.measure_ways(model.name, steps, tokens, model.cfg.dtype, flags.rounds)]}
    documents = []
    for shape in shapes:
        inputs = make_step_inputs(shape, flags.dtype)
        if flags.of == "training":
            steps = ways.optimizer_ways(inputs)
        else:
            model = BenchModel(str(shape), inputs.cfg, inputs.params)
            steps = ways.finetuning_ways(model, shape.batch, shape.tokens, flags.rank)
        documents.append(
            ways.measure_ways(str(shape), steps, shape.batch * shape.tokens, flags.dtype, flags.rounds)
        )
    return {"shapes": documents}


def check_used(flags: StepFlags) -> None:
    """Raises UserError for a flag that was given, and that what --of names does not use."""
    used = ("json", "out", "seconds", "of", *USED[flags.of])
    for field in dataclasses.fields(flags):
        if field.name not in used and getattr(flags, field.name) != field.default:
            raise UserError(f"--of {flags.of} does not use --{field.name.replace('_', '-')}.")


def show_experiments() -> Json:
    """Prints what was tried on the default training run, what each change gave, and whether it was
    kept.

    `to` is the recipe that was changed, layers x width. Runs of 180 s on a quiet machine are what
    counts; runs of equal steps, half as long, compare changes that cost no time on a busy one, but
    mislead: 3 x 128 and a momentum of 0.9 were ahead in them, and behind in whole runs. Two seeds
    of one recipe differ by up to 0.06.
    """
    with EXPERIMENTS.open(encoding="utf-8", newline="") as file:
        experiments = list(csv.DictReader(file))
    print_table("The default run", list(experiments[0]), (list(row.values()) for row in experiments), left=2)
    print("Compare runs of 180 s: two seeds differ by up to 0.06.")
    print("Today's recipe is in stages/train/run.py.")
    return {"experiments": experiments}


if __name__ == "__main__":
    sys.exit(run_bench("bench.step", __doc__, StepFlags, measure_step))
