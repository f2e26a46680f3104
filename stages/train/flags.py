"""Flags of training: text, step, optimizer and folder; those left out have the preset's recipe."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from engine.counting.accelerators import Accelerator, find_networked
from engine.errors import UserError
from engine.model.config import preset
from stages.cli.flags import (
    BATCH,
    COUNT,
    MeshFlags,
    default,
    integer,
    interval,
    number,
    one_of,
    parser,
    path,
    positive,
)
from stages.runs.flags import FolderFlags, LengthFlags, RunFlags

RECIPE = default("the preset's recipe")


def preset_name(text: str) -> str:
    preset(text)
    return text


@dataclasses.dataclass(frozen=True)
class TextFlags:
    """The training text."""

    data: Annotated[str, parser(str, "TEXT")] = "shakespeare"
    """A named text (shakespeare, python), a text file, .jsonl, .parquet or .bin, or a folder of them."""
    validation: Annotated[
        Path | None, parser(path, "FILE"), default("the asset's own, else the text's last 5%")
    ] = None
    """A text that is never trained on."""
    tokenizer: Annotated[str | None, parser(str, "KIND"), RECIPE] = None
    """`bpe:2048` (trained on the text), `bytes`, or a folder with a tokenizer.json."""


@dataclasses.dataclass(frozen=True)
class StepFlags:
    """The batch of a step, and how it is computed."""

    batch: Annotated[int | None, BATCH, RECIPE] = None
    """Windows of text a step."""
    accumulate: Annotated[int | None, COUNT, RECIPE] = None
    """Parts the batch is read in, one after another: less memory, the same step."""
    context: Annotated[int | None, parser(integer(2), "N"), RECIPE] = None
    """Tokens a window."""
    dtype: Annotated[str | None, one_of("bfloat16", "float32"), default("bfloat16")] = None
    """The type of products; weights are float32 in any case."""
    scan: Annotated[bool, default("off for small presets on a CPU")] = False
    """Compile one layer and loop over it."""
    remat: Annotated[bool, default("off for small presets")] = False
    """Gradient checkpointing: recompute each layer in the backward pass. Less memory, a third more work."""


@dataclasses.dataclass(frozen=True)
class OptimizerFlags:
    """The optimizer and its schedule."""

    optimizer: Annotated[str | None, one_of("muon", "adamw"), RECIPE] = None
    """`muon` (on the matrices inside blocks, AdamW on the rest) or `adamw`."""
    learning_rate: Annotated[float | None, positive(10), RECIPE] = None
    """The learning rate of AdamW; a recipe may have a factor on it for the embedding, and one for the head."""
    matrix_learning_rate: Annotated[float | None, positive(10), RECIPE] = None
    """Muon's."""
    schedule: Annotated[str | None, one_of("cosine", "wsd"), RECIPE] = None
    """`cosine`, or `wsd`: warm up, stay, decay."""
    warmup: Annotated[float | None, parser(number(0, 1), "SHARE"), RECIPE] = None
    """Share of the run in which the learning rate rises."""
    decay: Annotated[float | None, parser(number(0, 1), "SHARE"), RECIPE] = None
    """Share of the run in which it falls, with wsd."""
    weight_decay: Annotated[float | None, parser(number(0, 10), "X"), RECIPE] = None
    """Pull of the weights towards zero."""
    clip: Annotated[float | None, positive(), RECIPE] = None
    """Largest norm of the gradient; inf for no clipping."""


@dataclasses.dataclass(frozen=True)
class TrainFolderFlags(FolderFlags):
    """The run folder, how often it is written, and how often the run evaluates."""

    log_every: Annotated[int, COUNT] = 10
    """Steps between lines of metrics.jsonl."""
    eval_every: Annotated[
        int | float | None,
        parser(interval, "N|TIME"),
        default("a tenth of the run"),
    ] = None
    """Steps (200) or training time (30s) between quick evaluations on the validation text."""


@dataclasses.dataclass(frozen=True)
class TrainFlags(RunFlags):
    """Flags of training; those left out have the preset's recipe (stages/train/run.py)."""

    text: TextFlags
    length: LengthFlags
    step: StepFlags
    optimizer: OptimizerFlags
    folder: TrainFolderFlags
    mesh: MeshFlags
    preset: Annotated[tyro.conf.Positional[str], parser(preset_name, "PRESET")] = "demo"
    """The architecture: demo, nano, tiny, or a published one such as smollm2-135m."""
    accelerator: Annotated[Accelerator | None, parser(find_networked, "NAME"), default("h100")] = None
    """Predict for this device under --dry-run --mesh: a100, h100, h200, b200, tpu-v5e, tpu-v5p or tpu-v6e."""

    def check_together(self) -> None:
        if self.accelerator and not (self.dry_run and self.mesh.mesh):
            raise UserError(
                "--accelerator is what --dry-run --mesh AXES predicts for: give all three, or leave it out."
            )
