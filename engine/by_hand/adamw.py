"""AdamW: from a gradient to new weights (Kingma & Ba 2014, alg. 1; Loshchilov & Hutter 2017, alg. 2)."""

from typing import NamedTuple

import numpy as np
from numpy import ndarray

from engine.by_hand.model import Params, leaves, tree_map


class AdamWConfig(NamedTuple):
    """AdamW's hyperparameters, named and preset as in `training.optimizer`."""

    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0  # largest norm of the gradient; inf for no clipping


class Moments(NamedTuple):
    """The optimizer state: two moments of every weight. Checkpoints hold the fields by these names,
    older ones too.
    """

    taken: ndarray  # () int32, steps so far
    first: Params  # running mean of the gradient
    second: Params  # running mean of its square


def global_norm(tree: Params) -> float:
    return sum(float(np.vdot(leaf, leaf)) for leaf in leaves(tree)) ** 0.5


def step(
    cfg: AdamWConfig, params: Params, gradient: Params, moments: Moments, factor: float = 1.0
) -> tuple[Params, Moments]:
    """Takes a step: returns new params and moments. `factor` is the schedule's, on the learning
    rate.

    A weight moves against its mean gradient over that gradient's usual size: about a learning rate
    a step, whatever the gradient's scale. Both means begin at zero, which the division by 1 -
    beta^count corrects. Decay pulls matrices towards zero apart from the gradient; it leaves gains
    and biases, which are vectors.
    """
    length = global_norm(gradient)
    shrink = cfg.clip / length if length > cfg.clip else 1.0
    count = int(moments.taken) + 1
    correction1 = 1 - cfg.beta1**count
    correction2 = 1 - cfg.beta2**count
    rate = cfg.learning_rate * float(factor)

    first = tree_map(lambda m, g: cfg.beta1 * m + (1 - cfg.beta1) * shrink * g, moments.first, gradient)
    second = tree_map(
        lambda v, g: cfg.beta2 * v + (1 - cfg.beta2) * (shrink * g) ** 2, moments.second, gradient
    )

    def update(p: ndarray, m: ndarray, v: ndarray) -> ndarray:
        direction = (m / correction1) / (np.sqrt(v / correction2) + cfg.eps)
        decay = cfg.weight_decay if p.ndim > 1 else 0.0
        return p - rate * (direction + decay * p)

    return tree_map(update, params, first, second), Moments(np.array(count, np.int32), first, second)
