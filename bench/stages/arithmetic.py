"""Checks whether this machine's XLA adds up: on a CPU some releases get a product with a constant wrong, in silence."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SHAPE = 5, 60, 60  # smaller ones come out right
EXPRESSION = "jit(sum(x @ full_like(x, 2.5), -1))"
TOLERANCE = 1e-4  # float32 agrees to 1e-6; garbage is memory that nobody wrote
ADVICE = (
    "In JAX code of your own, no product under jit may read a constant made beside it, such as ones or zeros: pass it as an "
    "argument, or through jax.lax.optimization_barrier."
)


def check_arithmetic() -> dict[str, Any]:
    """Returns "adds_up", "relative_error" (None for NaN) and a "sentence" on XLA in this process."""
    error = constant_product_error()
    adds_up, finite = error <= TOLERANCE, math.isfinite(error)
    case = f"{EXPRESSION} of {' x '.join(map(str, SHAPE))} random numbers"
    if adds_up:
        sentence = f"XLA adds up here: {case}, which some releases get wrong on CPUs, agrees with NumPy to {error:.0e}."
    else:
        off = f"off by {error:.0e} times its largest number" if finite else "not a number"
        sentence = f"XLA does not add up here: {case} is {off}. {ADVICE} Thrice's own programs hold no such product."
    return {"adds_up": adds_up, "relative_error": error if finite else None, "sentence": sentence}


def constant_product_error() -> float:
    """Returns the largest difference between XLA's and NumPy's EXPRESSION, as a share of the largest number."""
    x = np.random.default_rng(0).standard_normal(SHAPE, np.float32)
    expected = (x.astype(float) @ np.full(SHAPE, 2.5)).sum(-1)
    result = np.asarray(jax.jit(lambda x: jnp.sum(x @ jnp.full_like(x, 2.5), -1))(x), float)
    return float(np.abs(result - expected).max() / np.abs(expected).max())
