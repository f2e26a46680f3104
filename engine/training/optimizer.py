"""The optimizer as a literal optax chain: AdamW on everything, or Muon on the matrices inside blocks and AdamW on the rest.

A schedule is a function of progress, the share of the run that is done, between 0 and 1. A run bounded by steps passes
step / steps, one bounded by time passes elapsed / allowed: the same chain serves both, and progress is an argument of the
step, not a clock it reads.
"""

import dataclasses
import functools
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

# What is a direction in weight space rather than a table or a gain: the matrices inside blocks. An adapter's thin pair at
# the same path is not: only its product is one. Its decay pulls the model back to its base.
MATRICES = r"blocks/\d+/(qkv|out|gate_up|down)"
# Gains and biases are not pulled towards zero.
UNDECAYED = r".*(norm|bias)"


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How weights move. `learning_rate` is AdamW's; `matrix_learning_rate` is Muon's, per unit of spectral norm."""

    kind: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3
    matrix_learning_rate: float = 0.02
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
        for name, low, high in (
            ("learning_rate", 0.0, 10.0), ("matrix_learning_rate", 0.0, 10.0), ("warmup", 0.0, 1.0), ("decay", 0.0, 1.0),
            ("final", 0.0, 1.0), ("beta1", 0.0, 1.0), ("beta2", 0.0, 1.0), ("momentum", 0.0, 1.0),
            ("weight_decay", 0.0, 10.0), ("clip", 0.0, float("inf")),
        ):  # fmt: skip
            value = getattr(self, name)
            if not low <= value <= high:
                raise UserError(f"{name} must lie between {low:g} and {high:g}, not {value!r}.")
        if self.clip == 0:
            raise UserError("clip must be above 0: a gradient clipped to norm 0 teaches nothing. Give inf for no clipping.")
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise UserError(f"warmup {self.warmup} and decay {self.decay} together are longer than the run.")


def make_schedule(cfg: OptimizerConfig) -> Schedule:
    """progress () in [0, 1] -> the factor on the learning rate.

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
    """Multiplies updates by schedule(progress), with `progress` given to `update` by the caller."""

    def update(updates: Any, state: Any, params: Any = None, *, progress: Array, **_: Any) -> tuple[Any, Any]:
        factor = schedule(progress)
        return jax.tree.map(lambda u: u * factor, updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


@functools.cache
def make_optimizer(cfg: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """The chain for `cfg`. What is decayed, and what Muon moves, is decided by path at `init`.

    One config gives one object, so that a compiled step that closes over it is found again.
    """
    decay = optax.add_decayed_weights(cfg.weight_decay, mask=functools.partial(_where, UNDECAYED, False, True))
    adamw = optax.chain(
        optax.scale_by_adam(cfg.beta1, cfg.beta2),
        decay,
        optax.scale(-cfg.learning_rate),
    )
    muon = optax.chain(
        optax.trace(cfg.momentum, nesterov=True),
        orthogonalize(),
        decay,
        optax.scale(-cfg.matrix_learning_rate),
    )
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip) if cfg.clip != float("inf") else optax.identity(),
        optax.partition({"adamw": adamw, "muon": muon}, functools.partial(_mover, cfg.kind)),
        scale_by_progress(make_schedule(cfg)),
    )


def _mover(kind: str, params: Any) -> Any:
    """A tree like params: by which of the two chains each leaf is moved."""

    def mover(path: str, leaf: Any) -> str:
        matrix = re.fullmatch(MATRICES, path) and not isinstance(leaf, LoRA)
        return "muon" if kind == "muon" and matrix else "adamw"

    return map_paths(mover, params)


def _where(pattern: str, inside: Any, outside: Any, params: Any) -> Any:
    """A tree like params: `inside` at paths the pattern matches whole, else `outside`."""
    return map_paths(lambda path, _: inside if re.fullmatch(pattern, path) else outside, params)
