"""Trains a small model on one device and on meshes of eight virtual ones, and prints what came out as JSON.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python mesh_cases.py

JAX counts its devices once, at its start, so the tests read this from a process of its own.
"""

import json
import math
from collections import Counter

import jax
import numpy as np

from bench.models import next_token_batch
from engine.counting.collectives import read_collectives
from engine.counting.mesh_traffic import step_collectives
from engine.model.config import LoraConfig, ModelConfig
from engine.model.paths import map_paths
from engine.model.transformer import init_params
from engine.model.weights.int8 import matmul_rules, quantize
from engine.sharding import global_batch, group_columns, init_sharded, make_mesh, parse_mesh, place, shardings, ungroup_columns
from engine.training.lora import init_lora
from engine.training.optimizer import OptimizerConfig, make_optimizer
from engine.training.step import init_state, train_step

CFG = ModelConfig(vocab=320, width=64, layers=2, heads=8, kv_heads=4, ff=96, context=64, qk_norm=True, dtype="float32")
MESHES = ("data=8", "fsdp=8", "data=2,fsdp=4", "fsdp=4,tensor=2")
BATCH, TOKENS, STEPS = 16, 64, 3


def batch(step):
    ids = np.cumsum(np.random.default_rng(step).integers(0, 3, (BATCH, TOKENS + 1)), 1) % CFG.vocab
    return jax.tree.map(np.asarray, next_token_batch(ids.astype(np.int32)))


def begin(case):
    """What makes the state, and the frozen parameters in NumPy."""
    tx = make_optimizer(OptimizerConfig(kind="muon" if case == "muon" else "adamw", learning_rate=1e-2))
    if case in ("adamw", "muon"):
        return tx, lambda: init_state(tx, init_params(CFG, jax.random.key(0))), {}
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_params(CFG, jax.random.key(0)))
    params = map_paths(lambda _, x: (0.1 * rng.standard_normal(x.shape) + (len(x.shape) == 1)).astype(np.float32), shapes)
    frozen = quantize(params, matmul_rules(params, "full")) if case == "int8" else params
    adapters = lambda: init_lora(CFG, shapes, jax.random.key(1), LoraConfig(rank=4, targets=("q", "v", "out", "gate", "up")))
    return tx, lambda: init_state(tx, adapters()), jax.tree.map(np.asarray, frozen)


def share(tree):
    """Bytes on one device, and those of them that are vectors and numbers."""
    shape = lambda x: x.shape if isinstance(x, np.ndarray) else x.sharding.shard_shape(x.shape)
    sizes = [(math.prod(shape(x)) * x.dtype.itemsize, len(x.shape)) for x in jax.tree.leaves(tree)]
    return sum(size for size, _ in sizes), sum(size for size, axes in sizes if axes < 2)


def train(case):
    tx, make, frozen = begin(case)
    frozen = place(CFG, frozen)
    state = init_sharded(jax.jit(lambda: group_columns(CFG, make())))
    held = {"state": share(state), "frozen": share(frozen)}
    program = train_step.lower(CFG, tx, state, frozen, global_batch(batch(0)), np.float32(0)).compile()
    wanted, losses, kept = shardings(state), [], False
    for step in range(STEPS):
        old = state
        state, metrics = program(state, frozen, global_batch(batch(step)), np.float32((step + 1) / 10))
        losses.append(float(metrics.loss))
        donated = all(x.is_deleted() for x in jax.tree.leaves(old))
    if wanted is not None:
        pairs = zip(jax.tree.leaves(state), jax.tree.leaves(wanted))
        kept = all(x.sharding.is_equivalent_to(where, x.ndim) for x, where in pairs)
    collectives: Counter[str] = Counter()
    for one in read_collectives(program.as_text()) if not frozen else ():
        collectives[one.kind] += one.bytes * one.times
    weights = jax.tree.leaves(ungroup_columns(CFG, state.trainable))
    found = {"losses": losses, "held": held, "donated": donated, "kept": kept, "collectives": collectives}
    return found, [np.asarray(x) for x in weights]


def results():
    for case in ("adamw", "muon", "lora", "int8"):
        one, weights = train(case)
        yield f"{case} one device", one
        for text in MESHES:
            shape = parse_mesh(text)
            with jax.set_mesh(make_mesh(shape)):
                found, others = train(case)
            found["apart"] = max(float(np.abs(a - b).max()) for a, b in zip(weights, others))
            if case in ("adamw", "muon"):
                found["formula"] = step_collectives(CFG, shape, BATCH, TOKENS, case)
            yield f"{case} {text}", found
    _, make, _ = begin("adamw")
    plain = jax.device_get(jax.jit(make)())
    with jax.set_mesh(make_mesh(parse_mesh("fsdp=4,tensor=2"))):
        state = jax.device_get(ungroup_columns(CFG, init_sharded(jax.jit(lambda: group_columns(CFG, make())))))
        yield "init", {"equal": jax.tree.all(jax.tree.map(np.array_equal, state, plain))}


if __name__ == "__main__":
    print(json.dumps(dict(results())))
