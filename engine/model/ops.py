"""Chooses the layers and products for the backend: shaped by hand for a CPU, as on paper elsewhere."""

from types import ModuleType

from engine.model import backend, backward, layers


def ops() -> ModuleType:
    """Returns `backward` on a CPU, else `layers`: two modules with the same functions."""
    return backward if backend.on_cpu() else layers
