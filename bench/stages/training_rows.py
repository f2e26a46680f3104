"""The rows that run forward and backward: the ways of training one model."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from bench.stages.row import Row, compile_program
from engine.counting.jaxpr import jaxpr_cost
from engine.counting.memory import training_memory
from engine.counting.program_flops import gradient_program_flops
from engine.counting.traffic import train_bytes
from engine.counting.trainable_paths import TrainablePaths, all_trainable, bottom_frozen, head_only, lora_only, top_frozen
from engine.model.config import LoraConfig, ModelConfig
from engine.model.paths import merge, split
from engine.model.weights.matmul import cast_matrices
from engine.text.batch import Batch
from engine.training.lora import init_lora
from engine.training.loss import CHUNK, LOGITS_LIMIT
from engine.training.optimizer import OptimizerConfig, make_optimizer
from engine.training.preference import Preferences, dpo, margins
from engine.training.step import NEXT_TOKEN, Objective, init_state, loss_and_gradient, train_step

ADAPTER = LoraConfig(rank=8, targets=("q", "v"))


@dataclasses.dataclass(frozen=True)
class TrainingKind:
    """A way of training the model, as a row of the table."""

    name: str
    stage: str
    trainable_paths: TrainablePaths
    preference: bool = False


def training_kinds(cfg: ModelConfig) -> list[TrainingKind]:
    """Returns the ways of training that the table compares; half a model needs two layers."""
    half, every, lora = cfg.layers // 2, all_trainable(cfg), lora_only(cfg, ADAPTER)
    # The last block alone: no norm above it, no head.
    last = TrainablePaths(frozenset(path for path in every.weights if path.startswith(f"blocks/{cfg.layers - 1}/")))
    halves = {"bottom half frozen": bottom_frozen(cfg, half), "top half frozen": top_frozen(cfg, half), "last layer": last}
    fine_tuning = {
        "full fine-tuning": every, **(halves if half else {}), "head only": head_only(cfg),
        f"LoRA rank {ADAPTER.rank} on q and v": lora,
    }  # fmt: skip
    return [
        TrainingKind("pre-training step", "training", every),
        *(TrainingKind(name, "fine-tuning", paths) for name, paths in fine_tuning.items()),
        TrainingKind("preference with that LoRA", "fine-tuning", lora, preference=True),
    ]


def training_row(cfg: ModelConfig, params: Any, kind: TrainingKind, batch: Batch) -> Row:
    """Compiles a step of `kind` on the batch; `params` are copied where they train.

    Frozen matrices are stored in the compute type. In fine-tuning only the second half of each row counts in the loss, as
    the completions of a conversation do.
    """
    B, T = batch.tokens.shape
    paths = kind.trainable_paths
    tx = make_optimizer(OptimizerConfig(learning_rate=1e-4))
    if paths.adapted:
        trainable = init_lora(cfg, params, jax.random.key(1), ADAPTER)
        frozen = cast_matrices(params, cfg.dtype)
    else:
        trainable_leaves, rest = split(params, paths.weights)
        trainable, frozen = jax.tree.map(jnp.copy, trainable_leaves), cast_matrices(rest, cfg.dtype)
    if kind.stage == "fine-tuning":
        batch = batch._replace(mask=batch.mask & (jnp.arange(T) >= T // 2))
    data: Any = batch
    objective: Objective = NEXT_TOKEN
    if kind.preference:
        objective = dpo(0.1)
        chosen, rejected = (jax.tree.map(lambda x, part=part: x[part::2], batch) for part in (0, 1))
        pairs = Preferences(chosen, rejected)
        data = pairs._replace(reference=margins(cfg, frozen, pairs))
    state = init_state(tx, trainable)
    progress = jnp.float32(0.5)
    program, cost = compile_program(train_step, (cfg, tx), state, frozen, data, progress, objective=objective)
    walker = jaxpr_cost(functools.partial(loss_and_gradient, cfg, objective=objective), trainable, frozen, data)
    update = cost["walker"].elementwise - walker.elementwise
    chunked = 4 * B * T * cfg.vocab > LOGITS_LIMIT
    formula = gradient_program_flops(cfg, B, T, trainable=paths, loss_chunk=CHUNK if chunked else None)
    predicted = training_memory(cfg, B, T, trainable=paths)

    def run() -> Any:
        nonlocal state
        state, metrics = program(state, frozen, data, progress)
        return metrics.loss

    def weights() -> Any:
        return merge(state.trainable, frozen) if paths.weights else (frozen, state.trainable)

    return Row(
        kind.name, kind.stage, run, weights, tokens=B * T, formula=formula,
        memory={
            "params": predicted.params, "gradients": predicted.gradients, "optimizer": predicted.optimizer,
            "activations": max(0, predicted.total - predicted.params - predicted.gradients - predicted.optimizer),
        },
        traffic=train_bytes(cfg, B, T, trainable=paths).total, update=update, dtype=cfg.dtype, **cost | {"walker": walker},
    )  # fmt: skip
