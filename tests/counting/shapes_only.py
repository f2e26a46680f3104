"""The shapes on which programs are traced, and the ways of training."""

import functools

import jax
import jax.numpy as jnp

from engine.model.config import LoraConfig, ModelConfig
from engine.model.shapes import leaf_shapes
from engine.model.trainable import TrainablePaths, all_trainable, lora_only
from engine.model.transformer import init_params, make_cache
from engine.text.batch import Batch
from tests.tiny import trainable_paths


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
    lora = lambda rank, *targets: lora_only(
        cfg, LoraConfig(rank, targets=targets) if targets else LoraConfig(rank)
    )
    return {
        "everything": all_trainable(cfg),
        "bottom frozen": trainable_paths(cfg, freeze="bottom:1"),
        "all blocks frozen": trainable_paths(cfg, freeze=f"bottom:{cfg.layers}"),
        "top frozen": trainable_paths(cfg, freeze="top:1"),
        "lookup only": trainable_paths(cfg, freeze=f"top:{cfg.layers}"),
        "last layer": trainable_paths(cfg, freeze=f"bottom:{cfg.layers - 1}"),
        "last block alone": of(lambda path: path.startswith(f"blocks/{cfg.layers - 1}/")),
        "norms": of(lambda path: path.endswith("norm")),
        "head only": trainable_paths(cfg, train="head"),
        "lora": lora(5),
        "lora on v and down": lora(3, "v", "down"),
        "lora on down": lora(3, "down"),
        "lora on gate": lora(3, "gate"),
        "lora on q and up": lora(2, "q", "up"),
        "one lora, high up": TrainablePaths(frozenset(), frozenset({f"blocks/{cfg.layers - 1}/out"}), 2),
    }
