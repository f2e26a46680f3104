"""Parameter shapes and counts of a model, and the paths of those that train, from its config alone."""

import dataclasses
import math
from typing import NamedTuple

from engine.model.config import LoraConfig, ModelConfig


def leaf_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns path -> shape of every parameter, such as 'blocks/0/q', bottom first. A tied model has no `head`."""
    matrices = cfg.matrices
    block: dict[str, tuple[int, ...]] = {"attn_norm": (cfg.width,)}
    block |= {name: matrices[name] for name in "qkv"}
    if cfg.qkv_bias:
        block |= {f"{name}_bias": matrices[name][1:] for name in "qkv"}
    if cfg.qk_norm:
        block |= {"q_norm": (cfg.head_dim,), "k_norm": (cfg.head_dim,)}
    block |= {"out": matrices["out"], "mlp_norm": (cfg.width,)}
    block |= {name: matrices[name] for name in ("gate", "up", "down")}
    shapes: dict[str, tuple[int, ...]] = {"embed": (cfg.vocab, cfg.width)}
    shapes |= {f"blocks/{layer}/{name}": shape for layer in range(cfg.layers) for name, shape in block.items()}
    shapes["norm"] = (cfg.width,)
    if not cfg.tied:
        shapes["head"] = (cfg.width, cfg.vocab)
    return shapes


class ParamCount(NamedTuple):
    """Parameters of a model: all, and those that multiply each token."""

    total: int
    matmul: int  # the N of "6 N": block matrices and the unembedding, which is the table of a tied model


def count_params(cfg: ModelConfig) -> ParamCount:
    """Counts parameters, in a time that does not depend on the layers that a config claims."""
    shapes = leaf_shapes(dataclasses.replace(cfg, layers=1))
    times = {path: cfg.layers if path.startswith("blocks/") else 1 for path in shapes}
    matmul = [path for path, shape in shapes.items() if len(shape) == 2 and (cfg.tied or path != "embed")]
    sizes = {path: times[path] * math.prod(shape) for path, shape in shapes.items()}
    return ParamCount(sum(sizes.values()), sum(sizes[path] for path in matmul))


@dataclasses.dataclass(frozen=True)
class TrainablePaths:
    """The paths of the leaves that train (`weights`), and of the matrices that get a LoRA pair of `rank` (`adapted`)."""

    weights: frozenset[str]
    adapted: frozenset[str] = frozenset()
    rank: int = 0


def count_trainable(cfg: ModelConfig, trainable: TrainablePaths) -> int:
    """Counts the parameters that train: of the weights, and of the LoRA pairs."""
    shapes, pairs = leaf_shapes(cfg), target_shapes(cfg)
    pair_sides = sum(sum(pairs[path]) for path in trainable.adapted)
    return sum(math.prod(shapes[path]) for path in trainable.weights) + trainable.rank * pair_sides


NONE_TRAINABLE = TrainablePaths(frozenset())


LORA_RANKS = (8, 16, 32, 64)  # of an adapter whose rank nobody chose


def lora_bits(cfg: ModelConfig, lora: LoraConfig) -> int:
    """Returns how much an adapter can hold: two bits for each of its parameters (Allen-Zhu & Li 2024, 2404.05405)."""
    return 2 * count_trainable(cfg, lora_only(cfg, lora))


def choose_rank(cfg: ModelConfig, lora: LoraConfig, bits: int) -> LoraConfig:
    """Returns `lora` with the least of LORA_RANKS whose adapter can hold so many bits, else with the largest.

    An adapter that can hold less than its data has to teach, about a bit for each token trained on, falls behind full tuning
    (Schulman et al. 2025, "LoRA Without Regret"). The scale alpha / rank stays. A rank is below each adapted matrix's own.
    """
    most = min(min(cfg.matrices[name]) for name in lora.adapted_matrices) - 1
    ranks = [rank for rank in LORA_RANKS if rank <= most] or [min(lora.rank, most)]
    configs = [dataclasses.replace(lora, rank=rank, alpha=lora.alpha / lora.rank * rank) for rank in ranks]
    return next((config for config in configs if lora_bits(cfg, config) >= bits), configs[-1])


def all_trainable(cfg: ModelConfig) -> TrainablePaths:
    return TrainablePaths(frozenset(leaf_shapes(cfg)))


def lora_only(cfg: ModelConfig, adapter: LoraConfig) -> TrainablePaths:
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
