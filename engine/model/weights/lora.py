"""LoRA: a weight that stays, and a pair of thin matrices that learns what to add to it (Hu et al. 2021, 2106.09685).

Where a matrix holds several parts side by side (q, k, v), each adapted part has a pair of its own. The pairs' first
halves stand side by side in `a` and their second halves in `b`, so that all of them read x in one product, and a part
that is not adapted costs no number and no operation.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from engine.model.weights.int8 import Int8, dequantize


class LoraPart(NamedTuple):
    """What is added to columns start..stop of the base: scale * a b."""

    start: int
    stop: int
    a: Array  # (in, R)
    b: Array  # (R, stop - start)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["base", "a", "b"], meta_fields=["scale", "columns"])
@dataclasses.dataclass(frozen=True)
class LoRA:
    """The weight base + scale * a b, where the product of each part lies in its own columns.

    base (in, out): an Array, an Int8, another LoRA (adapters on one base add up), or None for an adapter on its own,
    which is what is trained and saved. a (in, R P) and b (R, widths of the P parts): the pairs side by side. `columns`
    are the parts' (start, stop) in the base, in order and apart.
    """

    base: Any
    a: Array
    b: Array
    scale: float
    columns: tuple[tuple[int, int], ...]

    def on(self, base: Any) -> "LoRA":
        """This adapter on a base. Raises ValueError when their shapes do not fit."""
        if (
            self.base is not None
            or len(base.shape) != 2
            or self.a.shape[0] != base.shape[0]
            or self.columns[-1][1] > base.shape[1]
        ):
            raise ValueError(f"An adapter of {self.a.shape} on columns {self.columns} does not fit a base of {base.shape}.")
        return dataclasses.replace(self, base=base)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the base, which an adapter on its own does not have."""
        return self.base.shape

    @property
    def size(self) -> int:
        return self.base.size

    @property
    def rank(self) -> int:
        return self.b.shape[-2]

    def parts(self) -> list[LoraPart]:
        """Each part's own a (in, R) and b (R, width)."""
        found, done = [], 0
        for place, (start, stop) in enumerate(self.columns):
            a = self.a[:, place * self.rank : (place + 1) * self.rank]
            found.append(LoraPart(start, stop, a, self.b[:, done : done + stop - start]))
            done += stop - start
        return found


def make_adapter(key: Array, rows: int, columns: Sequence[tuple[int, int]], rank: int, alpha: float) -> LoRA:
    """An adapter without a base that adds nothing yet: a normal with variance 1 / rows, b zero; scale alpha / rank."""
    columns = tuple(sorted(columns))
    a = jax.random.normal(key, (rows, rank * len(columns))) * rows**-0.5
    b = jnp.zeros((rank, sum(stop - start for start, stop in columns)))
    return LoRA(None, a, b, alpha / rank, columns)


def innermost_base(weight: Any) -> Any:
    """What lies below all adapters: an Array or an Int8."""
    return innermost_base(weight.base) if isinstance(weight, LoRA) else weight


def merge_weight(leaf: LoRA) -> Array:
    """base + scale * a b as one matrix in the base's dtype; float32 when the base is Int8."""
    base = leaf.base
    if isinstance(base, LoRA):
        base = merge_weight(base)
    base = dequantize(base) if isinstance(base, Int8) else base
    whole = base.astype(jnp.float32)
    for pair in leaf.parts():
        a, b = pair.a.astype(jnp.float32), pair.b.astype(jnp.float32)
        less = jnp.dot(a, b * -leaf.scale, precision=jax.lax.Precision.HIGHEST)
        # Subtracted, because x - 0 is x to the bit, while -0 + 0 is 0.
        whole = whole.at[:, pair.start : pair.stop].set(whole[:, pair.start : pair.stop] - less)
    return whole.astype(base.dtype)
