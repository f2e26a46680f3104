"""Adapters as a tree to train: made for a model by target names, put on by `paths.merge`, folded in at the end.

    adapters = add_lora(cfg, params, key, rank=8, alpha=16, targets=("q", "v"))
    state = init_state(tx, adapters)                    # clipping, moments and checkpoints see the adapters alone
    state, _ = train_step(cfg, tx, state, params, ...)  # params: the base, plain or Int8, which nothing changes
    plain = fold_lora(merge(state.trainable, params))   # one matrix again; the base is as it was, so nothing need be undone

Several adapters may lie on one base, one over the other: `merge(second, merge(first, params))` adds them up, and folds.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax import Array

from engine.errors import UserError, nearest
from engine.model.config import ModelConfig
from engine.model.paths import leaf_paths, map_paths, nested
from engine.model.transformer import Params
from engine.model.weights.lora import LoRA, make_adapter
from engine.model.weights.matmul import dense


def lora_targets(cfg: ModelConfig, targets: Sequence[str]) -> tuple[str, ...]:
    """The targets in the order of the model, each once: of q, k, v, out, gate, up, down; 'o' is 'out', 'all' is all.

    Raises UserError for a name that is none of them, or for none at all.
    """
    known = [part for parts in cfg.parts.values() for part in parts]
    wanted = {"out" if name == "o" else name for name in targets}
    for name in sorted(wanted - {*known, "all"}):
        raise UserError(f"LoRA adapts {', '.join(known)}, or all; there is no target {name!r}.{nearest(name, known)}")
    if not wanted:
        raise UserError(f"LoRA needs at least one target: {', '.join(known)}, or all.")
    return tuple(name for name in known if name in wanted or "all" in wanted)


def add_lora(
    cfg: ModelConfig, params: Params, key: Array, *, rank: int = 8, alpha: float = 16.0, targets: Sequence[str] = ("q", "v")
) -> Params:
    """An adapter tree for params (which are only looked at): LoRA leaves without a base at the adapted matrices' paths.

    What a target learns is added with the factor alpha / rank; at first it is exactly nothing. Raises UserError for an
    unknown target, or a rank that is below 1 or not below an adapted matrix's own.
    """
    chosen = lora_targets(cfg, targets)
    leaves = leaf_paths(params)
    found: dict[str, LoRA] = {}
    for layer in range(cfg.layers):
        for name, parts in cfg.parts.items():
            columns = [parts[part] for part in parts if part in chosen]
            if not columns:
                continue
            path = f"blocks/{layer}/{name}"
            rows = leaves[path].shape[0]
            most = min(rows, *(stop - start for start, stop in columns))
            if not 1 <= rank < most:
                raise UserError(f"A LoRA rank for {path} must lie between 1 and {most - 1}, not {rank}.")
            found[path] = make_adapter(jax.random.fold_in(key, len(found)), rows, columns, rank, alpha)
    return nested(found)


def fold_lora(params: Params) -> Params:
    """params with every LoRA leaf as one matrix, in the dtype of its base (float32 over an Int8 base).

    Logits are those of the adapted model up to rounding; without adapters params come back as they are.
    """

    def fold(_: str, leaf: Any) -> Any:
        return dense(leaf) if isinstance(leaf, LoRA) else leaf

    return map_paths(fold, params)
