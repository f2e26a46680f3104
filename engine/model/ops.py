"""Chooses the functions of the layers for the backend that JAX computes on."""

from types import ModuleType

from engine.model import backend, backward, layers


def ops() -> ModuleType:
    """Returns `backward` on a CPU, else `layers`: two modules with the same functions."""
    return backward if backend.on_cpu() else layers
