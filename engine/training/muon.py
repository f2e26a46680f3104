"""Muon: momentum replaced by the nearest orthogonal matrix (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

A test compares it with `optax.contrib.muon`, which runs in float32 on operands as they lie, and on a CPU costs more than
the step it improves. This one runs in the compute type, on wide matrices only, so that each product reads its operands along
the last axis.
"""

from typing import Any

import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import DTypeLike

from engine import sharding
from engine.model.ops import transpose


def orthogonalize() -> optax.GradientTransformationExtraArgs:
    """Replaces each matrix (in, out), a fused one as a whole, by `orthogonal` of it in `dtype`, an argument of `update`.

    That is the model's compute type: the iteration amplifies last bits, in bfloat16 until they show in a float32 run.
    """

    def update(updates: Any, state: Any, params: Any = None, *, dtype: DTypeLike = "float32", **_: Any) -> tuple[Any, Any]:
        return sharding.map_whole_matrices(lambda matrix: orthogonal(matrix, dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def orthogonal(matrix: Array, dtype: DTypeLike) -> Array:
    """matrix (in, out) float32 -> roughly its nearest orthogonal matrix times sqrt(max(1, out / in)), float32.

    The nearest is U V^T of the singular value decomposition; here singular values are about 0.7 to 1.2 before the factor.
    Five Newton-Schulz steps x <- a x + (b A + c A A) x with A = x x^T, all in `dtype`.
    """
    rows, columns = matrix.shape
    x = (matrix / (jnp.linalg.norm(matrix) + 1e-8)).astype(dtype)
    x = transpose(x) if rows > columns else x
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(5):
        gram = jnp.einsum("ij,kj->ik", x, x)
        mixed = (b * gram + c * jnp.dot(gram, gram)).astype(dtype)
        x = (a * x + jnp.dot(mixed, x)).astype(dtype)
    x = transpose(x) if rows > columns else x
    return x.astype(jnp.float32) * max(1.0, columns / rows) ** 0.5
