"""Flags of training runs: folder, length and seed; and which parameters of a loaded model train."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal, get_args

from engine.errors import UserError
from engine.model.config import LoraConfig
from stages.cli.flags import (
    COUNT,
    MODEL,
    DeviceFlag,
    VerboseFlag,
    default,
    integer,
    interval,
    one_of,
    parser,
    path,
    seconds,
)

BaseType = Literal["float", "int8"]
TrainedType = Literal["float", "q4"]


@dataclasses.dataclass(frozen=True)
class FolderFlags:
    """The run folder, and how often it is written."""

    out_dir: Annotated[
        Path | None, parser(path, "FOLDER"), default("in runs/, by the names of model and data")
    ] = None
    """The run folder. A run that is already there is continued."""
    overwrite: Annotated[bool, default("off")] = False
    """Begin anew in a folder that holds a run."""
    save_every: Annotated[int | float, parser(interval, "N|TIME"), default("60s")] = 60.0
    """Steps (or rounds) or training time between checkpoints."""
    keep: Annotated[int, COUNT] = 2
    """Newest checkpoints to keep; the best evaluated one stays beside them."""
    log_every: Annotated[int, COUNT] = 1
    """Steps (or rounds) between lines of metrics.jsonl."""
    record: Annotated[Path | None, parser(path, "FILE"), default("off")] = None
    """Record how the weights move: some 21 of their states, as lines of JSON. Changes nothing of the run."""
    watch: Annotated[int | None, parser(integer(0, 65535), "PORT"), default("off")] = None
    """Show the run on a page at 127.0.0.1:PORT while it goes on: curves, weights, texts. 0 takes a free port."""
    tensorboard: Annotated[bool, default("off")] = False
    """Write the numbers of metrics.jsonl for TensorBoard too, into the run folder."""


@dataclasses.dataclass(frozen=True)
class LengthFlags:
    """The length of the run. With both, the run ends at whichever comes first."""

    max_time: Annotated[
        float | None,
        parser(seconds, "TIME"),
        default("3m, or in a fine-tuning 3 readings of the data, without --steps"),
    ] = None
    """Training time, such as 90 (seconds), 3m or 1h, which ends the run; compiling, evaluating and saving are not counted."""
    steps: Annotated[int | None, COUNT, default("as many as fit into the time")] = None
    """Batches to train on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFlags:
    seed: Annotated[int, parser(integer(0, 2**31 - 1), "N")] = 0
    """The seed of random first weights, of the order of the data, and of sampling."""
    device: DeviceFlag = "auto"
    dry_run: Annotated[bool, default("off")] = False
    """Print the plan, with what it would cost, and stop."""
    verbose: VerboseFlag = False


@dataclasses.dataclass(frozen=True)
class TrainableFlags:
    """Which parameters are trainable; without any of these, a LoRA on all matrices."""

    train: Annotated[tuple[str, ...], default("nothing but the adapter", metavar="PATTERN ...")] = ()
    """Patterns of paths ('blocks/(28|29)/.*'), `head`, or `all`."""
    freeze: Annotated[tuple[str, ...], default("nothing", metavar="PATTERN ...")] = ()
    """`bottom:N`, `top:N`, or patterns: all else is trained."""
    lora: Annotated[
        LoraConfig | None,
        parser(LoraConfig.from_text, "SIZE"),
        default(
            "on all matrices, its rank by the data in `finetune`, else 8; "
            "that of an adapter that is continued"
        ),
    ] = None
    """rank=8,alpha=16,targets=q,v: a new adapter beside a frozen model."""
    base: Annotated[BaseType, one_of(*get_args(BaseType))] = "float"
    """The type of the frozen model under an adapter: `int8` takes half the memory."""
    weights: Annotated[TrainedType, one_of(*get_args(TrainedType))] = "float"
    """`q4`: train weights, all or those of --train and --freeze, while they are rounded as `serve --weights q4` rounds them."""

    def check_together(self) -> None:
        adapter_flag = ""
        if self.lora:
            adapter_flag = "--lora"
        elif self.base == "int8":
            adapter_flag = "--base int8"
        if adapter_flag and not self.adapter:
            raise UserError(
                f"{adapter_flag} leaves the whole model frozen under an adapter, "
                "and --train, --freeze and --weights q4 train its own weights: "
                f"leave {adapter_flag} out, or them."
            )

    @property
    def adapter(self) -> LoraConfig | None:
        """The LoRA that trains; None when parameters of the model itself are trained."""
        if self.train or self.freeze or self.weights == "q4":
            return None
        return self.lora or LoraConfig()

    def describe(self, lora: LoraConfig | None) -> str:
        """Returns `learns` of run.json: the trainable parameters, which must be the same to resume
        a run.
        """
        if lora and self.base == "int8":
            return f"{lora} over int8"
        if lora:
            return str(lora)
        patterns = " ".join(self.train) or "all"
        description = f"train {patterns} freeze {' '.join(self.freeze)}".strip()
        if self.weights == "q4":
            description += " in q4"
        return description


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelRunFlags(RunFlags):
    model: Annotated[str, parser(str, "MODEL"), default("smollm2-135m-instruct", MODEL)] = (
        "smollm2-135m-instruct"
    )
