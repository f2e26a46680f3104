"""Flags of `python -m stages.train`: a run from random weights."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from engine.errors import UserError
from engine.model.config import PRESETS
from stages.cli.flags import DeviceFlag, VerboseFlag, default, integer, interval, number, one_of, parser, path, seconds

RECIPE = default("the preset's recipe")


@dataclasses.dataclass(frozen=True)
class Text:
    """What is learnt."""

    data: Annotated[str, parser(str, "TEXT")] = "shakespeare"
    """A named text (shakespeare, python), a file (.txt, .md, .jsonl, .parquet, .bin), or a folder of them."""
    validation: Annotated[Path | None, parser(path, "FILE"), default("the asset's own, else the text's last 5%")] = None
    """A text that is never trained on."""
    tokenizer: Annotated[str | None, parser(str, "KIND"), RECIPE] = None
    """`bpe:2048` (learnt from the text), `bytes`, or a folder with a tokenizer.json."""


@dataclasses.dataclass(frozen=True)
class Length:
    """How long. When both are given, whichever ends first."""

    max_time: Annotated[float | None, parser(seconds, "TIME"), default("3m when no --steps are given")] = None
    """Training time, such as 90s, 3m, 1h; compiling, evaluating and saving are not counted."""
    steps: Annotated[int | None, parser(integer(1), "N"), default("as many as fit into the time")] = None
    """Batches to learn from."""


@dataclasses.dataclass(frozen=True)
class Step:
    """What a step reads and how it is computed."""

    batch: Annotated[int | None, parser(integer(1), "N"), RECIPE] = None
    """Windows of text a step."""
    accumulate: Annotated[int | None, parser(integer(1), "N"), RECIPE] = None
    """Parts the batch is read in, one after another: less memory, the same step."""
    context: Annotated[int | None, parser(integer(2), "N"), RECIPE] = None
    """Tokens a window."""
    dtype: Annotated[str | None, parser(one_of("bfloat16", "float32"), "TYPE"), default("bfloat16")] = None
    """What products are computed in; weights are float32 in any case."""
    scan: Annotated[bool, default("off for small presets")] = False
    """Compile one layer and loop over it."""
    remat: Annotated[bool, default("off for small presets")] = False
    """Recompute each layer in the backward pass instead of keeping it: less memory, a third more work."""


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """How weights move."""

    optimizer: Annotated[str | None, parser(one_of("muon", "adamw"), "NAME"), RECIPE] = None
    """`muon` (on the matrices inside blocks, AdamW on the rest) or `adamw`."""
    learning_rate: Annotated[float | None, parser(number(0, 10, above=True), "X"), RECIPE] = None
    """AdamW's."""
    matrix_learning_rate: Annotated[float | None, parser(number(0, 10, above=True), "X"), RECIPE] = None
    """Muon's."""
    schedule: Annotated[str | None, parser(one_of("cosine", "wsd"), "NAME"), RECIPE] = None
    """`cosine`, or `wsd`: warm up, stay, decay."""
    warmup: Annotated[float | None, parser(number(0, 1), "SHARE"), RECIPE] = None
    """Share of the run in which the learning rate rises."""
    decay: Annotated[float | None, parser(number(0, 1), "SHARE"), RECIPE] = None
    """Share of the run in which it falls, with wsd."""
    weight_decay: Annotated[float | None, parser(number(0, 10), "X"), RECIPE] = None
    """Pull of the weights towards zero."""
    clip: Annotated[float | None, parser(number(0, above=True), "X"), RECIPE] = None
    """Largest norm of the gradient; inf for no clipping."""


@dataclasses.dataclass(frozen=True)
class Folder:
    """What is kept, and how often."""

    out_dir: Annotated[Path | None, parser(path, "FOLDER"), default("runs/PRESET-TEXT")] = None
    """The run folder. A run that is already there is continued."""
    overwrite: Annotated[bool, default("off")] = False
    """Begin anew in a folder that holds a run."""
    eval_every: Annotated[int | float | None, parser(interval, "N|TIME"), default("a tenth of the run")] = None
    """Steps (200) or training time (30s) between quick looks at the validation text."""
    save_every: Annotated[int | float, parser(interval, "N|TIME"), default("60s")] = 60.0
    """Steps or training time between checkpoints."""
    log_every: Annotated[int, parser(integer(1), "N")] = 10
    """Steps between lines of metrics.jsonl."""
    keep: Annotated[int, parser(integer(1), "N")] = 2
    """Checkpoints to keep."""


@dataclasses.dataclass(frozen=True)
class Train:
    """All that can be said about a run; what is left out is the preset's recipe (stages/runs/recipes.py)."""

    text: Text
    length: Length
    step: Step
    optimizer: Optimizer
    folder: Folder
    preset: Annotated[tyro.conf.Positional[str], parser(str, "PRESET"), default("demo, or tiny with --by-hand")] = ""
    """The architecture: demo, nano, tiny, or a published one such as smollm2-135m."""
    by_hand: Annotated[bool, default("off")] = False
    """Train with the NumPy model of engine/by_hand instead: its own backward pass and AdamW, in float32."""
    seed: Annotated[int, parser(integer(0, 2**31 - 1), "N")] = 0
    """Of the first weights and of the order of the text."""
    device: DeviceFlag = "auto"
    """auto, cpu, gpu or tpu."""
    dry_run: Annotated[bool, default("off")] = False
    """Print the plan and stop."""
    verbose: VerboseFlag = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        if not self.preset:
            object.__setattr__(self, "preset", "tiny" if self.by_hand else "demo")
        if self.preset not in PRESETS:
            from engine.model.config import preset

            preset(self.preset)
        if self.step.batch and self.step.accumulate and self.step.batch % self.step.accumulate:
            raise UserError(f"A batch of {self.step.batch} cannot be read in {self.step.accumulate} equal parts.")
