"""Muon: momentum replaced by the nearest orthogonal matrix (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

Newton-Schulz on the Gram matrix (Zhang et al. 2026, dao-lab.ai/blog/2026/gram-newton-schulz) with the polynomials of the
Polar Express (Amsel et al. 2025, 2505.16932), after a division by a closer bound than the Frobenius norm: 0.44 of the time of
Jordan's five steps, which `optax.contrib.muon` takes, and as near. On a CPU each product reads its operands along the last
axis, and a mesh deals the matrices out: optax's iteration does neither.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import DTypeLike

from engine.counting.flops import NEARLY_SQUARE
from engine.mesh import layout
from engine.model.layers import dot32, einsum32
from engine.model.ops import transpose

# Each (a, b, c) is the odd polynomial a s + b s^3 + c s^5 nearest to 1 on what those before it make of [0.003, 1], over 1.02,
# as a value above the interval would grow without bound. The last is scaled so that a learning rate means what it does with
# Jordan's steps. Together they take [0.003, 1] to 0.73 .. 1.14.
STEPS = ((8.2193, -24.2803, 17.9971), (3.9690, -2.9573, 0.5593), (3.4626, -2.5991, 0.5198), (2.3809, -1.7701, 0.4200))
SECOND_BEGINS = 1.936  # the largest that the first makes of [0, 1]


def orthogonalize() -> optax.GradientTransformationExtraArgs:
    """Replaces each matrix (in, out) by `orthogonal` of it in `dtype`, an argument of `update`.

    That is the model's compute type: the iteration amplifies last bits, in bfloat16 until they show in a float32 run.
    """

    def update(updates: Any, state: Any, params: Any = None, *, dtype: DTypeLike = "float32", **_: Any) -> tuple[Any, Any]:
        traced_once = jax.jit(lambda matrix: orthogonal(matrix, dtype), inline=True)  # for the matrices of a shape
        return layout.map_whole_matrices(traced_once, updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def orthogonal(matrix: Array, dtype: DTypeLike) -> Array:
    """matrix (in, out) float32 -> roughly its nearest orthogonal matrix times sqrt(max(1, out / in)), float32.

    The nearest is U V^T of the singular value decomposition; here singular values are about 0.73 to 1.14 before the factor,
    less for those that were below 0.003 (nearly square) or 0.013 of the bound on the largest. All products are in `dtype`.
    """
    rows, columns = matrix.shape
    tall, nearly_square = rows > columns, max(rows, columns) < NEARLY_SQUARE * min(rows, columns)
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


def _polynomial(step: tuple[float, float, float], gram: Array, square: Array, unit: Array | float = 1.0) -> Array:
    """a I + b unit gram + c unit^2 square, in gram's dtype: a step multiplies by it. `square` is gram's, float32."""
    a, b, c = step
    polynomial = a * jnp.eye(len(gram)) + b * unit * gram.astype(jnp.float32) + c * unit**2 * square
    return polynomial.astype(gram.dtype)


def _step_matrix(x: Array, gram: Array, square: Array, unit: Array) -> Array:
    """x (M, N), its Gram matrix over `unit` and the square of that -> x after all steps."""
    x = jnp.dot(_polynomial(STEPS[0], gram, square, unit), x)
    for step in STEPS[1:]:
        gram = _gram(x).astype(x.dtype)
        x = jnp.dot(_polynomial(step, gram, dot32(gram, gram)), x)
    return x


def _inverse_root(gram: Array, square: Array, unit: Array) -> Array:
    """gram (M, M), its square -> about (unit gram)^(-1/2), by all steps but the first.

    In bfloat16 a Gram matrix does not tell singular values below 0.05 of the largest from 0; with so few steps that does no
    harm.
    """
    root = by = _polynomial(STEPS[1], gram, square, unit)
    for step in STEPS[2:]:
        gram = (unit * dot32(jnp.dot(gram, by), by)).astype(gram.dtype)
        unit = jnp.ones(())
        by = _polynomial(step, gram, dot32(gram, gram))
        root = jnp.dot(root, by)
    return root
