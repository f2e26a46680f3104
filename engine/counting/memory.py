"""Memory by formula: peak bytes of a training step and of a served model, and the bytes that a step moves.

Weights, gradients, optimizer state and the KV cache are exact. Residuals are an estimate, for the
compiler decides which values to keep: the terms follow XLA on a CPU, with elementwise work in
float32 and products in `cfg.dtype` (compare with `xla_peak` of the compiled step). A scan over the
layers keeps a third less.

The traffic, the numerator of MBU, is what must be read and written: every product reads its weights
once; a block's values are written and read once going forward, and read once going back where they
were kept. Copies, masks and what does not fit a fused loop are left out.
"""

import dataclasses
import math
from collections.abc import Collection
from typing import Literal, NamedTuple

from engine.counting.flops import add_layers, flops_by_layer, twice_mean_keys
from engine.model.attention import has_fused_attention
from engine.model.attention_in_blocks import QUERY_BLOCK
from engine.model.chunked_loss import COLUMNS
from engine.model.config import JOINED, MATRICES, ModelConfig
from engine.model.shapes import leaf_shapes, target_shapes
from engine.model.trainable import TrainablePaths, all_trainable, lowest_gradient

FLOAT32 = 4


@dataclasses.dataclass(frozen=True)
class TrainingMemory:
    """Bytes of a training step by component."""

    params: int  # float32 where they train; frozen matrices in the compute type or int8
    optimizer: int
    copies: int  # in the compute type: of trainable matrices, and of what is copied of a frozen head
    gradients: int  # float32
    residuals: int  # every block's values, or with remat every block's input
    # residuals of one block: the last to be freed, and with remat the most that exist at once
    block: int
    logits: int  # and their gradient, of one chunk
    remat: bool  # of each block
    accumulated: int  # gradients summed over microbatches; 0 with one

    @property
    def trainable_weights(self) -> int:
        """What trains, a part of `params`: as many bytes as its gradients, for both are float32."""
        return self.gradients

    @property
    def gradient_peak(self) -> int:
        """The peak of forward and backward beside weights and optimizer.

        Residuals shrink through the backward pass while gradients grow, so the peak is at one of
        its ends.
        """
        recomputed = 0  # residuals of the block that the backward pass begins with
        if self.remat:
            recomputed = self.block
        at_start = self.residuals + max(self.logits, recomputed)
        at_end = self.gradients + self.block
        return self.copies + self.accumulated + max(at_start, at_end)

    @property
    def update_peak(self) -> int:
        """The update's peak beside weights and optimizer: gradients, updates, and the next
        optimizer state.
        """
        return 2 * self.gradients + self.optimizer

    @property
    def total(self) -> int:
        return self.params + self.optimizer + max(self.gradient_peak, self.update_peak)

    @property
    def saved(self) -> int:
        """A checkpoint's bytes."""
        return self.trainable_weights + self.optimizer


class InferenceMemory(NamedTuple):
    """Bytes of a served model by component, all held at once."""

    params: int
    cache: int
    activations: int  # one block's values
    logits: int

    @property
    def total(self) -> int:
        return sum(self)


def training_memory(
    cfg: ModelConfig,
    batch: int,
    tokens: int,
    *,
    optimizer: Literal["adamw", "muon"] = "adamw",
    trainable: TrainablePaths | None = None,
    loss_chunks: int = 1,
    microbatches: int = 1,
    base: Literal["float", "int8"] = "float",
) -> TrainingMemory:
    """Predicts the bytes of a step on `batch` sequences (of each microbatch) of `tokens`, with the
    CPU's attention.

    The logits are computed in `loss_chunks` parts. `base`: the type of frozen matrices that
    multiply.
    """
    if trainable is None:
        trainable = all_trainable(cfg)
    shapes = leaf_shapes(cfg)
    targets = target_shapes(cfg)
    sizes = {path: math.prod(shape) for path, shape in shapes.items()}
    matrices = [path for path in trainable.weights if len(shapes[path]) == 2]
    adapters = sum(trainable.rank * sum(targets[path]) for path in trainable.adapted)
    numbers = sum(sizes[path] for path in trainable.weights) + adapters
    by_muon = sum(sizes[path] for path in matrices if path.startswith("blocks/"))
    rows = batch * tokens
    lowest = lowest_gradient(cfg, trainable)
    paths = trainable.weights | trainable.adapted
    blocks = [
        rows * _residual_bytes(cfg, tokens, f"blocks/{layer}/", paths) for layer in range(lowest, cfg.layers)
    ]
    remat = cfg.remat == "block"
    residuals = sum(blocks)
    if remat:
        residuals = len(blocks) * rows * FLOAT32 * cfg.width
    copies = dtype_bytes(cfg) * _copied_numbers(cfg, trainable, base == "int8")
    if base == "int8":
        copies += _widened_bytes(cfg)
    moments = 2 * numbers  # AdamW's
    if optimizer == "muon":
        moments -= by_muon  # on the matrices of the blocks Muon holds one; adapters are left to AdamW
    accumulated = 0
    if microbatches > 1:
        accumulated = FLOAT32 * numbers
    return TrainingMemory(
        params=_param_bytes(cfg, base == "int8", trainable.weights) + FLOAT32 * adapters,
        optimizer=FLOAT32 * moments,
        copies=copies,
        gradients=FLOAT32 * numbers,
        residuals=residuals,
        block=max(blocks, default=0),
        logits=round(rows * cfg.vocab * (dtype_bytes(cfg) + FLOAT32) / loss_chunks),
        remat=remat,
        accumulated=accumulated,
    )


