"""DPO: trains on preferences without a reward model (Rafailov et al. 2023, 2305.18290, equation 7).

A model's margin for a pair is log p(chosen) - log p(rejected), each summed over what the mask counts. DPO raises it above
that of a reference model, whose margins are computed once, before training:

    pairs = pairs._replace(reference=margins(cfg, base, pairs))
    state, metrics = train_step(cfg, tx, state, frozen, pairs, progress, 1, dpo(beta=0.1))

With adapters the reference is the base itself: there is no second copy of the model.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from engine.errors import UserError
from engine.mesh import layout
from engine.model.config import ModelConfig
from engine.model.transformer import Params
from engine.text.batch import Batch
from engine.training.loss import target_losses
from engine.training.step import Objective


class Preferences(NamedTuple):
    """B pairs: row i of `chosen` is preferred to row i of `rejected`, (B, T) each; masks count only the completions.

    `reference` (B,) float32: the reference model's margins.
    """

    chosen: Batch
    rejected: Batch
    reference: Any = None


def margin(cfg: ModelConfig, params: Params, pairs: Preferences) -> Array:
    """Returns (B,) float32 nats: log p(chosen) - log p(rejected), in one forward pass over all 2 B rows."""
    both = jax.tree.map(lambda a, b: layout.join_rows([a, b]), pairs.chosen, pairs.rejected)
    chosen, rejected = layout.split_rows(-target_losses(cfg, params, both).sum(-1), 2)
    return chosen - rejected


margins = jax.jit(margin, static_argnums=0)


@functools.cache
def dpo(beta: float = 0.1) -> Objective:
    """Returns the objective (summed loss, number of pairs): -log sigmoid(beta (margin - reference)) of each pair.

    The loss is ln 2 where the model is the reference; there are no metrics beside it.
    A larger `beta` keeps the model nearer to the reference. Raises UserError when it is not above 0.
    """
    if not beta > 0:
        raise UserError(f"beta must be above 0, not {beta!r}: at 0 no preference would count.")

    def summed(cfg: ModelConfig, params: Params, pairs: Preferences) -> Array:
        return -jax.nn.log_sigmoid(beta * (margin(cfg, params, pairs) - pairs.reference)).sum()

    return Objective(summed, lambda pairs: jnp.asarray(pairs.chosen.mask.shape[0]))
