"""The paths of the parameters that train: all, those above or below frozen blocks, the head, or LoRA pairs."""

import dataclasses

from engine.counting.params import leaf_shapes
from engine.errors import UserError
from engine.model.config import LoraConfig, ModelConfig


@dataclasses.dataclass(frozen=True)
class TrainablePaths:
    """What learns: `weights` are paths of leaves that change, `adapted` those of targets with a LoRA pair of `rank`.

    A target is a part of a matrix, such as `blocks/3/q`: the columns of `blocks/3/qkv` that make the queries.
    """

    weights: frozenset[str]
    adapted: frozenset[str] = frozenset()
    rank: int = 0


NONE_TRAINABLE = TrainablePaths(frozenset())


def all_trainable(cfg: ModelConfig) -> TrainablePaths:
    """Pre-training and full fine-tuning."""
    return TrainablePaths(frozenset(leaf_shapes(cfg)))


def bottom_frozen(cfg: ModelConfig, blocks: int) -> TrainablePaths:
    """The embedding and the lowest `blocks` blocks stay; all above learns. With 0, nothing is frozen.

    A tied table belongs to the bottom, so it stays as well. Raises UserError when there are not so many blocks.
    """
    return _all_but(cfg, blocks, ("embed",), range(blocks))


def top_frozen(cfg: ModelConfig, blocks: int) -> TrainablePaths:
    """The highest `blocks` blocks, the last norm and the head stay; all below learns. With 0, nothing is frozen.

    A tied table belongs to the bottom, so it learns. Raises UserError when there are not so many blocks.
    """
    return _all_but(cfg, blocks, ("norm", "head"), range(cfg.layers - blocks, cfg.layers))


def _all_but(cfg: ModelConfig, blocks: int, ends: tuple[str, ...], layers: range) -> TrainablePaths:
    if not 0 <= blocks <= cfg.layers:
        raise UserError(f"Cannot freeze {blocks} blocks: the model has {cfg.layers}; give a number from 0 to that.")
    frozen = (*ends, *(f"blocks/{layer}/" for layer in layers)) if blocks else ()
    return TrainablePaths(frozenset(path for path in leaf_shapes(cfg) if not path.startswith(frozen)))


def head_only(cfg: ModelConfig) -> TrainablePaths:
    """Only the unembedding learns. In a tied model that table also feeds the bottom, so the saving is only in dW."""
    return TrainablePaths(frozenset({"embed" if cfg.tied else "head"}))


def lora_only(cfg: ModelConfig, adapter: LoraConfig) -> TrainablePaths:
    """A LoRA pair on the targets of every block; nothing else learns (Hu et al., 2106.09685)."""
    paths = frozenset(f"blocks/{layer}/{name}" for layer in range(cfg.layers) for name in adapter.adapted)
    return TrainablePaths(frozenset(), paths, adapter.rank)


def target_shapes(cfg: ModelConfig) -> dict[str, tuple[int, int]]:
    """Path -> (rows, columns) of everything that LoRA can go on."""
    leaves = leaf_shapes(cfg)
    return {
        f"blocks/{layer}/{target}": (leaves[f"blocks/{layer}/{matrix}"][0], stop - start)
        for layer in range(cfg.layers)
        for matrix, parts in cfg.parts.items()
        for target, (start, stop) in parts.items()
    }


def lowest_gradient(cfg: ModelConfig, trainable: TrainablePaths) -> int:
    """The lowest block that the backward pass enters: those below keep nothing for it. L when it enters none."""
    paths = trainable.weights | trainable.adapted
    if "embed" in paths:
        return 0
    return min((int(path.split("/")[1]) for path in paths if path.startswith("blocks/")), default=cfg.layers)
