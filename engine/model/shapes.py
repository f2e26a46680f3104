"""The table of a model's parameters: path -> shape, from its config alone."""

from engine.model.config import ModelConfig


def leaf_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns path -> shape of every parameter, such as 'blocks/0/q', bottom first. A tied model
    has no `head`.
    """
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
    for layer in range(cfg.layers):
        for name, shape in block.items():
            shapes[f"blocks/{layer}/{name}"] = shape
    shapes["norm"] = (cfg.width,)
    if not cfg.tied:
        shapes["head"] = (cfg.width, cfg.vocab)
    return shapes


def target_shapes(cfg: ModelConfig) -> dict[str, tuple[int, int]]:
    """Returns path -> (rows, columns) of every matrix that a LoRA pair can adapt."""
    shapes: dict[str, tuple[int, int]] = {}
    for layer in range(cfg.layers):
        for name, shape in cfg.matrices.items():
            shapes[f"blocks/{layer}/{name}"] = shape
    return shapes
