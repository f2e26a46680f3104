"""Flags of reinforcement learning: the rollouts, what is trainable, the update, the length and the folder."""

import dataclasses
from pathlib import Path
from typing import Annotated

from stages.cli.flags import COUNT, default, integer, number, parser, path, positive, seconds
from stages.runs.flags import FolderFlags, ModelRunFlags, TrainableFlags


@dataclasses.dataclass(frozen=True)
class RolloutFlags:
    """The prompts, and how completions are sampled."""

    task: Annotated[tuple[str, ...], default("length:12", metavar="TASK ...")] = ("length:12",)
    """`length:N` words, `regex:PATTERN` found in the answer, `sum`: the last number is right, `yes-no`: how it begins.
    `exact`: the row's answer. FILE.py:FUNCTION takes any of `completion`, `prompt` and `answer` and returns a number.
    Several add up, each by its weight: 0.5*length:12."""
    data: Annotated[Path | None, parser(path, "FILE"), default("prompts that come with the task")] = None
    """A .jsonl of {"prompt": "...", "answer": 7}; only `sum`, `exact` and functions read answers."""
    reward_timeout: Annotated[float, parser(seconds, "TIME"), default("10")] = 10.0
    """Time that a function of your own has for the completions of a round."""
    prompts: Annotated[int, parser(integer(1, 1024), "N")] = 2
    """Prompts a round."""
    group: Annotated[int, parser(integer(2, 256), "N")] = 8
    """Completions of each prompt, which are compared with one another."""
    max_tokens: Annotated[int | None, COUNT, default("48, or what the context has room for")] = None
    """Tokens of a completion at most."""
    temperature: Annotated[float, positive(2)] = 1.0
    """At 1 completions are sampled as the trained model would give them; else from a flatter or sharper distribution."""


@dataclasses.dataclass(frozen=True)
class UpdateFlags:
    """The optimizer steps of a round."""

    learning_rate: Annotated[float | None, positive(1), default("5e-4, or 2e-5 without LoRA")] = None
    """The learning rate of AdamW."""
    updates: Annotated[int, parser(integer(1, 64), "N")] = 1
    """Steps on each round's completions."""
    clip: Annotated[float, positive(10)] = 0.2
    """How far a token's probability may move within a round before it gains nothing more: 0.2 is from 0.8 to 1.2 times."""
    kl: Annotated[float, parser(number(0, 10), "X")] = 0.1
    """Weight of the KL divergence from the model before training, which keeps answers from becoming unlike its own."""
    fluency: Annotated[float, parser(number(0, 10), "X")] = 0.25
    """Weight of a second reward, beside the task's: less for each bit per byte of an answer by the model before training."""


@dataclasses.dataclass(frozen=True)
class DurationFlags:
    """The length of the run. With both, the run ends at whichever comes first."""

    max_time: Annotated[
        float | None, parser(seconds, "TIME"), default("2m, but at least 20 rounds, when neither is given")
    ] = None
    """Time in rounds, such as 90 (seconds) or 3m; compiling and measuring are not counted."""
    rounds: Annotated[int | None, COUNT, default("as many as fit into the time")] = None
    """Times that completions are sampled and trained on."""


@dataclasses.dataclass(frozen=True)
class ReinforceFlags(ModelRunFlags):
    rollout: RolloutFlags
    trainable: TrainableFlags
    update: UpdateFlags
    length: DurationFlags
    folder: FolderFlags