def _copied_numbers(cfg: ModelConfig, trainable: TrainablePaths, int8: bool) -> int:
    """Returns how many numbers are copied into the compute type, none where that is float32: the
    trainable matrices that multiply, and a tied head that is frozen, which is transposed.
    """
    if dtype_bytes(cfg) == FLOAT32:
        return 0
    numbers = 0
    for path, shape in leaf_shapes(cfg).items():
        if path in trainable.weights and len(shape) == 2 and (cfg.tied or path != "embed"):
            numbers += math.prod(shape)
    if cfg.tied and "embed" not in trainable.weights and not int8:
        numbers += cfg.vocab * cfg.width
    return numbers


def _widened_bytes(cfg: ModelConfig) -> int:
    """Returns the bytes of the columns of an int8 head that are widened at once, in both types."""
    return (1 + dtype_bytes(cfg)) * min(COLUMNS, cfg.vocab) * cfg.width


def _param_bytes(cfg: ModelConfig, int8: bool, trainable: Collection[str] = ()) -> int:
    """Returns the bytes of all weights: float32 where they train and of vectors, else int8 with its
    scales, or the compute type.
    """
    total = 0
    for path, shape in leaf_shapes(cfg).items():
        if path in trainable or len(shape) == 1:
            total += FLOAT32 * math.prod(shape)
        elif int8 and (cfg.tied or path != "embed"):
            columns = shape[0] if path == "embed" else shape[1]
            total += math.prod(shape) + FLOAT32 * columns
        else:
            total += dtype_bytes(cfg) * math.prod(shape)
    return total


def _residual_bytes(cfg: ModelConfig, tokens: int, prefix: str, trainable: Collection[str]) -> int:
    """Returns the residuals of the block at `prefix` for each token of a sequence of `tokens`.

    A value that only a weight's gradient reads is kept only where that weight is among the paths
    `trainable`.
    """

    def trains(name: str) -> bool:
        return prefix + name in trainable

    query = cfg.heads * cfg.head_dim
    key = cfg.kv_heads * cfg.head_dim
    # results of both norms
    operands = cfg.width * sum(any(map(trains, read)) for read in JOINED.values())
    operands += query + 2 * key  # q, k, v
    operands += 3 * query  # rotated, k and v once for each query head
    operands += query + 2 * cfg.ff  # attention's result; gate and up
    operands += cfg.ff * trains("down")
    if not has_fused_attention(cfg, tokens):  # which keeps none
        operands += cfg.heads * twice_mean_keys(tokens, QUERY_BLOCK) // 2  # attention's weights
    elementwise = 2 * cfg.width  # the residual stream at both norms
    if cfg.qk_norm:  # input and result
        elementwise += query + key
        operands += query + key
    return operands * dtype_bytes(cfg) + elementwise * FLOAT32


