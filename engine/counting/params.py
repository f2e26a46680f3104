"""Parameter shapes and counts of a model, from its config alone."""

import dataclasses
import math
from typing import NamedTuple

from engine.model.config import ModelConfig


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
    """Counts all parameters, and those of matrix products, at once for however many layers a config claims."""
    shapes = leaf_shapes(dataclasses.replace(cfg, layers=1))
    times = {path: cfg.layers if path.startswith("blocks/") else 1 for path in shapes}
    matmul = [path for path, shape in shapes.items() if len(shape) == 2 and (cfg.tied or path != "embed")]
    sizes = {path: times[path] * math.prod(shape) for path, shape in shapes.items()}
    return ParamCount(sum(sizes.values()), sum(sizes[path] for path in matmul))
