"""One step of training: forward, backward, update. A pure function of state, batch and progress."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from engine.model.config import ModelConfig
from engine.model.paths import merge
from engine.model.transformer import Params
from engine.training.loss import summed_loss


class TrainState(NamedTuple):
    """What training changes. Frozen weights ride beside it and are neither differentiated nor donated."""

    step: Array  # () int32: batches seen, also those whose update was refused
    trainable: Params
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a step makes small: the sum of something over a batch, divided by how many of it there are.

    `summed(cfg, params, batch)` () float32 and `count(batch)` () of any batch whose leaves have a leading axis of rows,
    such that a batch's are the sums of its parts'. One objective is one object, or its step is compiled anew.
    """

    summed: Callable[[ModelConfig, Params, Any], Array]
    count: Callable[[Any], Array]


NEXT_TOKEN = Objective(summed_loss, lambda batch: batch.mask.sum())


# To `compile` a step over an int8 base with: XLA would else convert all of it once for all microbatches, and hold that.
NARROW = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}


class Metrics(NamedTuple):
    """Of one step, all () arrays: the loss (mean nats per target, for NEXT_TOKEN), how many it is the mean of, the
    gradient's norm before clipping, 1 if refused."""

    loss: Array
    tokens: Array
    grad_norm: Array
    refused: Array


def init_state(tx: optax.GradientTransformation, trainable: Params) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), trainable, tx.init(trainable))


def loss_and_gradient(
    cfg: ModelConfig,
    trainable: Params,
    frozen: Params,
    batch: Any,
    microbatches: int = 1,
    objective: Objective = NEXT_TOKEN,
) -> tuple[Array, Params]:
    """The objective's mean over the whole batch, and its gradient for the trainable leaves alone.

    With microbatches A, the batch (B, T) is taken A parts at a time and the gradients summed: the same numbers in
    1 / A of the activation memory. B must be a multiple of A.
    """
    total = jnp.maximum(objective.count(batch), 1).astype(jnp.float32)

    def share(trainable: Params, part: Any) -> Array:
        return objective.summed(cfg, merge(trainable, frozen), part) / total

    differentiate = jax.value_and_grad(jax.checkpoint(share) if cfg.remat == "full" else share)
    if microbatches == 1:
        return differentiate(trainable, batch)
    parts = jax.tree.map(lambda x: x.reshape(microbatches, -1, *x.shape[1:]), batch)

    def add(sums: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, differentiate(trainable, part)), None

    start = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, trainable))
    return jax.lax.scan(add, start, parts)[0]


@functools.partial(jax.jit, static_argnames=("cfg", "tx", "microbatches", "objective"), donate_argnames="state")
def train_step(
    cfg: ModelConfig,
    tx: optax.GradientTransformationExtraArgs,
    state: TrainState,
    frozen: Params,
    batch: Any,
    progress: Array,
    microbatches: int = 1,
    objective: Objective = NEXT_TOKEN,
) -> tuple[TrainState, Metrics]:
    """The next state, and what the step measured. `state` is donated; `progress` () float32 drives the schedule.

    `batch` is what the objective reads: a Batch, unless another objective is given.

    A step whose loss, gradient or update is not finite changes no weight and no moment: it only counts as seen.
    """
    loss, gradient = loss_and_gradient(cfg, state.trainable, frozen, batch, microbatches, objective)
    with jax.named_scope("optimizer"):
        grad_norm = optax.tree.norm(gradient)
        updates, opt_state = tx.update(gradient, state.opt_state, state.trainable, progress=progress)
        sound = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(optax.tree.norm(updates))
        trainable = optax.apply_updates(state.trainable, updates)
        trainable, opt_state = jax.tree.map(
            lambda new, old: jnp.where(sound, new, old), (trainable, opt_state), (state.trainable, state.opt_state)
        )
    refused = (~sound).astype(jnp.int32)
    return TrainState(state.step + 1, trainable, opt_state), Metrics(loss, objective.count(batch), grad_norm, refused)
