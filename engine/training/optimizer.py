"""The optimizer as a literal optax chain: AdamW on everything, or Muon on the matrices inside blocks.

A schedule is a function of progress: the share of the run's steps or seconds that is done, 0 to 1.
Progress is an argument of the step, which reads no clock, and so of `update`. Muon's `dtype` is
another argument of `update`.
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
from jax.typing import DTypeLike

from engine.errors import UserError
from engine.mesh import layout
from engine.model.config import ModelConfig
from engine.model.layers import dot32, einsum32
from engine.model.ops import transpose
from engine.model.paths import map_paths
from engine.model.weights.lora import LoRA

Kind = Literal["adamw", "muon"]
Schedule = Callable[[Array], Array]

# The leaves that Muon updates. An adapter at such a path is left to AdamW: only the product of its
# pair stands for a matrix. Weight decay pulls the adapted weight towards its base.
MUON_PATHS = r"blocks/\d+/(q|k|v|out|gate|up|down)"
UNDECAYED = r".*(norm|bias)"  # gains and biases


# The largest value of each setting that may be above 1.
MOST = {
    "learning_rate": 10.0,
    "matrix_learning_rate": 10.0,
    "weight_decay": 10.0,
    "embedding_factor": 1000.0,
    "head_factor": 1000.0,
    "clip": math.inf,
}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer's settings. Raises UserError for a value out of range."""

    kind: Kind = "adamw"
    learning_rate: float = 1e-3  # AdamW's
    matrix_learning_rate: float = 0.02  # Muon's, per unit of spectral norm
    # Factors on AdamW's learning rate. The two leaves differ: a row of the embedding has a gradient
    # only where its token is read, a column of the head has one at each token.
    embedding_factor: float = 1.0
    head_factor: float = 1.0
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup: float = 0.02  # share of the run in which the rate rises
    decay: float = 0.5  # share in which it falls, with wsd
    final: float = 0.0  # factor on the rate at the end
    beta1: float = 0.9  # of AdamW's mean gradient
    beta2: float = 0.95  # of its mean square
    momentum: float = 0.95  # Muon's
    weight_decay: float = 0.1
    clip: float = 1.0  # largest norm of the gradient

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name in ("kind", "schedule"):
                continue
            most = MOST.get(name, 1.0)
            if not 0 <= value <= most:
                raise UserError(f"{name} must lie between 0 and {most:g}, not {value!r}.")
        if self.clip == 0:
            raise UserError(
                "clip must be above 0: a gradient clipped to norm 0 teaches nothing. "
                "Give inf for no clipping."
            )
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise UserError(f"warmup {self.warmup} and decay {self.decay} together are longer than the run.")


