"""TrainablePaths: which parameters of a model train, and which matrices get a LoRA pair."""

import dataclasses

from engine.model.config import LoraConfig, ModelConfig
from engine.model.shapes import leaf_shapes


@dataclasses.dataclass(frozen=True)
class TrainablePaths:
    """The paths of the leaves that train (`weights`), and of the matrices that get a LoRA pair of
    `rank` (`adapted`).
    """

    weights: frozenset[str]
    adapted: frozenset[str] = frozenset()
    rank: int = 0


NONE_TRAINABLE = TrainablePaths(frozenset())


def all_trainable(cfg: ModelConfig) -> TrainablePaths:
    """Returns the paths of a model in which every weight trains."""
    return TrainablePaths(frozenset(leaf_shapes(cfg)))


def lora_only(cfg: ModelConfig, adapter: LoraConfig) -> TrainablePaths:
    """Returns the paths of a model in which only the pairs of an adapter train."""
    paths = set()
    for layer in range(cfg.layers):
        for name in adapter.adapted_matrices:
            paths.add(f"blocks/{layer}/{name}")
    return TrainablePaths(frozenset(), frozenset(paths), adapter.rank)


def lowest_gradient(cfg: ModelConfig, trainable: TrainablePaths) -> int:
    """Returns the lowest block that the backward pass enters, or L; blocks below keep no residuals."""
    paths = trainable.weights | trainable.adapted
    if "embed" in paths:
        return 0
    blocks = [int(path.split("/")[1]) for path in paths if path.startswith("blocks/")]
    return min(blocks, default=cfg.layers)
