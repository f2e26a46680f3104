"""Flags that training, fine-tuning and reinforcement learning share."""

import dataclasses
import re
from pathlib import Path
from typing import Annotated, Literal

from engine.errors import UserError
from engine.mesh import processes
from engine.model.config import LoraConfig
from stages.cli.flags import COUNT, DeviceFlag, VerboseFlag, default, integer, interval, number, one_of, parser, path, seconds

TARGETS = "q, k, v, out, gate, up, down, or all"


@dataclasses.dataclass(frozen=True)
class FolderFlags:
    """The run folder, and how often it is written."""

    out_dir: Annotated[Path | None, parser(path, "FOLDER"), default("in runs/, by the names of model and data")] = None
    """The run folder. A run that is already there is continued."""
    overwrite: Annotated[bool, default("off")] = False
    """Begin anew in a folder that holds a run."""
    save_every: Annotated[int | float, parser(interval, "N|TIME"), default("60s")] = 60.0
    """Steps (or rounds) or training time between checkpoints."""
    keep: Annotated[int, COUNT] = 2
    """Checkpoints to keep."""
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
    """The length of the run. Of both, whichever ends first."""

    max_time: Annotated[
        float | None, parser(seconds, "TIME"), default("3m without --steps, and a fine-tuning then 100 steps at least")
    ] = None
    """Training time, such as 90 (seconds), 3m or 1h, which ends the run; compiling, evaluating and saving are not counted."""
    steps: Annotated[int | None, COUNT, default("as many as fit into the time")] = None
    """Batches to train on."""


def parse_address(text: str) -> str:
    """Parses HOST:PORT."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"wanted HOST:PORT, such as 10.0.0.1:8476, got {text!r}")
    return text


@dataclasses.dataclass(frozen=True)
class MeshFlags:
    """Several devices of one host, or several processes, of which each is started with this same command."""

    mesh: Annotated[str | None, parser(str, "AXES"), default("one device; with several processes fsdp over all devices")] = None
    """`data=2,fsdp=4,tensor=2`: copies of the model, devices that share its weights, and that share each product."""
    processes: Annotated[
        int | None,
        parser(lambda text: 0 if text == "auto" else integer(1)(text), "N|auto"),
        default("as SLURM, Open MPI 4, or 5 with mpi4py, or a TPU slice started"),
    ] = None
    """`auto` asks Kubernetes too (with JAX's k8s extra); for N give --process and --coordinator."""
    process: Annotated[int | None, parser(integer(0), "I"), default("the cluster's")] = None
    """This process's number, from 0."""
    coordinator: Annotated[str | None, parser(parse_address, "HOST:PORT"), default("the cluster's")] = None
    """Where process 0 listens for the others."""
    join_within: Annotated[float, parser(seconds, "TIME"), default("5m")] = 300.0
    """The time in which all processes must have started."""

    def check_together(self) -> None:
        joining = (self.process is not None, self.coordinator is not None)
        if self.processes in (None, 1) and any(joining):
            raise UserError("--process and --coordinator are for several processes: give --processes N, or leave them out.")
        if (self.processes or 1) > 1 and not all(joining):
            raise UserError(
                f"Each of {self.processes} processes wants --process I and --coordinator HOST:PORT, or all of them "
                "--processes auto."
            )
        if self.processes and (self.process or 0) >= self.processes:
            raise UserError(f"--process {self.process} is one of 0 to {self.processes - 1} when there are {self.processes}.")

    def connect(self) -> None:
        """Joins the other processes, if there are any."""
        if self.processes != 1 and (self.processes is not None or processes.in_cluster()):
            processes.join(self.coordinator, self.processes or None, self.process, self.join_within)


def parse_lora(text: str) -> LoraConfig:
    """Parses 'rank=8,alpha=16,targets=q,v', in which each of the three may be left out."""
    pairs = [part.partition("=") for part in re.split(r",(?=\w*=)", text.replace(" ", "").strip(",")) if part]
    fields = {name: value for name, _, value in pairs}
    if not fields.keys() <= {"rank", "alpha", "targets"} or len(fields) < len(pairs):
        raise ValueError(f"wanted rank=8,alpha=16,targets=q,v, each once (targets: {TARGETS}), got {text!r}")
    rank = integer(1, 4096)(fields.get("rank", "8"))
    alpha = number(0, above=True)(fields["alpha"]) if "alpha" in fields else 2.0 * rank
    return LoraConfig(rank, alpha, tuple(fields.get("targets", "all").split(",")))


@dataclasses.dataclass(frozen=True)
class TrainableFlags:
    """Which parameters are trainable; without any of these, a LoRA on all matrices."""

    train: Annotated[tuple[str, ...], default("nothing but the adapter", metavar="PATTERN ...")] = ()
    """Patterns of paths ('blocks/(28|29)/.*'), `head`, or `all`."""
    freeze: Annotated[tuple[str, ...], default("nothing", metavar="PATTERN ...")] = ()
    """`bottom:N`, `top:N`, or patterns: all else is trained."""
    lora: Annotated[LoraConfig | None, parser(parse_lora, "SIZE"), default("rank=8,alpha=16,targets=all")] = None
    """rank=8,alpha=16,targets=q,v: an adapter beside a frozen model."""
    base: Annotated[Literal["float", "int8"], one_of("float", "int8")] = "float"
    """The type of the frozen model under an adapter: `int8` takes half the memory."""

    def check_together(self) -> None:
        if self.lora and (self.train or self.freeze):
            raise UserError("--lora leaves the whole model frozen: it does not go with --train or --freeze.")
        if self.base == "int8" and (self.train or self.freeze):
            raise UserError("--base int8 is for what stays frozen under a LoRA: it does not go with --train or --freeze.")

    @property
    def adapter(self) -> LoraConfig | None:
        """The LoRA to train; None when parameters of the model itself are trained."""
        return None if self.train or self.freeze else self.lora or LoraConfig()

    def describe(self) -> str:
        """Describes the trainable parameters, which must be the same to resume a run: `learns` in run.json."""
        if self.adapter:
            return f"{self.adapter}{' over int8' if self.base == 'int8' else ''}"
        return f"train {' '.join(self.train) or 'all'} freeze {' '.join(self.freeze)}".strip()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFlags:
    """Flags of every run."""

    seed: Annotated[int, parser(integer(0, 2**31 - 1), "N")] = 0
    """Of first weights, of the order of the data, and of sampling."""
    device: DeviceFlag = "auto"
    dry_run: Annotated[bool, default("off")] = False
    """Print the plan, with what it would cost, and stop."""
    verbose: VerboseFlag = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelRunFlags(RunFlags):
    """Flags of a run that trains a model further."""

    model: Annotated[str, parser(str, "MODEL")] = "smollm2-135m-instruct"
    """A run or step folder, a Hugging Face folder, a .gguf file, ORG/NAME on the hub, or a named model."""
