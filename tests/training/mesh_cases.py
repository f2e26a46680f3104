"""Trains a small model on one device and on meshes of eight virtual ones, and prints what came out as JSON.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python mesh_cases.py [whole] [night]

JAX counts its devices once, at its start, so the tests read this from a process of its own.
"""

import contextlib
import dataclasses
import functools
import json
import math
import sys
from collections import Counter, defaultdict
from unittest.mock import patch

import jax
import numpy as np

from bench.models import next_token_batch
from engine.counting.xla import read_collectives
from engine.mesh.layout import global_batch, init_sharded, make_mesh, place, shardings
from engine.mesh.shape import parse_mesh
from engine.model import loss, ops
from engine.model.config import LoraConfig, ModelConfig
from engine.model.paths import map_paths
from engine.model.transformer import init_params
from engine.model.weights.int8 import quantize
from engine.model.weights.lora import init_lora
from engine.training.optimizer import OptimizerConfig, make_optimizer
from engine.training.preference import Preferences, preference_objective
from engine.training.step import NEXT_TOKEN, init_state, train_step

CFG = ModelConfig(
    vocab=320, width=64, layers=2, heads=8, kv_heads=4, ff=96, context=64, qk_norm=True, dtype="float32"
)
# The meshes of each case, by the mark of the tests that ask for them. They differ in what they
# exchange: the whole run has each axis beside another, and VARIANTS on all axes at once.
TIERS: dict[str, dict[str, tuple[str, ...]]] = {
    "default": {"adamw": ("data=2,fsdp=4",)},
    "whole": {"muon": ("fsdp=4,tensor=2",), "int8": ("fsdp=4,tensor=2",)},
    "night": {
        "adamw": ("data=8", "fsdp=8", "fsdp=4,tensor=2"),
        "muon": ("data=2,fsdp=4",),
        "lora": ("data=2,fsdp=4", "fsdp=4,tensor=2"),
        "int8": ("fsdp=8",),
    },
}
BATCH, TOKENS, STEPS = 16, 64, 12
RATE = 1e-2
ALL_AXES = "data=2,fsdp=2,tensor=2"
LORA = LoraConfig(rank=4, targets=("q", "v", "out", "gate", "up"))


def batch(step, direction=1):
    ids = (
        np.cumsum(np.random.default_rng(step).integers(0, 3, (BATCH, TOKENS + 1)), 1) * direction % CFG.vocab
    )
    return jax.tree.map(np.asarray, next_token_batch(ids.astype(np.int32)))


def pairs(step):
    return Preferences(
        batch(step), batch(step + 100, -1), np.linspace(-1, 1, 2 * BATCH, dtype=np.float32).reshape(BATCH, 2)
    )


def packed(step):
    segments = np.sort(np.random.default_rng(step).integers(0, 3, (BATCH, TOKENS)), axis=1).astype(np.int32)
    return batch(step)._replace(segments=segments)


def splash():
    """Sends attention through the TPU's kernel."""
    kernel = functools.partial(ops.splash, interpret=True)
    table = ops.PLATFORMS | {"tpu": ops.PLATFORMS["tpu"]._replace(fused_attention=kernel)}
    return patch.multiple(ops, PLATFORMS=table, platform=lambda: "tpu")


def begin(case, cfg=CFG):
    """Returns the optimizer, a function that makes the state, and the frozen parameters in NumPy."""
    tx = make_optimizer(OptimizerConfig(kind="muon" if case == "muon" else "adamw", learning_rate=RATE))
    if case in ("adamw", "muon"):
        return tx, lambda: init_state(tx, init_params(cfg, jax.random.key(0))), {}
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))
    params = map_paths(
        lambda _, x: (0.1 * rng.standard_normal(x.shape) + (len(x.shape) == 1)).astype(np.float32), shapes
    )
    frozen = quantize(params, "full") if case == "int8" else params
    adapters = lambda: init_lora(cfg, jax.random.key(1), LORA)
    return tx, lambda: init_state(tx, adapters()), jax.tree.map(np.asarray, frozen)


def bytes_on_device(tree):
    """Bytes on one device, and those of them that are vectors and numbers."""
    shape = lambda x: x.shape if isinstance(x, np.ndarray) else x.sharding.shard_shape(x.shape)
    sizes = [(math.prod(shape(x)) * x.dtype.itemsize, len(x.shape)) for x in jax.tree.leaves(tree)]
    return sum(size for size, _ in sizes), sum(size for size, axes in sizes if axes < 2)


