"""Random weights by name: the same on every machine. NumPy only, so that torch's side can read it too."""

import zlib
from collections.abc import Mapping

import numpy as np

SEED = 7


def draw(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """{name: float32 array}: gains near one, everything else normal, so that no part of the model
    is without effect.
    """
    weights = {}
    for name, shape in shapes.items():
        noise = (
            np.random.default_rng([SEED, zlib.crc32(name.encode())])
            .standard_normal(tuple(shape))
            .astype(np.float32)
        )
        if name.endswith("norm.weight"):
            weights[name] = 1 + np.float32(0.3) * noise
        else:
            weights[name] = noise * np.float32(0.5 if len(shape) == 1 else 1.2 * shape[-1] ** -0.5)
    return weights
