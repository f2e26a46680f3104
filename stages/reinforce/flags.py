"""Flags of `python -m stages.reinforce`: learning from rewards."""

import dataclasses
from pathlib import Path
from typing import Annotated

from engine.model.config import LoraConfig
from stages.cli.flags import DeviceFlag, VerboseFlag, default, integer, interval, number, parser, path, seconds
from stages.finetune.flags import Learns


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is asked, and how answers are drawn."""

    task: Annotated[str, parser(str, "TASK")] = "length:12"
    """`length:N` (words), `regex:PATTERN` (found in the answer), or `sum` (the last number is right)."""
    data: Annotated[Path | None, parser(path, "FILE"), default("prompts that come with the task")] = None
    """A .jsonl of {"prompt": "...", "answer": 7}; only `sum` needs answers."""
    prompts: Annotated[int, parser(integer(1, 1024), "N")] = 2
    """Prompts a round."""
    group: Annotated[int, parser(integer(2, 256), "N")] = 8
    """Answers to each prompt, which are compared with one another."""
    max_tokens: Annotated[int | None, parser(integer(1), "N"), default("48, or what the context has room for")] = None
    """Tokens of an answer at most."""
    temperature: Annotated[float, parser(number(0, 100, above=True), "X")] = 1.0
    """At 1 answers are drawn as the model that learns would give them; others are drawn from a flatter or sharper one."""


@dataclasses.dataclass(frozen=True)
class Moves:
    """How it learns."""

    learning_rate: Annotated[float | None, parser(number(0, 1, above=True), "X"), default("5e-4, or 2e-5 without LoRA")] = None
    """AdamW's."""
    updates: Annotated[int, parser(integer(1, 64), "N")] = 1
    """Steps on each round's answers."""
    clip: Annotated[float, parser(number(0, 10, above=True), "X")] = 0.2
    """How far a token's probability may move within a round before it gains nothing more: 0.2 is from 0.8 to 1.2 times."""
    kl: Annotated[float, parser(number(0, 10), "X")] = 0.0
    """Pull towards the model it was at first, a weight on their divergence."""


@dataclasses.dataclass(frozen=True)
class Rounds:
    """How long. When both are given, whichever ends first."""

    max_time: Annotated[float | None, parser(seconds, "TIME"), default("2m when no --rounds are given")] = None
    """Time in rounds, such as 90s, 3m; compiling and measuring are not counted."""
    rounds: Annotated[int | None, parser(integer(1), "N"), default("as many as fit into the time")] = None
    """Times that answers are drawn and learnt from."""


@dataclasses.dataclass(frozen=True)
class Kept:
    """What is kept, and how often."""

    out_dir: Annotated[Path | None, parser(path, "FOLDER"), default("runs/MODEL-TASK")] = None
    """The run folder. A run that is already there is continued."""
    overwrite: Annotated[bool, default("off")] = False
    """Begin anew in a folder that holds a run."""
    save_every: Annotated[int | float, parser(interval, "N|TIME"), default("60s")] = 60.0
    """Rounds or time between checkpoints."""
    keep: Annotated[int, parser(integer(1), "N")] = 2
    """Checkpoints to keep."""


@dataclasses.dataclass(frozen=True)
class Reinforce:
    """A model, a task, and what of the model learns."""

    asked: Asked
    learns: Learns
    moves: Moves
    length: Rounds
    folder: Kept
    model: Annotated[str, parser(str, "MODEL")] = "smollm2-135m-instruct"
    """A run or step folder, a Hugging Face folder, a .gguf file, or a named model."""
    seed: Annotated[int, parser(integer(0, 2**31 - 1), "N")] = 0
    """Of the adapter's first weights, of the order of the prompts, and of what is drawn."""
    device: DeviceFlag = "auto"
    """auto, cpu, gpu or tpu."""
    dry_run: Annotated[bool, default("off")] = False
    """Print what a round would take, and stop."""
    verbose: VerboseFlag = False
    """Show the traceback of an error."""

    @property
    def adapter(self) -> LoraConfig | None:
        """The LoRA to train; None when weights of the model themselves learn."""
        return self.learns.adapter
