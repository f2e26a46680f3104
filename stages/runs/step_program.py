"""Compiles the training step of a run, for its model, optimizer, batch and objective."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jax.stages import Compiled

from engine.training.optimizer import make_optimizer
from engine.training.step import NEXT_TOKEN, Objective, TrainState, train_step
from stages.runs.plan import RunPlan


def compile_step(
    plan: RunPlan,
    state: TrainState,
    frozen: Any,
    batch: Any,
    objective: Objective = NEXT_TOKEN,
    on_traced: Callable[[], None] = lambda: None,
) -> Compiled:
    """Compiles `train_step` to (state, frozen, batch, progress) -> (state, metrics); the arguments
    may be shapes.

    Calls `on_traced` before XLA begins.
    """
    tx = make_optimizer(plan.recipe.optimizer)
    microbatches = plan.recipe.accumulate
    lowered = train_step.lower(
        plan.cfg, tx, state, frozen, batch, np.float32(0), microbatches=microbatches, objective=objective
    )
    on_traced()
    return lowered.compile(plan.compiler_options)
