"""Chooses the functions of the layers for the backend that JAX computes on."""

from types import ModuleType

import jax

from engine.model import backward, layers


def on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def ops() -> ModuleType:
    """Returns `backward` on a CPU, else `layers`: two modules with the same functions."""
    return backward if on_cpu() else layers
