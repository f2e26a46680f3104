"""Splits a model's parameters by rules or LoRA into a trainable and a frozen tree, and merges them."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax

from engine.counting.params import count_params
from engine.counting.trainable_paths import TrainablePaths, lora_only
from engine.model.config import LoraConfig, ModelConfig
from engine.model.paths import merge, split
from engine.model.transformer import init_params
from engine.model.weights.int8 import matmul_rules, quantize
from engine.model.weights.lora import merge_lora
from engine.model.weights.matmul import cast_matrices
from engine.training.freeze import select_trainable
from engine.training.lora import init_lora


@dataclasses.dataclass(frozen=True)
class TrainableSplit:
    """A model's trainable and frozen tree. `paths`: the parameters that train; None: all of them, and `frozen` is empty.

    `frozen` is in the compute type or int8, as steps read it; `frozen_as_loaded` is the same as loaded, to be saved
    (None where only an adapter is saved).
    """

    trainable: Any = None
    frozen: Any = dataclasses.field(default_factory=dict)
    frozen_as_loaded: Any = None
    paths: TrainablePaths | None = None

    @property
    def is_adapter(self) -> bool:
        return bool(self.paths and self.paths.adapted)

    def to_saved(self, trainable: Any) -> Any:
        """Returns the params of a checkpoint: an adapter on its own, or the whole model."""
        return trainable if self.paths is None or self.is_adapter else merge(trainable, self.frozen_as_loaded)

    def from_saved(self, params: Any) -> Any:
        return params if self.paths is None or self.is_adapter else split(params, self.paths.weights)[0]

    def initial_params(self) -> Any:
        """Returns the model before training. An untrained adapter changes nothing, to the bit."""
        return self.frozen if self.is_adapter else merge(self.trainable, self.frozen)


def choose_trainable(
    cfg: ModelConfig, lora: LoraConfig | None, train: Sequence[str], freeze: Sequence[str]
) -> tuple[TrainablePaths, tuple[tuple[str, str], ...]]:
    """Returns the trainable paths, and rows with what each rule matched. Raises UserError for a rule that matches nothing."""
    total = count_params(cfg).total
    if lora:
        key = jax.random.key(0)
        # Shapes alone: memory has not been checked yet.
        shapes = jax.eval_shape(lambda key: init_lora(cfg, init_params(cfg, key), key, lora), key)
        count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
        return lora_only(cfg, lora), (
            ("LoRA", f"{', '.join(lora.adapted_parts)} of {cfg.layers} layers, rank {lora.rank}"),
            ("trainable", f"{count:,} new numbers beside {total:,} frozen ones ({count / total:.1%})"),
        )
    selection = select_trainable(cfg, [] if train == ("all",) else train, freeze)
    count = selection.trainable_count
    return selection.trainable_paths, (
        *((match.rule, f"{match.leaves} {'leaf' if match.leaves == 1 else 'leaves'}, {match.numbers:,} numbers")
          for match in selection.matches),
        ("trainable", f"{count:,} of {total:,} numbers ({count / total:.1%})"),
    )  # fmt: skip


def split_trainable(
    cfg: ModelConfig, params: Any, paths: TrainablePaths, lora: LoraConfig | None, base: Literal["float", "int8"], seed: int
) -> TrainableSplit:
    """Splits params: trainable ones in float32, frozen ones in the compute type or int8. Changes no array of `params`."""
    if not lora:
        trainable, as_loaded = split(merge_lora(params), paths.weights)
        frozen = cast_matrices(as_loaded, cfg.dtype)
        return TrainableSplit(cast_matrices(trainable, "float32"), frozen, as_loaded, paths)
    adapter = init_lora(cfg, params, jax.random.key(seed), lora)
    frozen = params if base == "float" else quantize(params, matmul_rules(params, "full"))
    return TrainableSplit(adapter, cast_matrices(frozen, cfg.dtype), None, paths)
