"""Counts the parameters of a model: all, those that multiply each token, and those that train."""

import dataclasses
import math
from typing import NamedTuple

from engine.model.config import ModelConfig
from engine.model.shapes import leaf_shapes, target_shapes
from engine.model.trainable import TrainablePaths


class ParamCount(NamedTuple):
    """Parameters of a model: all, and those that multiply each token."""

    total: int
    # the N of "6 N": block matrices and the unembedding, which is the table of a tied model
    matmul: int


def count_params(cfg: ModelConfig) -> ParamCount:
    """Counts parameters, in a time that does not depend on the layers that a config claims."""
    count = ParamCount(0, 0)
    for path, shape in leaf_shapes(dataclasses.replace(cfg, layers=1)).items():
        times = cfg.layers if path.startswith("blocks/") else 1
        size = times * math.prod(shape)
        multiplies = len(shape) == 2 and (cfg.tied or path != "embed")
        count = ParamCount(count.total + size, count.matmul + size * multiplies)
    return count


def count_trainable(cfg: ModelConfig, trainable: TrainablePaths) -> int:
    """Counts the parameters that train: of the weights, and of the LoRA pairs."""
    shapes = leaf_shapes(cfg)
    pairs = target_shapes(cfg)
    pair_sides = sum(sum(pairs[path]) for path in trainable.adapted)
    return sum(math.prod(shapes[path]) for path in trainable.weights) + trainable.rank * pair_sides
