"""Estimates a run's FLOPs, memory and time by formula, before it starts; finds this machine's ceilings."""

import contextlib
import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Collection
from typing import Any, Literal

import jax

from engine.counting.flops import train_flops
from engine.counting.hardware import (
    RATES,
    Ceilings,
    device_memory_bytes,
    measure_ceilings,
    require_memory,
    save_ceilings,
    saved_ceilings,
)
from engine.counting.memory import TrainingMemory, dtype_bytes, training_memory
from engine.counting.params import TrainablePaths, all_trainable, count_params
from engine.format import duration, format_bytes, format_count, quantity
from engine.mesh import processes
from engine.mesh.shape import ONE_DEVICE, MeshShape, divisors
from engine.model.config import ModelConfig
from engine.model.loss import loss_chunks
from engine.training.optimizer import OptimizerConfig
from engine.training.step import LORA_COMPILER_OPTIONS
from stages.cli.console import Console

MEASURE_PROGRAM = (
    "from engine.device import keep_freed_memory; keep_freed_memory(); import dataclasses, json; "
    "from engine.counting.hardware import measure_ceilings; print(json.dumps(dataclasses.asdict(measure_ceilings())))"
)
PROCESS_BYTES, LAYER_BYTES = 475_000_000, 8_000_000  # of Python and JAX; of a layer's programs, and of compiling them


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A run's hyperparameters. `tokenizer`: `bpe:N` or `bytes`; `batch`: windows of `context` tokens, in `accumulate` parts."""

    tokenizer: str
    context: int
    batch: int
    optimizer: OptimizerConfig
    accumulate: int = 1
    scan: bool = False
    remat: bool = False

    def resize(self, batch: int, context: int, devices: int = 1) -> "Recipe":
        """Returns it with another batch and context, in parts of at most as many tokens (of each of `devices`) as before.

        One part stays one.
        """
        most, parts = self.batch * self.context // self.accumulate, [1]
        if self.accumulate > 1:
            parts = [n for n in divisors(batch) if batch % (n * devices) == 0] or parts
        accumulate = next((n for n in parts if batch // (n * devices) * context <= most), parts[-1])
        return dataclasses.replace(self, batch=batch, context=context, accumulate=accumulate)


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """One run: the model (`name`), how it is trained, and for how many `steps` or `seconds` of training.

    `trainable`: the parameters that train, None for all. `base`: the type of the frozen matrices under an adapter.
    `least_steps`: those to make even if the time is over. `mesh`: the devices that share a step. `blocks`: matrices that lie in
    blocks, of which two numbers in 32 weights train: for memory about those of a LoRA pair of rank width / 32.
    """

    name: str
    cfg: ModelConfig
    recipe: Recipe
    seed: int
    steps: int | None
    seconds: float | None
    trainable: TrainablePaths | None = None
    base: Literal["float", "int8"] = "float"
    step_name: Literal["step", "round"] = "step"
    least_steps: int = 0
    mesh: MeshShape = ONE_DEVICE
    blocks: Collection[str] = ()

    @property
    def step_flops(self) -> int:
        """FLOPs of a step: 6N + 12LDT a token, less the products for gradients that no trainable parameter needs."""
        flops = train_flops(self.cfg, self.recipe.context, attention="full", trainable=self.trainable)
        return flops.total * self.step_tokens

    @property
    def step_tokens(self) -> int:
        return self.recipe.batch * self.recipe.context

    @property
    def memory(self) -> TrainingMemory:
        """The predicted memory of a step on one device: of its rows, its share of the weights, its heads and columns."""
        recipe, (_, fsdp, tensor) = self.recipe, self.mesh
        parts = {name: getattr(self.cfg, name) // tensor for name in ("vocab", "heads", "kv_heads", "ff")}
        cfg, rows = dataclasses.replace(self.cfg, **parts), recipe.batch // recipe.accumulate // self.mesh.row_shards
        if (trainable := self.trainable) and self.blocks:
            packed = trainable.weights.intersection(self.blocks)
            trainable = TrainablePaths(trainable.weights - packed, packed - {"embed", "head"}, cfg.width // 32)
        memory = training_memory(
            cfg,
            rows,
            recipe.context,
            optimizer=recipe.optimizer.kind,
            trainable=trainable,
            loss_chunks=loss_chunks(cfg, rows * recipe.context, self._head_is_narrow),
            microbatches=recipe.accumulate,
            base=self.base,
        )
        # The model as loaded, in float32, which the report compares with; of a LoRA the pairs; of blocks what a step unpacks.
        if self.trainable is not None:
            is_shared = self.trainable.adapted or dtype_bytes(cfg) == 4
            loaded = memory.gradients if is_shared else 4 * count_params(cfg).total
            memory = dataclasses.replace(memory, params=memory.params + loaded)
        # The whole head, gathered in float32, and its copy.
        gathered = (4 + dtype_bytes(cfg)) * cfg.width * self.cfg.vocab * (fsdp * tensor > 1)
        names = ("params", "optimizer", "copies", "gradients", "accumulated")
        shares = {name: getattr(memory, name) // fsdp + gathered * (name == "copies") for name in names}
        return dataclasses.replace(memory, **shares)

    @property
    def process_bytes(self) -> int:
        """The host memory beside the arrays: 0.4 to 0.7 GB were seen with 2 to 8 layers, 1 GB with 30."""
        return PROCESS_BYTES + LAYER_BYTES * self.cfg.layers

    @property
    def memory_limit(self) -> int:
        """The bytes for a step on a device: an accelerator's, or its share of the host's less what the processes take."""
        if jax.default_backend() != "cpu":
            return device_memory_bytes()
        count = processes.process_count() // processes.machine_count()
        sharing = min(self.mesh.devices, count * jax.local_device_count())
        return max(device_memory_bytes() - count * self.process_bytes, 0) // sharing

    @property
    def _head_is_narrow(self) -> bool:
        if self.trainable is None or ("embed" if self.cfg.tied else "head") in self.trainable.weights:
            return False
        return self.base == "int8" or self.cfg.dtype != "float32"

    @property
    def compiler_options(self) -> dict[str, Any] | None:
        return LORA_COMPILER_OPTIONS if self.trainable and self.trainable.adapted else None

    def progress(self, step: int, elapsed: float) -> float:
        """Returns the share of the run that is done, by steps or by time, whichever is larger."""
        by_time = min(elapsed / (self.seconds or math.inf), step / self.least_steps if self.least_steps else math.inf)
        return min(1.0, max(step / (self.steps or math.inf), by_time))

    def length(self) -> str:
        lengths = [quantity(self.steps, self.step_name)] if self.steps else []
        lengths += [f"{duration(self.seconds)} of training time"] if self.seconds else []
        least = f", but at least {quantity(self.least_steps, self.step_name)}" if self.least_steps else ""
        return " or ".join(lengths) + ", whichever ends first" * (len(lengths) == 2) + least

    def predict(self, step_seconds: float) -> tuple[int, str]:
        steps = max(1, round(self.seconds_left(0, 0.0, step_seconds) / step_seconds))
        return steps, duration(steps * step_seconds)

    def seconds_left(self, step: int, elapsed: float, step_seconds: float) -> float:
        left = [(self.steps - step) * step_seconds] if self.steps else []
        if self.seconds:
            left += [max(self.seconds - elapsed, (self.least_steps - step) * step_seconds)]
        return min(left)

    def require(self, needed: int, what: str, remedy: str, detail: str = "") -> None:
        detail += f" on each of {self.mesh.devices} devices" * (self.mesh.devices > 1)
        require_memory(needed, what, remedy, detail=detail, limit=self.memory_limit)

    def cost_relative_to_full(self) -> str:
        full = dataclasses.replace(self, trainable=all_trainable(self.cfg), base="float", blocks=())
        flops, memory = self.step_flops / full.step_flops, self.memory.total / full.memory.total
        return f"FLOPs {flops:.0%}, memory {memory:.0%}, time {flops:.0%} of a step in which everything is trained"


def run_fraction(parts: int, steps: int | None, seconds: float | None) -> int | float:
    """Returns 1 / `parts` of a run: seconds (float) if it has any, else steps (int)."""
    return seconds / parts if seconds else max(1, (steps or parts) // parts)


def find_ceilings(console: Console) -> Ceilings:
    """Returns this machine's ceilings from the user's cache; or measures and saves them.

    On a CPU another process measures: its arrays are not this run's memory.
    """
    if saved := saved_ceilings():
        return saved
    with console.task("measuring this machine's ceilings, once", always=True) as report:
        ceilings = (measure_in_subprocess() if jax.default_backend() == "cpu" else None) or measure_ceilings(report)
    return save_ceilings(ceilings)


def measure_in_subprocess() -> Ceilings | None:
    command = [sys.executable, "-c", MEASURE_PROGRAM]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    with contextlib.suppress(ValueError, TypeError):
        return Ceilings(**json.loads(result.stdout))
    return None


def mesh_ceilings(ceilings: Ceilings, mesh: MeshShape) -> Ceilings:
    """Returns what all devices of a mesh reach together, of one's `ceilings`; a machine's CPUs share its cores."""
    count = mesh.devices if jax.default_backend() != "cpu" else processes.machine_count()
    return dataclasses.replace(ceilings, **{rate: count * getattr(ceilings, rate) for rate in RATES})


def memory_estimate(plan: RunPlan, needed: int) -> str:
    limit = f"{format_bytes(plan.memory_limit)} that are left for a {plan.step_name}"
    limit += f" on each device of {plan.mesh}" * (plan.mesh.devices > 1)
    saved = dataclasses.replace(plan, mesh=ONE_DEVICE).memory.saved // processes.process_count()
    phrase = (
        f"about {format_bytes(needed)} of {limit}; {format_bytes(saved)} more of host memory, if free, to save beside training"
    )
    if jax.default_backend() == "cpu" and plan.mesh.devices == 1:
        phrase += f"; {format_count(needed + saved + plan.process_bytes)}B in all with Python and JAX"
    return phrase
