"""AdamW: from a gradient to new weights (Kingma & Ba 2014, algorithm 1; Loshchilov & Hutter 2017, algorithm 2)."""

from typing import NamedTuple

import numpy as np
from numpy import ndarray

from engine.by_hand.tree import Params, leaves, mapped


class Settings(NamedTuple):
    """How weights move. The names and defaults are those of `training.optimizer`."""

    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0  # largest norm of the whole gradient; inf for no clipping


class Moments(NamedTuple):
    """What is remembered from step to step: two more numbers for every weight."""

    taken: ndarray  # () int32, steps
    first: Params  # running mean of the gradient
    second: Params  # running mean of its square


def norm(tree: Params) -> float:
    """The length of a tree taken as one long vector."""
    return sum(float(np.vdot(leaf, leaf)) for leaf in leaves(tree)) ** 0.5


def step(settings: Settings, params: Params, gradient: Params, moments: Moments, factor: float = 1.0) -> tuple[Params, Moments]:
    """New params and moments; what is given stays as it is. `factor` is the schedule's, on the learning rate.

    A weight moves against its mean gradient, divided by that gradient's usual size: so each moves about a learning rate
    a step, whatever its gradient's scale. Both means begin at zero and are too small by 1 - beta^count, which is put
    right. Decay pulls matrices towards zero apart from the gradient; gains and biases, which are vectors, it leaves.
    """
    length = norm(gradient)
    shrink = settings.clip / length if length > settings.clip else 1.0
    count = int(moments.taken) + 1
    right1, right2 = 1 - settings.beta1**count, 1 - settings.beta2**count
    rate = settings.learning_rate * float(factor)

    first = mapped(lambda m, g: settings.beta1 * m + (1 - settings.beta1) * shrink * g, moments.first, gradient)
    second = mapped(lambda v, g: settings.beta2 * v + (1 - settings.beta2) * (shrink * g) ** 2, moments.second, gradient)

    def moved(p: ndarray, m: ndarray, v: ndarray) -> ndarray:
        direction = (m / right1) / (np.sqrt(v / right2) + settings.eps)
        decay = settings.weight_decay if p.ndim > 1 else 0.0
        return p - rate * (direction + decay * p)

    return mapped(moved, params, first, second), Moments(np.array(count, np.int32), first, second)
