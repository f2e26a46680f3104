"""Bytes by formula, before anything is allocated: what a training step and a served model will hold at their fullest.

Weights, gradients, optimizer state and the key/value cache are exact. What the forward pass keeps for the backward pass
is an estimate: a compiler decides which intermediate values to keep and which to compute twice. The terms below follow
what XLA keeps on a CPU for layers whose elementwise work is float32 and whose products are in `cfg.dtype`; compare with
temp + argument + output - alias of the compiled step's `memory_analysis()`. A scan over the layers keeps a third less.
Input tokens are too few to count.
"""

import dataclasses
import math
from typing import Literal

from engine.counting.flops import twice_mean_keys
from engine.counting.params import leaf_shapes
from engine.counting.trainable_paths import TrainablePaths, all_trainable, lowest_gradient, target_shapes
from engine.model.backward import QUERY_BLOCK
from engine.model.chunked_cross_entropy import COLUMNS
from engine.model.config import ModelConfig

_FLOAT32 = 4


@dataclasses.dataclass(frozen=True)
class TrainingMemory:
    """Bytes of a training step, by what they hold."""

    params: int  # float32 where they learn; frozen matrices in the compute type or in int8, as fine-tuning keeps them
    optimizer: int
    copies: int  # in the compute type, for as long as the step runs: of what learns, or has LoRA folded in once for all
    gradients: int  # float32, of what learns
    residuals: int  # by the forward pass for the backward pass: every block's values, or with remat every block's input
    block: int  # one block's values: the last to be dropped, and with remat the most that exists at once
    logits: int  # and their gradient, for the chunk in hand
    remat: bool  # of each block: its values are made again from its input
    accumulated: int  # sums of gradients over microbatches; 0 with one

    @property
    def passes(self) -> int:
        """The most that forward and backward hold beside weights and optimizer. What is kept shrinks through the
        backward pass while gradients grow, so the most is at one of its ends."""
        start = self.residuals + max(self.logits, self.block if self.remat else 0)
        return self.copies + self.accumulated + max(start, self.gradients + self.block)

    @property
    def update(self) -> int:
        """What the update holds beside weights and optimizer: gradients, updates, and the optimizer's next state, for
        the old one may be put back until the step has proved finite."""
        return 2 * self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """The peak."""
        return self.params + self.optimizer + max(self.passes, self.update)


@dataclasses.dataclass(frozen=True)
class InferenceMemory:
    """Bytes of a served model, by what they hold."""

    params: int
    cache: int
    working: int  # one block's values for the tokens of one call
    logits: int

    @property
    def total(self) -> int:
        """The peak: all of it at once."""
        return self.params + self.cache + self.working + self.logits


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
    """Predicted bytes of a step on `batch` sequences of `tokens` at a time, with the attention that the CPU's layers do.

    With `microbatches` above 1, `batch` is the size of one of them. `loss_chunks` says in how many pieces the logits are
    made. `base` is what frozen matrices that multiply are kept in: `int8` has a byte a number and a float32 scale a column.
    """
    trainable = all_trainable(cfg) if trainable is None else trainable
    shapes, targets = leaf_shapes(cfg), target_shapes(cfg)
    sizes = {path: math.prod(shape) for path, shape in shapes.items()}
    matrix = [path for path, shape in shapes.items() if len(shape) == 2]
    multiplies = [path for path in matrix if cfg.tied or path != "embed"]
    frozen = [path for path in matrix if path not in trainable.weights]
    adapters = sum(trainable.rank * sum(targets[path]) for path in trainable.adapted)
    learning = sum(sizes[path] for path in trainable.weights) + adapters
    by_muon = adapters + sum(sizes[path] for path in trainable.weights if path.startswith("blocks/") and path in matrix)
    width, rows = dtype_bytes(cfg), batch * tokens
    saved = sum(sizes[path] * (_FLOAT32 - width) for path in frozen)
    products = sum(sizes[path] for path in multiplies if path in trainable.weights)
    wide = 0
    if base == "int8":
        columns = lambda path: shapes[path][0 if path == "embed" else 1]
        saved += sum(sizes[path] * (width - 1) - _FLOAT32 * columns(path) for path in frozen if path in multiplies)
        wide = (1 + width) * min(COLUMNS, cfg.vocab) * cfg.width  # the head's columns as they multiply
    elif microbatches > 1:
        # LoRA is merged once for all of them (else when its turn comes, and again going back), into the matrices where
        # that is smaller than `rows` of what goes in and comes out (see `model/weights/lora_matmul.py`).
        adapted = TrainablePaths(frozenset(), trainable.adapted)
        paths = [f"blocks/{layer}/{name}" for layer in range(cfg.layers) for name in _learning(cfg, adapted, layer)]
        products += sum(sizes[path] for path in paths if rows * sum(shapes[path]) > sizes[path])
    lowest = lowest_gradient(cfg, trainable)
    blocks = [rows * _kept_per_token(cfg, tokens, _learning(cfg, trainable, i)) for i in range(lowest, cfg.layers)]
    remat = cfg.remat == "block"
    return TrainingMemory(
        params=_FLOAT32 * (sum(sizes.values()) + adapters) - saved,
        # AdamW holds two moments a number; Muon one, on the matrices of the blocks, with AdamW on all else.
        optimizer=_FLOAT32 * (2 * learning - (by_muon if optimizer == "muon" else 0)),
        copies=(0 if width == _FLOAT32 else width * products) + wide,
        gradients=_FLOAT32 * learning,
        residuals=len(blocks) * rows * _FLOAT32 * cfg.width if remat else sum(blocks),
        block=max(blocks, default=0),
        logits=round(rows * cfg.vocab * (width + _FLOAT32) / loss_chunks),
        remat=remat,
        accumulated=_FLOAT32 * learning if microbatches > 1 else 0,
    )