def inference_memory(
    cfg: ModelConfig,
    slots: int,
    length: int,
    *,
    tokens: int = 1,
    int8: bool = False,
    every_logit: bool = False,
) -> InferenceMemory:
    """Predicts the bytes of a call on `tokens` of each of `slots` requests, with a KV cache of
    `length` places (0: none).

    `int8`: the type of matrices. `every_logit`: logits at each token, not only at a call's last.
    """
    width = dtype_bytes(cfg)
    rows = slots * tokens
    # Attention's values and the MLP's take turns; scores are held in float32 and as weights in the
    # compute type.
    attending = cfg.qkv_width * width + cfg.heads * max(length, tokens) * (FLOAT32 + width)
    block = 2 * cfg.width * FLOAT32 + max(attending, 3 * cfg.ff * width)
    logit_rows = slots
    if every_logit:
        logit_rows = rows
    return InferenceMemory(
        params=_param_bytes(cfg, int8),
        cache=2 * cfg.layers * slots * cfg.kv_heads * length * cfg.head_dim * width,
        activations=rows * block,
        logits=FLOAT32 * cfg.vocab * logit_rows,
    )


def dtype_bytes(cfg: ModelConfig) -> int:
    if cfg.dtype == "bfloat16":
        return 2
    return FLOAT32


class Traffic(NamedTuple):
    """Bytes moved by one step or call, by component."""

    weights: int  # and in training their conversion to the compute type
    activations: int
    logits: int
    cache: int = 0
    gradients: int = 0
    optimizer: int = 0

    @property
    def total(self) -> int:
        return sum(self)


def train_bytes(
    cfg: ModelConfig, batch: int, tokens: int, *, trainable: TrainablePaths | None = None
) -> Traffic:
    """Predicts the bytes moved by **a step** of AdamW on `batch` sequences of `tokens`; by default
    everything trains.

    AdamW reads gradient, weight and two moments and writes the last three, in float32: 28 bytes a
    trainable parameter. Weights are read once forward, and above the lowest trainable parameter
    once for dX and once for remat.
    """
    memory = training_memory(cfg, batch, tokens, trainable=trainable)
    width = dtype_bytes(cfg)
    # trainable matrices, read in one type and written in the other
    copied_numbers = _copied_numbers(cfg, trainable or all_trainable(cfg), int8=False)
    converted_bytes = copied_numbers * (FLOAT32 + width)
    block = training_memory(cfg, batch, tokens).block
    blocks_backward = cfg.layers
    if trainable:
        blocks_backward -= lowest_gradient(cfg, trainable)
    blocks_forward = cfg.layers
    if cfg.remat == "block":
        blocks_forward += blocks_backward
    return Traffic(
        weights=width * _weights_read(cfg, trainable) + converted_bytes,
        activations=block * (2 * blocks_forward + blocks_backward),
        logits=2 * memory.logits,
        gradients=memory.gradients,
        optimizer=memory.gradients + 2 * (memory.trainable_weights + memory.optimizer),
    )


def _weights_read(cfg: ModelConfig, trainable: TrainablePaths | None) -> int:
    """Returns how many weights the products of a training step read; one that is read twice counts
    twice. In a product with one row a weight costs a multiply and an add: 2 operations.
    """
    unrolled = dataclasses.replace(cfg, scan=False)
    parts = add_layers(flops_by_layer(unrolled, 1, attention="full", trainable=trainable)).parts
    operations = 0
    for name in (*MATRICES, "head", "lora"):
        part = parts[name]
        operations += part.forward + part.recompute + part.dx
    return operations // 2


def inference_bytes(
    cfg: ModelConfig,
    slots: int,
    length: int,
    *,
    tokens: int = 1,
    int8: bool = False,
    every_logit: bool = False,
) -> Traffic:
    """Predicts the bytes moved by **a call** on `tokens` of each of `slots` requests, which share
    one reading of the weights.

    Arguments as of `inference_memory`: a decoding step has one token, and evaluation no cache but
    every logit.
    """
    memory = inference_memory(cfg, slots, length, tokens=tokens, int8=int8, every_logit=every_logit)
    width = dtype_bytes(cfg)
    unread_bytes = 0  # rows of a lookup table, which is never int8
    if not cfg.tied:
        unread_bytes = max(0, cfg.vocab - slots * tokens) * cfg.width * width
    written_bytes = 0  # keys and values
    if length:
        written_bytes = 2 * cfg.layers * cfg.kv_heads * cfg.head_dim * width * slots * tokens
    return Traffic(
        weights=memory.params - unread_bytes,
        activations=2 * cfg.layers * memory.activations,
        logits=2 * memory.logits,
        cache=memory.cache + written_bytes,
    )
