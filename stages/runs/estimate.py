"""Estimates what a run will take, by formula, before it starts: FLOPs, memory and time; and this machine's ceilings."""

import dataclasses
import subprocess
import sys
from typing import Literal

import jax

from engine.counting.flops import train_flops
from engine.counting.hardware import Ceilings, ceilings, memory_limit_bytes
from engine.counting.memory import training_memory
from engine.counting.trainable_paths import TrainablePaths
from engine.errors import UserError
from engine.files import cache_folder
from engine.format import duration, size
from engine.model.config import ModelConfig
from engine.training.loss import loss_chunks
from stages.cli.console import Console
from stages.runs.recipes import Recipe

MEASURE = (
    "from engine.allocator import keep_freed_memory; keep_freed_memory(); "
    "from engine.counting.hardware import ceilings; ceilings(refresh=True)"
)
OWN = 700_000_000  # bytes that Python, JAX and what was compiled hold beside a step: between 0.3 and 1 GB were seen


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """One run: the model (`name`), how it is trained, for how many `steps` (or rounds) or `seconds` of training.

    `trainable`: the parameters that train, None for all of them. `base`: the type of frozen matrices, see `TrainableParts`.
    """

    name: str
    cfg: ModelConfig
    recipe: Recipe
    seed: int
    steps: int | None
    seconds: float | None
    trainable: TrainablePaths | None = None
    base: Literal["float", "int8"] = "float"

    @property
    def step_flops(self) -> int:
        """FLOPs of a step, 6N + 12LDT a token: no products for frozen weights' gradients, none below all that trains."""
        flops = train_flops(self.cfg, self.recipe.context, attention="full", trainable=self.trainable, remat="none")
        return flops.total * self.step_tokens

    @property
    def step_tokens(self) -> int:
        return self.recipe.batch * self.recipe.context

    @property
    def memory(self) -> int:
        """Predicted bytes at the fullest moment of a step."""
        rows = self.recipe.batch // self.recipe.accumulate
        return training_memory(
            self.cfg, rows, self.recipe.context, optimizer=self.recipe.optimizer.kind, trainable=self.trainable,
            loss_chunks=loss_chunks(self.cfg, rows * self.recipe.context, self._head_is_narrow),
            microbatches=self.recipe.accumulate, base=self.base,
        ).total  # fmt: skip

    @property
    def _head_is_narrow(self) -> bool:
        """Whether the head is frozen, and so in the compute type or int8."""
        if self.trainable is None or ("embed" if self.cfg.tied else "head") in self.trainable.weights:
            return False
        return self.base == "int8" or self.cfg.dtype != "float32"

    def progress(self, step: int, elapsed: float) -> float:
        """Returns the share of the run that is done, 1 at its end: of the steps or of the time, whichever is further."""
        by_steps = step / self.steps if self.steps else 0.0
        by_time = elapsed / self.seconds if self.seconds else 0.0
        return min(1.0, max(by_steps, by_time))

    def share_of(self, parts: int) -> int | float:
        """Returns an interval of one of so many equal parts of the run: seconds (float) if it has any, else steps (int)."""
        return self.seconds / parts if self.seconds else max(1, (self.steps or parts) // parts)

    def predict(self, step_seconds: float) -> tuple[int, str]:
        """Returns (steps, how long they take in words) when one takes `step_seconds`."""
        by_time = max(1, round(self.seconds / step_seconds)) if self.seconds else float("inf")
        steps = int(min(self.steps or by_time, by_time))
        return steps, duration(steps * step_seconds)


def ceiling(cfg: ModelConfig, best: Ceilings) -> float:
    """Returns the FLOP/s of the machine's best matrix product in the model's compute type."""
    return 1e9 * (best.bf16_gflops if cfg.dtype == "bfloat16" else best.f32_gflops)


def measured_ceilings(console: Console, again: bool = False) -> Ceilings:
    """Returns this machine's ceilings: the best ever measured here, kept in the user's cache.

    They are measured when the cache has none, or `again`, which raises what was measured in a noisy moment. On a CPU
    another process measures, whose arrays are not this run's memory.
    """
    with console.task("measuring this machine's ceilings") as report:
        on_cpu = jax.default_backend() == "cpu"
        if on_cpu and (again or not any(cache_folder("hardware").glob("*.json"))):
            nowhere = subprocess.DEVNULL
            subprocess.run([sys.executable, "-c", MEASURE], stdin=nowhere, stdout=nowhere, stderr=nowhere, check=False)
        return ceilings(refresh=again and not on_cpu, report=report)


def memory_limit() -> int:
    """Returns the bytes that a step may hold: those of the accelerator when there is one, else the host's less OWN."""
    stats = jax.devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    return (stats or {}).get("bytes_limit") or max(memory_limit_bytes() - OWN, 0)


def require_memory(needed: int, sentence: str, remedy: str) -> None:
    """Raises UserError when more than `memory_limit` is needed: `sentence` says how much and for what, `remedy` what to do."""
    limit = memory_limit()
    if needed > limit:
        raise UserError(f"{sentence}, and {size(limit)} are left for it; {remedy}")