def _learning(cfg: ModelConfig, trainable: TrainablePaths, layer: int) -> set[str]:
    """The leaves of one block that learn, those with an adapter among them."""
    prefix = f"blocks/{layer}/"
    adapted = {name for name, parts in cfg.parts.items() if any(prefix + part in trainable.adapted for part in parts)}
    return adapted | {path.removeprefix(prefix) for path in trainable.weights if path.startswith(prefix)}


def _kept_per_token(cfg: ModelConfig, tokens: int, learning: set[str]) -> int:
    """Bytes one block keeps for each token of a sequence of `tokens`, when those of its leaves learn.

    What is read only by the gradient of a weight is kept only where that weight learns.
    """
    query, key = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
    operands = cfg.width * len(learning & {"qkv", "gate_up"})  # both norms' results
    operands += query + 2 * key  # q, k, v as the product gives them
    operands += 3 * query  # rotated, k and v once for each query head
    operands += query + 2 * cfg.ff  # attention's result; gate and up
    operands += cfg.ff if "down" in learning else 0
    operands += cfg.heads * twice_mean_keys(tokens, QUERY_BLOCK) // 2  # attention's weights: N numbers for each key met
    elementwise = 2 * cfg.width  # the residual stream at both norms
    if cfg.qk_norm:  # the norm's input, and its result
        elementwise += query + key
        operands += query + key
    return operands * dtype_bytes(cfg) + elementwise * _FLOAT32


def inference_memory(
    cfg: ModelConfig, slots: int, length: int, *, tokens: int = 1, int8: bool = False, every_logit: bool = False
) -> InferenceMemory:
    """Predicted bytes of `slots` requests with a cache of `length` places each, `tokens` of them a call.

    Without a cache, as in evaluation, `length` is 0. Matrices are stored in `cfg.dtype`, or in int8 with a float32 scale a
    column, all but an untied lookup table. `every_logit` says that logits are wanted at each token, not only at the last
    of a call.
    """
    width = dtype_bytes(cfg)
    params = 0
    for path, shape in leaf_shapes(cfg).items():
        if len(shape) == 1:
            params += _FLOAT32 * shape[0]
        elif int8 and (cfg.tied or path != "embed"):
            params += math.prod(shape) + _FLOAT32 * (cfg.vocab if path == "embed" else shape[1])
        else:
            params += width * math.prod(shape)
    rows = slots * tokens
    # Attention's values and the MLP's take turns; scores exist in float32 and as weights.
    attending = cfg.qkv_width * width + cfg.heads * max(length, tokens) * (_FLOAT32 + width)
    block = 2 * cfg.width * _FLOAT32 + max(attending, 3 * cfg.ff * width)
    return InferenceMemory(
        params=params,
        cache=2 * cfg.layers * slots * cfg.kv_heads * length * cfg.head_dim * width,
        working=rows * block,
        logits=_FLOAT32 * cfg.vocab * (rows if every_logit else slots),
    )


def dtype_bytes(cfg: ModelConfig) -> int:
    """Of one number in the type that products are computed in."""
    return 2 if cfg.dtype == "bfloat16" else _FLOAT32
