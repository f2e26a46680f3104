"""Parameter shapes and counts of a model, from its config alone."""

import dataclasses
import math

from engine.model.config import ModelConfig

MATRICES = ("qkv", "out", "gate_up", "down")  # of a block, in the order of the forward pass


def leaf_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns path -> shape of every parameter, bottom first. A tied model has no `head`."""
    block: dict[str, tuple[int, ...]] = {"attn_norm": (cfg.width,), "qkv": (cfg.width, cfg.qkv_width)}
    if cfg.qkv_bias:
        block["qkv_bias"] = (cfg.qkv_width,)
    if cfg.qk_norm:
        block |= {"q_norm": (cfg.head_dim,), "k_norm": (cfg.head_dim,)}
    block |= {"out": (cfg.heads * cfg.head_dim, cfg.width), "mlp_norm": (cfg.width,)}
    block |= {"gate_up": (cfg.width, 2 * cfg.ff), "down": (cfg.ff, cfg.width)}
    shapes: dict[str, tuple[int, ...]] = {"embed": (cfg.vocab, cfg.width)}
    shapes |= {f"blocks/{layer}/{name}": shape for layer in range(cfg.layers) for name, shape in block.items()}
    shapes["norm"] = (cfg.width,)
    if not cfg.tied:
        shapes["head"] = (cfg.width, cfg.vocab)
    return shapes


@dataclasses.dataclass(frozen=True)
class ParamCount:
    """Parameters of a model by component, over all layers."""

    embed: int
    qkv: int
    out: int
    gate_up: int
    down: int
    head: int  # 0 when tied
    norms: int
    biases: int
    tied: bool

    @property
    def total(self) -> int:
        return self.matmul + self.norms + self.biases + (0 if self.tied else self.embed)

    @property
    def blocks(self) -> int:
        """Parameters in the matrices of all blocks."""
        return self.qkv + self.out + self.gate_up + self.down

    @property
    def matmul(self) -> int:
        """The N of "6 N": the block matrices and the unembedding, which is the table of a tied model."""
        return self.blocks + (self.embed if self.tied else self.head)


def count_params(cfg: ModelConfig) -> ParamCount:
    sizes = dict.fromkeys(("embed", *MATRICES, "head", "norms", "biases"), 0)
    for path, shape in leaf_shapes(cfg).items():
        name = path.rpartition("/")[2]
        kind = name if name in sizes else "biases" if name.endswith("bias") else "norms"
        sizes[kind] += math.prod(shape)
    return ParamCount(**sizes, tied=cfg.tied)
