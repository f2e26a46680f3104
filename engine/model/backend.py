"""Whether JAX computes on a CPU, by which `ops` chooses `backward.py` or `layers.py`."""

import jax


def on_cpu() -> bool:
    """True when JAX computes on the CPU, where the hand-shaped products of `backward.py` are worth their length."""
    return jax.default_backend() == "cpu"
