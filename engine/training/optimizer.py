"""The optimizer as a literal optax chain: AdamW on everything, or Muon on the matrices inside blocks and AdamW on the rest.

A schedule is a function of progress, the share of the run that is done, 0 to 1: of its steps or of its seconds. It is an
argument of the step, which reads no clock; Muon's `dtype` is one of `update` too.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax import Array

from engine.errors import UserError
from engine.model.paths import map_paths
from engine.model.weights.lora import LoRA
from engine.training.muon import orthogonalize

Schedule = Callable[[Array], Array]

# The leaves that Muon updates; no adapter, of which only the product is a matrix. Decay pulls it to its base.
MUON_PATHS = r"blocks/\d+/(q|k|v|out|gate|up|down)"
UNDECAYED = r".*(norm|bias)"  # gains and biases


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer's settings. `learning_rate` is AdamW's, `matrix_learning_rate` Muon's, per unit of spectral norm.

    `embedding_factor` and `head_factor` multiply AdamW's for these two: a row of the embedding has a gradient only where its
    token is read, a column of the head at each token.
    Raises UserError for a value out of range.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3
    matrix_learning_rate: float = 0.02
    embedding_factor: float = 1.0
    head_factor: float = 1.0
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup: float = 0.02
    decay: float = 0.5
    final: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    momentum: float = 0.95
    weight_decay: float = 0.1
    clip: float = 1.0

    def __post_init__(self) -> None:
        most = dict.fromkeys(("learning_rate", "matrix_learning_rate", "weight_decay"), 10.0)
        most |= {"embedding_factor": 1000.0, "head_factor": 1000.0, "clip": math.inf}
        for name, value in vars(self).items():
            if name not in ("kind", "schedule") and not 0 <= value <= most.get(name, 1.0):
                raise UserError(f"{name} must lie between 0 and {most.get(name, 1.0):g}, not {value!r}.")
        if self.clip == 0:
            raise UserError("clip must be above 0: a gradient clipped to norm 0 teaches nothing. Give inf for no clipping.")
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise UserError(f"warmup {self.warmup} and decay {self.decay} together are longer than the run.")


def make_schedule(cfg: OptimizerConfig) -> Schedule:
    """Returns the schedule, progress () in [0, 1] -> the factor on the learning rate.

    `cosine`: linear warm-up, then half a cosine down to `final` (Loshchilov & Hutter 2016, equation 5). `wsd`: warm-up,
    stable, then linear to `final` over the last `decay` of the run (Hu et al. 2024, section 4).
    """

    def factor(progress: Array) -> Array:
        warm = jnp.minimum(progress / cfg.warmup, 1.0) if cfg.warmup else 1.0
        if cfg.schedule == "cosine":
            done = jnp.clip((progress - cfg.warmup) / max(1 - cfg.warmup, 1e-9), 0.0, 1.0)
            down = 0.5 * (1 + jnp.cos(jnp.pi * done))
        else:
            down = jnp.clip((1 - progress) / max(cfg.decay, 1e-9), 0.0, 1.0)
        return warm * (cfg.final + (1 - cfg.final) * down)

    return factor


def scale_by_progress(schedule: Schedule) -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by schedule(progress), where `progress` is an argument of `update`."""

    def update(updates: Any, state: Any, params: Any = None, *, progress: Array, **_: Any) -> tuple[Any, Any]:
        factor = schedule(progress)
        return jax.tree.map(lambda u: u * factor, updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def clip_by_norm(most: float) -> optax.GradientTransformation:
    """Scales updates down to a global norm of `most`, as `optax.clip_by_global_norm` does, without its division at each number.

    XLA would keep its result, and those that depend on it, rather than divide again in each loop over them.
    """

    def clip(updates: Any, _: Any) -> Any:
        factor = jnp.minimum(1.0, most / optax.tree.norm(updates))
        return jax.tree.map(lambda u: u * factor, updates)

    return optax.stateless(clip)


@functools.cache
def make_optimizer(cfg: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """Returns the chain for `cfg`, one object for each, so that a compiled step is found again."""
    is_decayed = lambda path, _: not re.fullmatch(UNDECAYED, path)
    is_matrix = lambda path, leaf: re.fullmatch(MUON_PATHS, path) and not isinstance(leaf, LoRA)
    label = lambda path, leaf: "muon" if cfg.kind == "muon" and is_matrix(path, leaf) else "adamw"
    decay = optax.add_decayed_weights(cfg.weight_decay, mask=functools.partial(map_paths, is_decayed))
    factors = {"embed": cfg.embedding_factor, "head": cfg.head_factor}
    by_rate = lambda path, update: jax.tree.map(lambda u: -cfg.learning_rate * factors.get(path, 1.0) * u, update)
    descend = optax.stateless(lambda updates, _: map_paths(by_rate, updates))
    adamw = optax.chain(optax.scale_by_adam(cfg.beta1, cfg.beta2), decay, descend)
    momentum = optax.trace(cfg.momentum, nesterov=True)
    muon = optax.chain(momentum, orthogonalize(), decay, optax.scale(-cfg.matrix_learning_rate))
    return optax.chain(
        clip_by_norm(cfg.clip) if cfg.clip != math.inf else optax.identity(),
        optax.partition({"adamw": adamw, "muon": muon}, functools.partial(map_paths, label)),
        scale_by_progress(make_schedule(cfg)),
    )
