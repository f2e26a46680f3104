"""Weight: what a matrix of a model can do, however its numbers are kept. A plain matrix stays an Array: `plain.py`.

A kind of weight is a frozen dataclass, registered as a pytree, that does five things: it has a
shape, `kind` names the type of its numbers, `dense` returns its matrix, `times` multiplies by it,
and `cast` changes the type of its plain numbers. The other methods are for what a kind does in a way
of its own, and say what it does otherwise. jit, scan, the sharding rules, digests and checkpoints see
the arrays of a weight by the names of its fields, below the path of the matrix: blocks/0/q/values.
"""

import abc
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike


class Weight(abc.ABC):
    """A matrix (in, out), or an embedding (V, D), by whose transpose a tied head multiplies."""

    rows_differ = False  # whether each row of a batch has a matrix of its own
    # whether a product must hold `merged` back: XLA would make the matrices of all layers first
    merges_late = False

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]: ...

    @property
    @abc.abstractmethod
    def kind(self) -> str:
        """The type of its numbers, for people: int8, Q4_0, bfloat16."""

    @abc.abstractmethod
    def dense(self, dtype: DTypeLike | None = None) -> Array:
        """Returns the matrix. Adapters are merged in `dtype`, by default that of their base; other
        kinds give float32.
        """

    @abc.abstractmethod
    def times(self, x: Array, dtype: DTypeLike) -> Array:
        """x (..., in) -> x times the matrix, (..., out) in `dtype`; of an embedding
        x (..., D) -> (..., V).
        """

    @abc.abstractmethod
    def cast(self, dtype: DTypeLike) -> Any:
        """Returns the weight with its plain matrices in `dtype`; integers and scales stay."""

    # As an embedding

    def lookup(self, tokens: Array) -> Array:
        """tokens (...) int32 -> those rows of an embedding (V, D), (..., D) float32."""
        return self.dense(jnp.float32)[tokens]

    # As a head, whose columns may be cut so that its logits exist a piece at a time

    def column_starts(self, size: int) -> list[int]:
        """Returns where pieces of `size` columns begin, each to be multiplied by itself; none where
        all are at once.
        """
        return []

    def column_piece(self, start: int, stop: int) -> "Weight":
        """Returns columns start..stop of the matrix that `times` multiplies by."""
        raise TypeError(f"The columns of {self.kind} are not cut.")

    def gradients(self, x: Array, g: Array) -> tuple[Array, Array | None]:
        """x (M, in), the gradient g (M, out) of its product in float32 -> the gradients of x and of
        the matrix, None where that is frozen. By default `times` is transposed.
        """
        (dx,) = jax.linear_transpose(lambda x: self.times(x, jnp.float32), x)(g)
        return dx, None

    # In training

    @property
    def can_be_merged(self) -> bool:
        """True if many rows may be multiplied by its `dense` matrix, in their own type, in place of
        `times`.
        """
        return True

    def merged(self, dtype: DTypeLike) -> Array:
        """Returns the matrix in `dtype`, in which many rows are multiplied by it."""
        return self.dense().astype(dtype)

    def on_mesh(self, path: str) -> Any:
        """Returns the weight at a path of the model as a step on a mesh reads it, gathered along `fsdp`."""
        return self

    def on(self, base: Any) -> "Weight":
        """Returns an adapter on a base. Raises ValueError for what is no adapter, or does not fit."""
        raise ValueError(f"{self.kind} is no adapter, and lies on no other weight.")

    # In inference

    def fuses(self, x: Array) -> bool:
        """Returns whether one call of a kernel multiplies x (B, T, in) together with the norm or
        SwiGLU before it.
        """
        return False

    def times_fused(
        self,
        x: Array,
        dtype: DTypeLike,
        gain: Array | None = None,
        eps: float = 0.0,
        pairs: tuple[Any, ...] = (),
    ) -> Array:
        """As `times`, where `fuses` says so. With a gain (in,) it normalises x (..., in) first; of
        x (..., 2 in), gates and values beside them, it takes the SwiGLU. pairs: of adapters,
        `StackedLoRA.pairs`.
        """
        raise TypeError(f"No kernel multiplies by {self.kind}.")

    def beside(self, others: Sequence[Any]) -> Any:
        """Returns this weight and others of its class, of the same input, side by side; None where
        they do not join.
        """
        return None

    def for_cpu(self) -> Any:
        """Returns the weight laid out in memory as a CPU that holds it whole reads it best; its bits stay."""
        return self


class TrainingForm(abc.ABC):
    """Stands among the frozen weights at a path that trains: says what weight the numbers are that
    train there.
    """

    @abc.abstractmethod
    def weight_of(self, trained: Array) -> Array:
        """Returns the matrix that a step reads, float32."""

    @abc.abstractmethod
    def cast(self, dtype: DTypeLike) -> Any: ...
