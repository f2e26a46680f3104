"""The one place that decides what differs by device: everything else asks here."""

import jax


def on_cpu() -> bool:
    """True when JAX computes on the CPU, where the hand-shaped products of `backward.py` are worth their length."""
    return jax.default_backend() == "cpu"
