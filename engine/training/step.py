"""One step of training: forward, backward, update. A pure function of state, batch and progress."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from engine.mesh import layout
from engine.model.config import ModelConfig
from engine.model.loss import summed_loss
from engine.model.paths import merge
from engine.model.transformer import Params
from engine.model.weights.lora import gather_frozen
from engine.text.batch import Batch


class TrainState(NamedTuple):
    """The state that a step replaces. Frozen weights are not in it: neither differentiated nor donated."""

    step: Array  # () int32: batches seen, refused ones too
    trainable: Params
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class Objective:
    """A training objective: the summed loss of a batch, () float32, and the count, (), it is
    divided by.

    `summed_loss(cfg, params, batch, head_trains)`: `head_trains` says how logits that do not fit
    into memory are made.

    The leaves of a batch have a leading axis of rows; its sum and count are the sums of its parts'.
    One objective is one object, or its step is compiled anew.
    """

    summed_loss: Callable[[ModelConfig, Params, Any, bool], Array]
    count: Callable[[Any], Array]


def _count_targets(batch: Batch) -> Array:
    return jnp.count_nonzero(batch.mask)


NEXT_TOKEN = Objective(summed_loss, _count_targets)


# Compiler options for a step that trains a LoRA: else XLA would widen an int8 base, or merge the
# adapter into a float base, once for all microbatches, and hold all of it in float32.
LORA_COMPILER_OPTIONS = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}


class StepMetrics(NamedTuple):
    """The metrics of one step, () arrays."""

    loss: Array  # for NEXT_TOKEN mean nats per target
    tokens: Array  # the objective's count, which the loss is the mean over
    grad_norm: Array  # before clipping
    refused: Array  # 1 if the update was not finite, and so not made


def init_state(tx: optax.GradientTransformation, trainable: Params) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), trainable, tx.init(trainable))


def loss_and_gradient(
    cfg: ModelConfig,
    trainable: Params,
    frozen: Params,
    batch: Any,
    microbatches: int = 1,
    objective: Objective = NEXT_TOKEN,
) -> tuple[Array, Params]:
    """Returns the objective's mean over the batch, and its gradient for the trainable leaves alone.

    With A microbatches the gradients of A parts are summed: the same numbers in 1 / A of the
    activation memory. B must be a multiple of A.
    """
    total = jnp.maximum(objective.count(batch), 1).astype(jnp.float32)

    def share(trainable: Params, frozen: Params, part: Any) -> Array:
        params = gather_frozen(merge(trainable, frozen))
        return objective.summed_loss(cfg, params, part, cfg.head_path in trainable) / total

    differentiate = jax.value_and_grad(share)
    if microbatches == 1:
        return differentiate(trainable, frozen, batch)
    parts = jax.tree.map(lambda x: layout.stack_rows(x, microbatches), batch)

    def add(sums: Any, part: Any) -> tuple[Any, None]:
        # Gathered anew for each part: XLA would else gather the whole model before the loop, and
        # hold that.
        weights, part = layout.regather((trainable, frozen), part)
        return jax.tree.map(jnp.add, sums, differentiate(*weights, part)), None

    start = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, trainable))
    return jax.lax.scan(add, start, parts)[0]


@jax.jit(static_argnames=("cfg", "microbatches", "objective"), compiler_options=LORA_COMPILER_OPTIONS)
def gradient_norms(
    cfg: ModelConfig,
    trainable: Params,
    frozen: Params,
    batch: Any,
    microbatches: int = 1,
    objective: Objective = NEXT_TOKEN,
) -> Params:
    """Returns the norm of each trainable leaf's gradient, () float32. A program of its own: the
    step's keeps its bits."""
    return jax.tree.map(
        optax.tree.norm, loss_and_gradient(cfg, trainable, frozen, batch, microbatches, objective)[1]
    )


@jax.jit(static_argnames=("cfg", "tx", "microbatches", "objective"), donate_argnames="state")
def train_step(
    cfg: ModelConfig,
    tx: optax.GradientTransformationExtraArgs,
    state: TrainState,
    frozen: Params,
    batch: Any,
    progress: Array,
    microbatches: int = 1,
    objective: Objective = NEXT_TOKEN,
) -> tuple[TrainState, StepMetrics]:
    """Returns the next state and the step's metrics. `state` is donated; `progress` () float32
    drives the schedule.

    `batch` is what the objective reads, for NEXT_TOKEN a Batch. A step whose loss, gradient or
    update is not finite changes no weight and no moment; it only counts as seen.
    """
    loss, gradient = loss_and_gradient(cfg, state.trainable, frozen, batch, microbatches, objective)
    gradient = layout.pin(gradient)
    with jax.named_scope("optimizer"):
        grad_norm = optax.tree.norm(gradient)
        updates, opt_state = tx.update(
            gradient, state.opt_state, state.trainable, progress=progress, dtype=cfg.dtype
        )
        # or XLA would keep their squares too: held by tests/laws/test_barriers.py
        updates = jax.lax.optimization_barrier(updates)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(optax.tree.norm(updates))
        trainable = optax.apply_updates(state.trainable, updates)
        choose = functools.partial(jnp.where, finite)
        trainable, opt_state = jax.tree.map(
            choose, (trainable, opt_state), (state.trainable, state.opt_state)
        )
        trainable, opt_state = layout.pin((trainable, opt_state))
    refused = (~finite).astype(jnp.int32)
    return TrainState(state.step + 1, trainable, opt_state), StepMetrics(
        loss, objective.count(batch), grad_norm, refused
    )
