"""StepPlan: predicts a training step's operations, its memory on a device of a mesh, its seconds there."""

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Literal

from engine.counting.accelerators import Accelerator
from engine.counting.flops import train_flops
from engine.counting.memory import FLOAT32, TrainingMemory, dtype_bytes, train_bytes, training_memory
from engine.counting.params import count_params
from engine.counting.xla import Collective
from engine.mesh.shape import ONE_DEVICE, MeshShape
from engine.model.config import ModelConfig
from engine.model.loss import loss_chunks
from engine.model.trainable import TrainablePaths
from engine.training.optimizer import Kind, optimizer_flops

EFFICIENCY = 0.5  # of an accelerator's peak, by products; whole published runs reach 0.2 to 0.6


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """A training step that has not run."""

    cfg: ModelConfig
    batch: int  # rows
    context: int  # tokens a row
    optimizer: Kind = "adamw"
    microbatches: int = 1  # parts that the batch is read in
    mesh: MeshShape = ONE_DEVICE  # the devices that share it
    trainable: TrainablePaths | None = None  # the parameters that train, None for all
    base: Literal["float", "int8"] = "float"  # the type of the frozen matrices under an adapter
    # paths of matrices in blocks, of which two numbers in 32 weights train
    blocks: Collection[str] = ()

    @property
    def tokens(self) -> int:
        return self.batch * self.context

    @property
    def flops(self) -> int:
        """FLOPs of the model: 6N + 12LDT a token, less the products for gradients that no trainable
        parameter needs.
        """
        flops = train_flops(self.cfg, self.context, attention="full", trainable=self.trainable)
        return flops.total * self.tokens

    @property
    def update_flops(self) -> int:
        """FLOPs of the optimizer's products."""
        return optimizer_flops(self.cfg, self.optimizer)

    @property
    def memory(self) -> TrainingMemory:
        """Bytes on one device: of its rows, its share of the weights, its heads and columns.

        Matrices in `blocks` count about as a LoRA pair of rank width / 32.
        """
        cfg = _config_of_a_device(self.cfg, self.mesh)
        memory = training_memory(
            cfg,
            self._rows,
            self.context,
            optimizer=self.optimizer,
            trainable=self._trainable_as_pairs,
            loss_chunks=loss_chunks(cfg, self._rows * self.context, self._head_trains),
            microbatches=self.microbatches,
            base=self.base,
        )
        if self.trainable is not None:
            loaded_bytes = _bytes_as_loaded(cfg, self.trainable, memory)
            memory = dataclasses.replace(memory, params=memory.params + loaded_bytes)
        return _cut_by_fsdp(memory, self.cfg, self.mesh)

    @property
    def _trainable_as_pairs(self) -> TrainablePaths | None:
        """The parameters that train, with those in `blocks` as LoRA pairs of rank width / 32."""
        if not self.trainable or not self.blocks:
            return self.trainable
        in_blocks = self.trainable.weights.intersection(self.blocks)
        return TrainablePaths(
            weights=self.trainable.weights - in_blocks,
            adapted=in_blocks - {"embed", "head"},
            rank=self.cfg.width // 32,
        )

    @property
    def answering_bytes(self) -> int:
        """Bytes to answer questions between two steps: of the state, and of the weights as served."""
        memory = self.memory
        served = dtype_bytes(self.cfg) * count_params(self.cfg).total  # an adapter is merged for it
        return memory.params + memory.optimizer + served

    def seconds_on(self, device: Accelerator, collectives: Sequence[Collective]) -> dict[str, float]:
        """Predicts the seconds of a device's products (remat's and Muon's too), memory traffic, and
        collectives.

        `collectives`: of the compiled step.
        """
        flops = self.flops / self.mesh.devices
        # Muon's products are on whole matrices, dealt out: these are of a device that has the most.
        layers = self.cfg.layers
        flops += self.update_flops / layers * math.ceil(layers / self.mesh.devices)
        traffic = train_bytes(self.cfg, self._rows, self.context)
        of_one_pass = traffic.weights + traffic.activations + traffic.logits
        passes = self.microbatches * of_one_pass / self.mesh.tensor
        update = (traffic.gradients + traffic.optimizer) / (self.mesh.fsdp * self.mesh.tensor)
        return {
            "products": flops / (1e12 * EFFICIENCY * device.bf16_tflops),
            "memory": (passes + update) / (1e9 * device.memory_gbs),
            "collectives": sum(map(device.send_seconds, collectives)),
        }

    @property
    def _rows(self) -> int:
        """Rows of a device at once."""
        return self.batch // self.microbatches // self.mesh.row_shards

    @property
    def _head_trains(self) -> bool:
        return self.trainable is None or self.cfg.head_path in self.trainable.weights


def _config_of_a_device(cfg: ModelConfig, mesh: MeshShape) -> ModelConfig:
    """Returns the config of the share of a model that `tensor` leaves to each device: of its heads, and
    of the columns of its MLP and its vocabulary.
    """
    cut_by_tensor = ("vocab", "heads", "kv_heads", "ff")
    own_share = {name: getattr(cfg, name) // mesh.tensor for name in cut_by_tensor}
    return dataclasses.replace(cfg, **own_share)


def _bytes_as_loaded(cfg: ModelConfig, trainable: TrainablePaths, memory: TrainingMemory) -> int:
    """Returns the bytes, beside those of the step, of a model in float32 as it was before the training
    of some of its parameters: the report at the end compares with it.
    """
    # With a LoRA only the pairs are counted again. Else in float32 the step reads the frozen matrices as
    # they were loaded, so that only what trains is there twice; of blocks that is what a step unpacks.
    # Of each there are as many numbers as gradients.
    if trainable.adapted or dtype_bytes(cfg) == FLOAT32:
        return memory.gradients
    return FLOAT32 * count_params(cfg).total


def _cut_by_fsdp(memory: TrainingMemory, cfg: ModelConfig, mesh: MeshShape) -> TrainingMemory:
    """Returns the memory of one device: `fsdp` cuts what is kept for each parameter, but not the head
    of `cfg`, the whole model's.
    """
    cut_by_fsdp = ("params", "optimizer", "copies", "gradients", "accumulated")
    shares = {name: getattr(memory, name) // mesh.fsdp for name in cut_by_fsdp}
    if mesh.fsdp * mesh.tensor > 1:  # the whole head, gathered in float32, and its copy
        shares["copies"] += (FLOAT32 + dtype_bytes(cfg)) * cfg.width * cfg.vocab
    return dataclasses.replace(memory, **shares)
