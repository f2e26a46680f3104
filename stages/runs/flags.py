"""Flags of every training run: its folder, length, devices and seed."""

import dataclasses
from pathlib import Path
from typing import Annotated

from engine.errors import UserError
from engine.mesh import lifecycle, processes
from engine.mesh.shape import MeshShape, parse_mesh
from stages.cli.flags import COUNT, DeviceFlag, VerboseFlag, default, integer, interval, parser, path, seconds


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

    def shape(self) -> MeshShape | None:
        """Returns the shape, once connected: without --mesh `fsdp` over all devices of several processes, None for one."""
        if self.mesh or processes.process_count() == 1:
            return parse_mesh(self.mesh) if self.mesh else None
        import jax

        return MeshShape(fsdp=jax.device_count())

    def connect(self) -> None:
        if self.processes != 1 and (self.processes is not None or processes.in_cluster()):
            lifecycle.join(self.coordinator, self.processes or None, self.process, self.join_within)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFlags:
    """Flags of every run."""

    seed: Annotated[int, parser(integer(0, 2**31 - 1), "N")] = 0
    """The seed of random first weights, of the order of the data, and of sampling."""
    device: DeviceFlag = "auto"
    dry_run: Annotated[bool, default("off")] = False
    """Print the plan, with what it would cost, and stop."""
    verbose: VerboseFlag = False
