"""LoRA: a frozen base weight plus the product of two thin trained matrices, a b (Hu et al. 2021, 2106.09685).

Where a matrix holds several parts side by side (q, k, v), each adapted part has its own pair. All a lie side by side,
and all b, so all pairs read x in one product.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from engine.model.paths import Params, map_paths
from engine.model.weights.int8 import Int8, dequantize


class LoraPart(NamedTuple):
    """The pair that adds scale * a b to columns start..stop of the base."""

    start: int
    stop: int
    a: Array  # (in, R)
    b: Array  # (R, stop - start)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["base", "a", "b"], meta_fields=["scale", "columns", "groups"])
@dataclasses.dataclass(frozen=True)
class LoRA:
    """The weight base + scale * a b: one wide a and one wide b for all P parts, and the `columns` of each part in the base.

    base (in, out): an Array, an Int8, another LoRA (adapters add up), or None for an adapter as it is trained and saved.
    a (in, R P) and b (R, widths of the parts). `columns`: each part's (start, stop), in order, apart; `parts` cuts them.
    On a `tensor` axis base and b hold their columns in `groups` (`engine/mesh/layout.py`); `over_groups` reads them.
    """

    base: Any
    a: Array
    b: Array
    scale: float
    columns: tuple[tuple[int, int], ...]
    groups: int = 1

    def on(self, base: Any) -> "LoRA":
        """Returns this adapter, which has no base yet, on a base. Raises ValueError when it has one, or shapes do not fit."""
        fits = len(base.shape) == 2 and self.a.shape[0] == base.shape[0] and self.columns[-1][1] <= base.shape[1]
        if self.base is not None or not fits:
            raise ValueError(f"An adapter of {self.a.shape} on columns {self.columns} does not fit a base of {base.shape}.")
        return dataclasses.replace(self, base=base)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def rank(self) -> int:
        return self.b.shape[-2]

    def parts(self, first: int = 0, last: float = float("inf")) -> list[LoraPart]:
        """Returns the parts whose columns lie in first..last, counted from `first`."""
        parts, done = [], 0
        for place, (start, stop) in enumerate(self.columns):
            if first <= start and stop <= last:
                a = self.a[:, place * self.rank : (place + 1) * self.rank]
                parts.append(LoraPart(start - first, stop - first, a, self.b[:, done : done + stop - start]))
            done += stop - start
        return parts


def make_adapter(key: Array, rows: int, columns: Sequence[tuple[int, int]], rank: int, alpha: float) -> LoRA:
    """Makes an adapter that adds nothing yet: a normal with variance 1 / rows, b zero; scale alpha / rank."""
    columns = tuple(sorted(columns))
    a = jax.random.normal(key, (rows, rank * len(columns))) * rows**-0.5
    b = jnp.zeros((rank, sum(stop - start for start, stop in columns)))
    return LoRA(None, a, b, alpha / rank, columns)


def over_groups(f: Callable[[LoRA], Any], weight: LoRA) -> Any:
    """Returns f(weight), whose last axes are columns, computed for each group of columns and joined."""
    if weight.groups == 1:
        return f(weight)
    results = jax.vmap(f, in_axes=(_group_axes(weight),), out_axes=-2)(_grouped(weight, weight.groups))
    return jax.tree.map(lambda x: x.reshape(*x.shape[:-2], -1), results)


def _grouped(weight: Any, groups: int) -> Any:
    if not isinstance(weight, LoRA):
        return jax.tree.map(lambda x: x.reshape(*x.shape[:-1], groups, -1), _in_group(weight))
    columns = tuple((start // groups, stop // groups) for start, stop in weight.columns)
    b = weight.b.reshape(len(weight.b), groups, -1)
    return dataclasses.replace(weight, base=_grouped(weight.base, groups), b=b, columns=columns, groups=1)


def _in_group(base: Any) -> Any:
    """Returns a base as one of its groups reads it, which no axis of a mesh cuts."""
    is_gathered = isinstance(base, Int8) and base.gathered is not None
    return dataclasses.replace(base, gathered=P()) if is_gathered else base


def _group_axes(weight: Any) -> Any:
    if not isinstance(weight, LoRA):
        return jax.tree.map(lambda x: x.ndim - 1, _in_group(weight))
    columns = tuple((start // weight.groups, stop // weight.groups) for start, stop in weight.columns)
    return LoRA(_group_axes(weight.base), None, 1, weight.scale, columns)  # type: ignore[arg-type]


def innermost_base(weight: Any) -> Any:
    """Returns the Array or Int8 below all adapters."""
    return innermost_base(weight.base) if isinstance(weight, LoRA) else weight


def to_dense(weight: Any) -> Array:
    """Returns a weight as one Array: Int8 dequantized to float32, adapters merged in their base's dtype."""
    if isinstance(weight, Int8):
        return dequantize(weight)
    if not isinstance(weight, LoRA):
        return weight
    if weight.groups > 1:
        return over_groups(to_dense, weight)
    base = to_dense(weight.base)
    merged = base.astype(jnp.float32)
    for start, stop, a, b in weight.parts():
        less = jnp.dot(a.astype(jnp.float32), b.astype(jnp.float32) * -weight.scale, precision=jax.lax.Precision.HIGHEST)
        # Subtracted, because x - 0 is x to the bit, while -0 + 0 is 0.
        merged = merged.at[:, start:stop].set(merged[:, start:stop] - less)
    return merged.astype(base.dtype)


def merge_lora(params: Params, dtype: DTypeLike | None = None) -> Params:
    """Returns params with every LoRA leaf as one matrix, in `dtype` or that of its base (float32 over an Int8).

    Logits are those of base and adapter up to rounding; params without adapters come back as they are.
    """

    def merge(_: str, leaf: Any) -> Any:
        if not isinstance(leaf, LoRA):
            return leaf
        merged = to_dense(leaf)
        # Cast at once: over int8 the matrices are float32, together four times the base.
        return merged if dtype is None else merged.astype(dtype)

    return map_paths(merge, params)
