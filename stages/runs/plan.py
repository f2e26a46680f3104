"""RunPlan: what a run trains, how, and for how long; its FLOPs and its memory follow from that alone, by formula."""

import dataclasses
import math
from collections.abc import Collection
from typing import Any, Literal

from engine.counting.flops import train_flops
from engine.counting.memory import TrainingMemory, dtype_bytes, training_memory
from engine.counting.params import count_params
from engine.format import duration, quantity
from engine.mesh.shape import ONE_DEVICE, MeshShape, divisors
from engine.model.config import ModelConfig
from engine.model.loss import loss_chunks
from engine.model.trainable import TrainablePaths, all_trainable
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
        """Returns it with another batch and context, in parts of at most as many tokens (of each of `devices`) as before.

        One part stays one.
        """
        most = self.batch * self.context // self.accumulate
        parts = [1]
        if self.accumulate > 1:
            parts = [n for n in divisors(batch) if batch % (n * devices) == 0] or parts
        fitting = [n for n in parts if batch // (n * devices) * context <= most]
        accumulate = fitting[0] if fitting else parts[-1]
        return dataclasses.replace(self, batch=batch, context=context, accumulate=accumulate)


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
    blocks: Collection[str] = ()  # paths of matrices in blocks, of which two numbers in 32 weights train

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
        """The predicted memory of a step on one device."""
        return step_memory(self.cfg, self.recipe, self.mesh, self.trainable, self.base, self.blocks)

    @property
    def answering_bytes(self) -> int:
        """The predicted memory of answering questions between two steps: of the state, and of the weights as served."""
        memory = self.memory
        served = dtype_bytes(self.cfg) * count_params(self.cfg).total  # an adapter is merged for it
        return memory.params + memory.optimizer + served

    @property
    def compiler_options(self) -> dict[str, Any] | None:
        return LORA_COMPILER_OPTIONS if self.trainable and self.trainable.adapted else None

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


def step_memory(
    cfg: ModelConfig,
    recipe: Recipe,
    mesh: MeshShape,
    trainable: TrainablePaths | None,
    base: Literal["float", "int8"],
    blocks: Collection[str],
) -> TrainingMemory:
    """Predicts the memory of a step on one device: of its rows, its share of the weights, its heads and columns.

    Matrices in `blocks` count about as a LoRA pair of rank width / 32.
    """
    own = {name: getattr(cfg, name) // mesh.tensor for name in ("vocab", "heads", "kv_heads", "ff")}
    own_cfg = dataclasses.replace(cfg, **own)
    rows = recipe.batch // recipe.accumulate // mesh.row_shards
    counted = trainable
    if trainable and blocks:
        packed = trainable.weights.intersection(blocks)
        counted = TrainablePaths(trainable.weights - packed, packed - {"embed", "head"}, cfg.width // 32)
    memory = training_memory(
        own_cfg,
        rows,
        recipe.context,
        optimizer=recipe.optimizer.kind,
        trainable=counted,
        loss_chunks=loss_chunks(own_cfg, rows * recipe.context, _head_trains(cfg, trainable)),
        microbatches=recipe.accumulate,
        base=base,
    )
    # The model as loaded, in float32, which the report compares with; of a LoRA the pairs; of blocks what a step unpacks.
    if trainable is not None:
        is_shared = trainable.adapted or dtype_bytes(own_cfg) == 4
        loaded = memory.gradients if is_shared else 4 * count_params(own_cfg).total
        memory = dataclasses.replace(memory, params=memory.params + loaded)
    shares = {
        name: getattr(memory, name) // mesh.fsdp for name in ("params", "optimizer", "copies", "gradients", "accumulated")
    }
    if mesh.fsdp * mesh.tensor > 1:  # the whole head, gathered in float32, and its copy
        shares["copies"] += (4 + dtype_bytes(own_cfg)) * cfg.width * cfg.vocab
    return dataclasses.replace(memory, **shares)


def _head_trains(cfg: ModelConfig, trainable: TrainablePaths | None) -> bool:
    return trainable is None or cfg.head_path in trainable.weights


def run_fraction(parts: int, steps: int | None, seconds: float | None) -> int | float:
    """Returns 1 / `parts` of a run: seconds (float) if it has any, else steps (int)."""
    if seconds:
        return seconds / parts
    return max(1, (steps or parts) // parts)