def train(case, cfg=CFG, microbatches=1, batch=batch):
    tx, make, frozen = begin(case, cfg)
    objective = preference_objective() if batch is pairs else NEXT_TOKEN
    frozen = place(frozen)
    state = init_sharded(jax.jit(make))
    held = {"state": bytes_on_device(state), "frozen": bytes_on_device(frozen)}
    arguments = state, frozen, global_batch(batch(0)), np.float32(0), microbatches, objective
    program = train_step.lower(cfg, tx, *arguments).compile()
    wanted, losses, kept = shardings(state), [], False
    for step in range(STEPS):
        old = state
        state, metrics = program(state, frozen, global_batch(batch(step)), np.float32((step + 1) / 16))
        losses.append(float(metrics.loss))
        donated = all(x.is_deleted() for x in jax.tree.leaves(old))
    if wanted is not None:
        leaves = zip(jax.tree.leaves(state), jax.tree.leaves(wanted))
        kept = all(x.sharding.is_equivalent_to(where, x.ndim) for x, where in leaves)
    collectives: Counter[str] = Counter()
    for one in read_collectives(program.as_text()):
        collectives[one.kind] += one.bytes * one.times
    weights = jax.tree.leaves(state.trainable)
    found = {"losses": losses, "held": held, "donated": donated, "kept": kept, "collectives": collectives}
    return found, [np.asarray(x) for x in weights]


def on_mesh(text, weights, case, cfg=CFG, microbatches=1, **options):
    """Trains on a mesh; adds how far its weights are from one device's, on average over the leaf
    where that is most.
    """
    with jax.set_mesh(make_mesh(parse_mesh(text))):
        found, others = train(case, cfg, microbatches, **options)
    found["apart"] = max(float(np.abs(a - b).mean()) for a, b in zip(weights, others))
    return found


def results(tiers):
    """Yields the name and the figures of each training run of the default tier and of `tiers`."""
    cases = defaultdict(tuple)
    for tier in ("default", *tiers):
        for case, meshes in TIERS[tier].items():
            cases[case] += meshes
    alone = {}
    for case, meshes in cases.items():
        options = {"muon": {"cfg": dataclasses.replace(CFG, remat="block")}, "int8": {"microbatches": 2}}.get(
            case, {}
        )
        one, alone[case] = train(case, **options)
        yield f"{case} one device", one
        for text in meshes:
            yield f"{case} {text}", on_mesh(text, alone[case], case, **options)
    yield "init", {"equal": is_initialised_alike()}
    if "whole" in tiers:
        yield from variants(alone)


def is_initialised_alike():
    """Returns whether a mesh makes the random weights of one device."""
    _, make, _ = begin("adamw")
    plain = jax.device_get(jax.jit(make)())
    with jax.set_mesh(make_mesh(parse_mesh("fsdp=4,tensor=2"))):
        state = jax.device_get(init_sharded(jax.jit(make)))
    return jax.tree.all(jax.tree.map(np.array_equal, state, plain))


def variants(alone):
    """Yields VARIANTS, beside the weights of `alone` by case."""
    scan = dataclasses.replace(CFG, scan=True, remat="block")
    with patch.multiple(loss, LOGITS_LIMIT=0, CHUNK=96):
        yield "adamw in pieces", on_mesh("fsdp=4,tensor=2", alone["adamw"], "adamw", cfg=scan, microbatches=2)
    with patch.object(loss, "ROWS_LIMIT", 4 * CFG.vocab * 24):
        yield "int8 in pieces", on_mesh(ALL_AXES, alone["int8"], "int8", cfg=scan, microbatches=2)
    tied = dataclasses.replace(CFG, tied=True, remat="block")
    for name, case, data, context in (
        ("preference", "lora", pairs, contextlib.nullcontext()),
        ("splash", "adamw", packed, splash()),
    ):
        one, weights = train(case, cfg=tied, batch=data)
        yield f"{name} one device", one
        with context:
            yield name, on_mesh(ALL_AXES, weights, case, cfg=tied, batch=data)


if __name__ == "__main__":
    print(json.dumps(dict(results(sys.argv[1:]))))
