"""The shapes on which programs are traced, and the ways of training."""

import functools

import jax
import jax.numpy as jnp

from engine.counting.params import (
    TrainablePaths,
    all_trainable,
    bottom_frozen,
    head_only,
    leaf_shapes,
    lora_only,
    top_frozen,
)
from engine.model.config import LoraConfig, ModelConfig
from engine.model.transformer import init_params, make_cache
from engine.text.batch import Batch


def shaped(*shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype)


def params_of(cfg):
    return jax.eval_shape(functools.partial(init_params, cfg), jax.random.key(0))


def batch_of(rows, tokens):
    numbers = shaped(rows, tokens)
    return Batch(numbers, numbers, shaped(rows, tokens, dtype=bool), numbers)


def cache_of(cfg, slots, capacity):
    return jax.eval_shape(lambda: make_cache(cfg, slots, capacity))


def modes(cfg: ModelConfig) -> dict[str, TrainablePaths]:
    """Ways of training, one for every branch of the formulas."""
    of = lambda select: TrainablePaths(frozenset(filter(select, leaf_shapes(cfg))))
    lora = lambda rank, *targets: lora_only(cfg, LoraConfig(rank, targets=targets) if targets else LoraConfig(rank))
    return {
        "everything": all_trainable(cfg),
        "bottom frozen": bottom_frozen(cfg, 1),
        "all blocks frozen": bottom_frozen(cfg, cfg.layers),
        "top frozen": top_frozen(cfg, 1),
        "lookup only": top_frozen(cfg, cfg.layers),
        "last layer": bottom_frozen(cfg, cfg.layers - 1),
        "last block alone": of(lambda path: path.startswith(f"blocks/{cfg.layers - 1}/")),
        "norms": of(lambda path: path.endswith("norm")),
        "head only": head_only(cfg),
        "lora": lora(5),
        "lora on v and down": lora(3, "v", "down"),
        "lora on down": lora(3, "down"),
        "lora on gate": lora(3, "gate"),
        "lora on q and up": lora(2, "q", "up"),
        "one lora, high up": TrainablePaths(frozenset(), frozenset({f"blocks/{cfg.layers - 1}/out"}), 2),
    }
