"""The Flax model and its training step in float64, which nothing but a comparison needs."""

import contextlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engine.by_hand.model import tree_map
from engine.model.config import ModelConfig
from engine.text.batch import Batch
from tests.tiny import FAMILY, T, lively_params, positions_of, tokens_of

QWEN3, QWEN2 = FAMILY["qwen3"], FAMILY["qwen2"]


def batch_of(seed: int, rows: int = 2) -> Batch:
    """Pairs of rows of packed texts at places of their own, of which not all targets count."""
    rng = np.random.default_rng(seed)
    positions = positions_of(rows, T) + rng.integers(0, 90, (rows, 1)).astype(np.int32)
    mask = rng.random((rows, T)) < 0.7
    mask[0, 0] = True
    segments = np.tile(np.array([[0, 0, 0, 1, 1, 1, 1], [2, 2, 5, 5, 5, 6, 6]], np.int32), (rows // 2, 1))
    return Batch(tokens_of(seed, rows, T), tokens_of(seed + 1, rows, T), mask, positions, segments)


@contextlib.contextmanager
def float64_engine() -> Iterator[None]:
    """Within the block the engine's own code, as it stands, computes in float64 wherever it says
    float32.
    """
    import engine.inference.decode
    import engine.training.step  # noqa: F401

    wide = types.SimpleNamespace(**vars(jnp))
    wide.float32 = jnp.float64
    modules = [
        m for name, m in sys.modules.items() if name.startswith("engine.") and getattr(m, "jnp", None) is jnp
    ]
    assert len(modules) > 5
    with jax.enable_x64(True):
        try:
            for module in modules:
                module.jnp = wide
            yield
        finally:
            for module in modules:
                module.jnp = jnp


def in_float64(cfg: ModelConfig) -> ModelConfig:
    """The config with a compute type that it would not let a person choose."""
    wide = ModelConfig(**cfg.__dict__)
    object.__setattr__(wide, "dtype", "float64")
    return wide


def weights(cfg: ModelConfig, seed: int = 0, dtype: str = "float64") -> Any:
    """Lively weights as NumPy arrays."""
    return tree_map(lambda leaf: np.asarray(leaf, dtype), lively_params(cfg, seed))


def assert_trees_close(actual: Any, expected: Any, rtol: float) -> None:
    """Leaf by leaf, each number to `rtol` of itself, and to a ten-thousandth of that of its leaf's
    largest.
    """
    from engine.model.paths import leaf_paths

    actual, expected = leaf_paths(actual), leaf_paths(expected)
    assert list(actual) == list(expected)
    for path, leaf in actual.items():
        other = np.asarray(expected[path])
        assert leaf.shape == other.shape, path
        np.testing.assert_allclose(
            leaf, other, rtol=rtol, atol=1e-4 * rtol * np.abs(other).max(), err_msg=path
        )
