"""Adapters as a tree to train: made for a model by target names, put on by `paths.merge`, folded in at the end.

    adapters = add_lora(cfg, params, key, LoraConfig(rank=8, alpha=16, targets=("q", "v")))
    state = init_state(tx, adapters)                    # clipping, moments and checkpoints see the adapters alone
    state, _ = train_step(cfg, tx, state, params, ...)  # params: the base, plain or Int8, which nothing changes
    plain = merge_lora(merge(state.trainable, params))   # one matrix again; the base is as it was, so nothing need be undone

Several adapters may lie on one base, one over the other: `merge(second, merge(first, params))` adds them up, and folds.
"""

from typing import Any

import jax
from jax import Array

from engine.errors import UserError
from engine.model.config import LoraConfig, ModelConfig
from engine.model.paths import leaf_paths, map_paths, unflatten
from engine.model.transformer import Params
from engine.model.weights.lora import LoRA, make_adapter
from engine.model.weights.matmul import dense


def add_lora(cfg: ModelConfig, params: Params, key: Array, lora: LoraConfig) -> Params:
    """Makes an adapter tree for params (which are only looked at): LoRA leaves without a base at the adapted paths.

    At first an adapter adds exactly nothing. Raises UserError for a rank that is not below an adapted matrix's own.
    """
    leaves = leaf_paths(params)
    adapters: dict[str, LoRA] = {}
    for layer in range(cfg.layers):
        for name, parts in cfg.parts.items():
            columns = [parts[part] for part in parts if part in lora.adapted]
            if not columns:
                continue
            path = f"blocks/{layer}/{name}"
            rows = leaves[path].shape[0]
            most = min(rows, *(stop - start for start, stop in columns))
            if lora.rank >= most:
                raise UserError(f"A LoRA rank for {path} must lie between 1 and {most - 1}, not {lora.rank}.")
            adapters[path] = make_adapter(jax.random.fold_in(key, len(adapters)), rows, columns, lora.rank, lora.alpha)
    return unflatten(adapters)


def merge_lora(params: Params) -> Params:
    """params with every LoRA leaf as one matrix, in the dtype of its base (float32 over an Int8 base).

    Logits are those of the adapted model up to rounding; without adapters params come back as they are.
    """

    def fold(_: str, leaf: Any) -> Any:
        return dense(leaf) if isinstance(leaf, LoRA) else leaf

    return map_paths(fold, params)
