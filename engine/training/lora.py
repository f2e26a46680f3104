"""Initialises LoRA adapters, a tree of trainable parameters beside the frozen params: what fine-tuning trains by default.

    adapters = init_lora(cfg, key, LoraConfig(rank=8, alpha=16, targets=("q", "v")))
    state = init_state(tx, adapters)                    # clipping, moments and checkpoints see the adapters alone
    state, _ = train_step(cfg, tx, state, params, ...)  # params: the base, plain or Int8, stays as it is
    plain = merge_lora(merge(state.trainable, params))

Several adapters on one base add up: `merge(second, merge(first, params))`.
"""

import dataclasses
from typing import Any

import jax
from jax import Array
from jax.sharding import PartitionSpec as P

from engine.errors import UserError
from engine.mesh import layout
from engine.mesh.rules import leaf_spec
from engine.mesh.shape import AXES
from engine.model.config import LoraConfig, ModelConfig
from engine.model.paths import map_paths, unflatten
from engine.model.transformer import Params
from engine.model.weights.int8 import Int8
from engine.model.weights.lora import LoRA, make_adapter


def init_lora(cfg: ModelConfig, key: Array, lora: LoraConfig) -> Params:
    """Makes a model's adapters: at each adapted path a LoRA without a base, which adds nothing yet.

    Raises UserError for a rank that is not below an adapted matrix's own.
    """
    adapters: dict[str, LoRA] = {}
    for layer in range(cfg.layers):
        for name in lora.adapted_matrices:
            path, shape = f"blocks/{layer}/{name}", cfg.matrices[name]
            if lora.rank >= min(shape):
                raise UserError(f"A LoRA rank for {path} must lie between 1 and {min(shape) - 1}, not {lora.rank}.")
            adapters[path] = make_adapter(jax.random.fold_in(key, len(adapters)), shape, lora.rank, lora.alpha)
    return unflatten(adapters)


def gather_frozen(params: Params) -> Params:
    """Says on a mesh where what is thin or narrow is gathered, before XLA widens it; `tensor` still cuts it.

    Pairs are gathered once, not in each product, where XLA would exchange slices of them with the merged weights; the
    integers of an Int8 in each product.
    """

    def gather(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, LoRA | Int8):
            return leaf
        spec = leaf_spec(path, (1, 1), dict.fromkeys(AXES, 1))
        rows, columns = (axis if axis == "tensor" else None for axis in spec)
        if isinstance(leaf, Int8):  # cut until then, or a loop would hold what forward gathered for backward
            values = layout.pin({path: leaf.values})[path]
            return dataclasses.replace(leaf, values=values, gathered=P(rows, columns))
        pin = jax.lax.with_sharding_constraint
        return dataclasses.replace(
            leaf, a=pin(leaf.a, P(rows, None)), b=pin(leaf.b, P(None, columns)), base=gather(path, leaf.base)
        )

    return params if jax.sharding.get_abstract_mesh().empty else map_paths(gather, params)