def make_schedule(cfg: OptimizerConfig) -> Schedule:
    """Returns the schedule, progress () in [0, 1] -> the factor on the learning rate.

    `cosine`: linear warm-up, then half a cosine down to `final` (Loshchilov & Hutter 2016, equation
    5). `wsd`: warm-up, stable, then linear to `final` over the last `decay` of the run (Hu et al.
    2024, section 4).
    """

    def factor(progress: Array) -> Array:
        warm: Array | float = 1.0
        if cfg.warmup:
            warm = jnp.minimum(progress / cfg.warmup, 1.0)
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
        return optax.tree.scale(schedule(progress), updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def clip_by_norm(most: float) -> optax.GradientTransformation:
    """Scales updates down to a global norm of `most`, as `optax.clip_by_global_norm` does, but by a
    multiplication of each number instead of a division.

    XLA does not repeat a division in each loop that needs its result. It would store all the
    divided numbers in memory, and what is computed from them.
    """

    def clip(updates: Any, _: Any) -> Any:
        factor = jnp.minimum(1.0, most / optax.tree.norm(updates))
        return optax.tree.scale(factor, updates)

    return optax.stateless(clip)


def descend_by_path(cfg: OptimizerConfig) -> optax.GradientTransformation:
    """Multiplies updates by minus AdamW's learning rate, and by the factors of the embedding and of
    the head.
    """
    factors = {"embed": cfg.embedding_factor, "head": cfg.head_factor}

    def scale(path: str, update: Any) -> Any:
        return optax.tree.scale(-cfg.learning_rate * factors.get(path, 1.0), update)

    def descend(updates: Any, _: Any) -> Any:
        return map_paths(scale, updates)

    return optax.stateless(descend)


@functools.cache
def make_optimizer(cfg: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """Returns the chain for `cfg`, one object for each, so that a compiled step is found again."""

    def is_decayed(path: str, _: Any) -> bool:
        return not re.fullmatch(UNDECAYED, path)

    def label(path: str, leaf: Any) -> str:
        if cfg.kind == "muon" and re.fullmatch(MUON_PATHS, path) and not isinstance(leaf, LoRA):
            return "muon"
        return "adamw"

    decay = optax.add_decayed_weights(cfg.weight_decay, mask=functools.partial(map_paths, is_decayed))
    adamw = optax.chain(optax.scale_by_adam(cfg.beta1, cfg.beta2), decay, descend_by_path(cfg))
    momentum = optax.trace(cfg.momentum, nesterov=True)
    muon = optax.chain(momentum, orthogonalize(), decay, optax.scale(-cfg.matrix_learning_rate))
    clip = optax.identity()
    if cfg.clip != math.inf:
        clip = clip_by_norm(cfg.clip)
    return optax.chain(
        clip,
        optax.partition({"adamw": adamw, "muon": muon}, functools.partial(map_paths, label)),
        scale_by_progress(make_schedule(cfg)),
    )


# Muon: momentum replaced by the nearest orthogonal matrix (Jordan et al. 2024,
# kellerjordan.github.io/posts/muon).
#
# The method is Newton-Schulz on the Gram matrix (Zhang et al. 2026,
# dao-lab.ai/blog/2026/gram-newton-schulz) with the polynomials of the Polar Express (Amsel et al.
# 2025, 2505.16932). The matrix is first divided by a closer bound than the Frobenius norm. This takes
# 0.44 of the time of Jordan's five steps, which `optax.contrib.muon` takes, and comes as near. Two
# things optax's iteration does not do: on a CPU each product reads its operands along the last axis,
# and a mesh deals the matrices out.

# Each (a, b, c) is an odd polynomial a s + b s^3 + c s^5 of a singular value s: the one nearest to 1
# on the interval to which those before it take [0.003, 1]. It is divided by 1.02, which keeps its
# results below the end of the next one's interval: a value beyond that would grow without bound. The
# last one is scaled so that a learning rate means what it does with Jordan's steps. Together they
# take [0.003, 1] to 0.73 .. 1.14.
POLYNOMIALS = (
    (8.2193, -24.2803, 17.9971),
    (3.9690, -2.9573, 0.5593),
    (3.4626, -2.5991, 0.5198),
    (2.3809, -1.7701, 0.4200),
)
SECOND_BEGINS = 1.936  # the largest value that the first polynomial makes of [0, 1]
# Long over short side, below which the polynomials multiply the matrix itself and not its Gram matrix:
# that costs as little there, and is more exact.
NEARLY_SQUARE = 1.5


def orthogonalize() -> optax.GradientTransformationExtraArgs:
    """Replaces each matrix (in, out) by `orthogonal` of it in `dtype`, an argument of `update`.

    `dtype` is the model's compute type. The iteration amplifies rounding: with bfloat16 it would show
    in a float32 run.
    """

    def update(
        updates: Any, state: Any, params: Any = None, *, dtype: DTypeLike = "float32", **_: Any
    ) -> tuple[Any, Any]:
        # Traced once for all matrices of one shape.
        traced_once = jax.jit(functools.partial(orthogonal, dtype=dtype), inline=True)
        return layout.map_whole_matrices(traced_once, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def orthogonal(matrix: Array, dtype: DTypeLike) -> Array:
    """matrix (in, out) float32 -> roughly its nearest orthogonal matrix times sqrt(max(1, out /
    in)), float32.

    The nearest is U V^T of the singular value decomposition; here singular values are about 0.73 to
    1.14 before the factor, less for those that were below 0.003 (nearly square) or 0.013 of the
    bound on the largest. All products are in `dtype`.
    """
    rows, columns = matrix.shape
    tall = rows > columns
    nearly_square = max(rows, columns) < NEARLY_SQUARE * min(rows, columns)
    x = matrix.astype(dtype)
    wide = transpose(x) if tall else x
    gram = _gram(wide)
    # The bound is (sum of s^8)^(1/8). First s^2 summed to 1, or the eighth powers could overflow.
    total = jnp.trace(gram) + 1e-16
    gram = (gram / total).astype(dtype)  # rounded once: it then commutes with its polynomials
    square = dot32(gram, gram)
    largest = jnp.sqrt(1.01 * jnp.linalg.norm(square)) + 1e-16  # bounds the eigenvalues of gram
    unit = (1.0 if nearly_square else SECOND_BEGINS**2) / largest
    scale = (unit / total) ** 0.5
    factor = max(1.0, columns / rows) ** 0.5
    if nearly_square:
        wide = _step_matrix((wide * scale).astype(dtype), gram, square, unit)
        return factor * (transpose(wide) if tall else wide).astype(jnp.float32)
    root = (_inverse_root(gram, square, unit) * (factor * scale)).astype(dtype)
    return dot32(x, root) if tall else dot32(root, x)


def _gram(x: Array) -> Array:
    return einsum32("ij,kj->ik", x, x)


def _polynomial(
    coefficients: tuple[float, float, float], gram: Array, square: Array, unit: Array | float = 1.0
) -> Array:
    """Returns a I + b unit gram + c unit^2 square, in gram's dtype, by which a step multiplies.
    `square` is gram's, float32.
    """
    a, b, c = coefficients
    polynomial = a * jnp.eye(len(gram)) + b * unit * gram.astype(jnp.float32) + c * unit**2 * square
    return polynomial.astype(gram.dtype)


def _step_matrix(x: Array, gram: Array, square: Array, unit: Array) -> Array:
    """x (M, N), its Gram matrix over `unit` and the square of that -> x after all steps."""
    x = jnp.dot(_polynomial(POLYNOMIALS[0], gram, square, unit), x)
    for coefficients in POLYNOMIALS[1:]:
        gram = _gram(x).astype(x.dtype)
        x = jnp.dot(_polynomial(coefficients, gram, dot32(gram, gram)), x)
    return x


def _inverse_root(gram: Array, square: Array, unit: Array) -> Array:
    """gram (M, M), its square -> about (unit gram)^(-1/2), by all steps but the first.

    In bfloat16 a Gram matrix does not tell singular values below 0.05 of the largest from 0; with
    so few steps that does no harm.
    """
    factor = _polynomial(POLYNOMIALS[1], gram, square, unit)
    root = factor
    for coefficients in POLYNOMIALS[2:]:
        gram = (unit * dot32(jnp.dot(gram, factor), factor)).astype(gram.dtype)
        unit = jnp.ones(())
        factor = _polynomial(coefficients, gram, dot32(gram, gram))
        root = jnp.dot(root, factor)
    return root


def optimizer_flops(cfg: ModelConfig, kind: Kind) -> int:
    """Returns the FLOPs of an optimizer's products in **a step**: AdamW has none. Beside products,
    its sums are few.
    """
    if kind == "muon":
        return muon_flops(cfg)
    return 0


def muon_flops(cfg: ModelConfig) -> int:
    """Returns the FLOPs of Muon's products in **a step**, of all matrices in blocks: exactly those
    of `orthogonal`.

    A nearly square one has four products for its Gram matrix, four squares of that, and four
    products with the matrix; a wide one two products with the matrix and nine of Gram matrices.
    """
    total = 0
    for shape in cfg.matrices.values():
        short, long = sorted(shape)
        pair = 4 * short * short * long  # the Gram matrix, and a product with the matrix
        square = 2 * short**3
        if long < NEARLY_SQUARE * short:
            total += 4 * pair + 4 * square
        else:
            total += pair + 9 * square
    return cfg.layers * total
