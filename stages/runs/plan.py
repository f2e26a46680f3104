"""RunPlan: what a run trains, how, and for how long; `engine.planning` predicts its steps from that."""

import dataclasses
import math
from collections.abc import Collection
from typing import Any, Literal

from engine.counting.memory import TrainingMemory
from engine.format import duration, quantity
from engine.mesh.shape import ONE_DEVICE, MeshShape, divisors
from engine.model.config import ModelConfig
from engine.model.trainable import TrainablePaths, all_trainable
from engine.planning.step import StepPlan
from engine.training.optimizer import OptimizerConfig
from engine.training.step import LORA_COMPILER_OPTIONS


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A run's hyperparameters."""

    tokenizer: str  # `bpe:N`, `bytes`, a folder, or "the model's"
    context: int  # tokens a row
    batch: int  # rows a step
    optimizer: OptimizerConfig
    accumulate: int = 1  # parts that the batch is read in
    scan: bool = False
    remat: bool = False

    def resize(self, batch: int, context: int, devices: int = 1) -> "Recipe":
        """Returns it with another batch and context, in parts of at most as many tokens (of each of
        `devices`) as before.

        One part stays one.
        """
        accumulate = 1
        if self.accumulate > 1:
            accumulate = self._fewest_parts(batch, context, devices)
        return dataclasses.replace(self, batch=batch, context=context, accumulate=accumulate)

    def _fewest_parts(self, batch: int, context: int, devices: int) -> int:
        """Returns the fewest parts of a batch that have no more tokens a device than the parts of
        this recipe; the most there can be where none are so small, and 1 where none divide it.
        """
        most_tokens = self.batch * self.context // self.accumulate
        most_parts = 1
        for parts in divisors(batch):
            if batch % (parts * devices):
                continue
            if batch // (parts * devices) * context <= most_tokens:
                return parts
            most_parts = parts
        return most_parts


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """One run: the model, how it is trained, and for how many `steps` or `seconds` of training."""

    name: str  # the model's
    cfg: ModelConfig
    recipe: Recipe
    seed: int
    steps: int | None
    seconds: float | None
    trainable: TrainablePaths | None = None  # the parameters that train, None for all
    base: Literal["float", "int8"] = "float"  # the type of the frozen matrices under an adapter
    step_name: Literal["step", "round"] = "step"
    least_steps: int = 0  # to make even if the time is over
    mesh: MeshShape = ONE_DEVICE  # the devices that share a step
    # paths of matrices in blocks, of which two numbers in 32 weights train
    blocks: Collection[str] = ()

    @property
    def step(self) -> StepPlan:
        return StepPlan(
            self.cfg,
            self.recipe.batch,
            self.recipe.context,
            optimizer=self.recipe.optimizer.kind,
            microbatches=self.recipe.accumulate,
            mesh=self.mesh,
            trainable=self.trainable,
            base=self.base,
            blocks=self.blocks,
        )

    @property
    def step_flops(self) -> int:
        return self.step.flops

    @property
    def step_tokens(self) -> int:
        return self.step.tokens

    @property
    def memory(self) -> TrainingMemory:
        return self.step.memory

    @property
    def compiler_options(self) -> dict[str, Any] | None:
        if self.trainable and self.trainable.adapted:
            return LORA_COMPILER_OPTIONS
        return None

    def progress(self, step: int, elapsed: float) -> float:
        """Returns the share of the run that is done, by steps or by time, whichever is larger."""
        by_steps = step / (self.steps or math.inf)
        by_time = elapsed / (self.seconds or math.inf)
        if self.least_steps:
            by_time = min(by_time, step / self.least_steps)
        return min(1.0, max(by_steps, by_time))

    def length(self) -> str:
        lengths = []
        if self.steps:
            lengths.append(quantity(self.steps, self.step_name))
        if self.seconds:
            lengths.append(f"{duration(self.seconds)} of training time")
        phrase = " or ".join(lengths)
        if len(lengths) == 2:
            phrase += ", whichever ends first"
        if self.least_steps:
            phrase += f", but at least {quantity(self.least_steps, self.step_name)}"
        return phrase

    def predict(self, step_seconds: float) -> tuple[int, str]:
        steps = max(1, round(self.seconds_left(0, 0.0, step_seconds) / step_seconds))
        return steps, duration(steps * step_seconds)

    def seconds_left(self, step: int, elapsed: float, step_seconds: float) -> float:
        left = []
        if self.steps:
            left.append((self.steps - step) * step_seconds)
        if self.seconds:
            left.append(max(self.seconds - elapsed, (self.least_steps - step) * step_seconds))
        return min(left)

    def cost_relative_to_full(self) -> str:
        full = dataclasses.replace(self, trainable=all_trainable(self.cfg), base="float", blocks=())
        flops = self.step_flops / full.step_flops
        memory = self.memory.total / full.memory.total
        return f"FLOPs {flops:.0%}, memory {memory:.0%}, time {flops:.0%} of a step in which everything is trained"


def run_fraction(parts: int, steps: int | None, seconds: float | None) -> int | float:
    """Returns 1 / `parts` of a run: seconds (float) if it has any, else steps (int)."""
    if seconds:
        return seconds / parts
    return max(1, (steps or parts) // parts)
