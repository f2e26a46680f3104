"""The paths of the parameters that train: all, all but frozen blocks, the head, or LoRA pairs."""

import dataclasses

from engine.counting.params import leaf_shapes
from engine.errors import UserError
from engine.model.config import LoraConfig, ModelConfig


@dataclasses.dataclass(frozen=True)
class TrainablePaths:
    """The paths of the leaves that train (`weights`), and of the matrices that get a LoRA pair of `rank` (`adapted`)."""

    weights: frozenset[str]
    adapted: frozenset[str] = frozenset()
    rank: int = 0


NONE_TRAINABLE = TrainablePaths(frozenset())


def all_trainable(cfg: ModelConfig) -> TrainablePaths:
    """Returns every leaf: pre-training and full fine-tuning."""
    return TrainablePaths(frozenset(leaf_shapes(cfg)))


def bottom_frozen(cfg: ModelConfig, blocks: int) -> TrainablePaths:
    """Returns all but the embedding (a tied one too) and the lowest `blocks` blocks, all with 0. Raises UserError beyond L."""
    return _all_but(cfg, blocks, ("embed",), range(blocks))


def top_frozen(cfg: ModelConfig, blocks: int) -> TrainablePaths:
    """Returns all but the highest `blocks` blocks, last norm and untied head, all with 0. Raises UserError beyond L."""
    return _all_but(cfg, blocks, ("norm", "head"), range(cfg.layers - blocks, cfg.layers))


def _all_but(cfg: ModelConfig, blocks: int, ends: tuple[str, ...], layers: range) -> TrainablePaths:
    if not 0 <= blocks <= cfg.layers:
        raise UserError(f"Cannot freeze {blocks} blocks: the model has {cfg.layers}; give a number from 0 to that.")
    frozen = (*ends, *(f"blocks/{layer}/" for layer in layers)) if blocks else ()
    return TrainablePaths(frozenset(path for path in leaf_shapes(cfg) if not path.startswith(frozen)))


def head_only(cfg: ModelConfig) -> TrainablePaths:
    """Returns the unembedding. A tied table also feeds the lowest block, so training it saves only dW."""
    return TrainablePaths(frozenset({"embed" if cfg.tied else "head"}))


def lora_only(cfg: ModelConfig, adapter: LoraConfig) -> TrainablePaths:
    """Returns a LoRA pair on each target of every block (Hu et al., 2106.09685)."""
    paths = frozenset(f"blocks/{layer}/{name}" for layer in range(cfg.layers) for name in adapter.adapted_matrices)
    return TrainablePaths(frozenset(), paths, adapter.rank)


def target_shapes(cfg: ModelConfig) -> dict[str, tuple[int, int]]:
    """Returns path -> (rows, columns) of every matrix that a LoRA pair can adapt."""
    return {f"blocks/{layer}/{name}": shape for layer in range(cfg.layers) for name, shape in cfg.matrices.items()}


def lowest_gradient(cfg: ModelConfig, trainable: TrainablePaths) -> int:
    """Returns the lowest block that the backward pass enters, or L; blocks below keep no residuals."""
    paths = trainable.weights | trainable.adapted
    if "embed" in paths:
        return 0
    return min((int(path.split("/")[1]) for path in paths if path.startswith("blocks/")), default=cfg.layers)
