"""Plain: a matrix that is an Array, with the methods of a Weight. `as_weight` makes one for a product; trees hold the Array."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from engine.model import backward
from engine.model.ops import over_rows
from engine.model.weights.weight import TrainingForm, Weight


@dataclasses.dataclass(frozen=True)
class Plain(Weight):
    """A matrix (in, out) or, with `axis` 0, an embedding (V, D). It is float32 where it trains,
    else in the compute dtype.
    """

    array: Any
    axis: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def kind(self) -> str:
        return str(self.array.dtype)

    def dense(self, dtype: DTypeLike | None = None) -> Array:
        return self.array

    def times(self, x: Array, dtype: DTypeLike) -> Array:
        multiply = backward.matmul if self.axis else backward.matmul_rows
        return over_rows(x, lambda rows: multiply(rows, self.array, dtype))

    def cast(self, dtype: DTypeLike) -> Array:
        """Gains and biases stay."""
        if self.array.ndim < 2:
            return self.array
        return self.array.astype(dtype)

    def lookup(self, tokens: Array) -> Array:
        return backward.lookup(self.array, tokens).astype(jnp.float32)

    def gradients(self, x: Array, g: Array) -> tuple[Array, Array]:
        rule = backward.matmul_backward if self.axis else backward.matmul_rows_backward
        return rule(jnp.float32, (x, self.array), g)

    def on_mesh(self, path: str) -> Array:
        return self.array

    def beside(self, others: Sequence["Plain"]) -> Any:
        arrays = [self.array, *(other.array for other in others)]
        if isinstance(self.array, np.ndarray):
            return np.concatenate(arrays, axis=-1)
        return jnp.concatenate(arrays, axis=-1)

    def for_cpu(self) -> Any:
        return self.array


def as_weight(leaf: Any, axis: int = 1) -> Any:
    """Returns a leaf of a model as a Weight; an Array as Plain, with `axis` 0 as an embedding."""
    if isinstance(leaf, Weight | TrainingForm):
        return leaf
    return Plain(leaf, axis)
