"""Tells whether JAX computes on a CPU."""

import jax


def on_cpu() -> bool:
    """Whether JAX computes on a CPU."""
    return jax.default_backend() == "cpu"
