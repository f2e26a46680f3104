"""LoRA: a frozen base weight plus the product of two thin trained matrices, a b (Hu et al. 2021, 2106.09685).

Many rows are multiplied by the merged weight. Unmerged, the pair would cost every row two thin products and two passes over
results as wide as the base's: on a CPU half as much again as the base's own product. Merging costs R operations a weight. The
backward pass still needs no gradient of the whole matrix: with W = base + scale a b and y = x W,

    dx = g W^T,    da = x^T (g (scale b)^T),    db = (x a)^T (scale g).

W is rounded to x's dtype, as in full training. The backward pass merges again, in a hundredth of the time of the products:
all merged weights together would be a second model.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from engine.mesh import layout
from engine.model.backward import input_gradient
from engine.model.layers import dot32
from engine.model.ops import transpose
from engine.model.paths import Params, map_paths
from engine.model.weights.int8 import Int8, dequantize


@functools.partial(jax.tree_util.register_dataclass, data_fields=["base", "a", "b"], meta_fields=["scale"])
@dataclasses.dataclass(frozen=True)
class LoRA:
    """The weight base + scale * a b, with a (in, R) and b (R, out).

    base (in, out): an Array, an Int8, another LoRA (adapters add up), or None for an adapter as it is trained and saved.
    """

    base: Any
    a: Array
    b: Array
    scale: float

    def on(self, base: Any) -> "LoRA":
        """Returns this adapter, which has no base yet, on a base. Raises ValueError when it has one, or shapes do not fit."""
        if self.base is not None or tuple(base.shape) != self.shape:
            raise ValueError(f"An adapter of {self.shape} does not fit a base of {base.shape}.")
        return dataclasses.replace(self, base=base)

    @property
    def shape(self) -> tuple[int, int]:
        return self.a.shape[0], self.b.shape[1]

    @property
    def rank(self) -> int:
        return self.b.shape[0]


def make_adapter(key: Array, shape: tuple[int, int], rank: int, alpha: float) -> LoRA:
    """Makes an adapter of a matrix that adds nothing yet: a normal with variance 1 / in, b zero; scale alpha / rank."""
    rows, columns = shape
    return LoRA(None, jax.random.normal(key, (rows, rank)) * rows**-0.5, jnp.zeros((rank, columns)), alpha / rank)


def innermost_base(weight: Any) -> Any:
    """Returns the Array or Int8 below all adapters."""
    return innermost_base(weight.base) if isinstance(weight, LoRA) else weight


def to_dense(weight: Any) -> Array:
    """Returns a weight as one Array: Int8 dequantized to float32, adapters merged in their base's dtype."""
    if isinstance(weight, Int8):
        return dequantize(weight)
    if not isinstance(weight, LoRA):
        return weight
    base, b = to_dense(weight.base), weight.b.astype(jnp.float32) * -weight.scale
    # Subtracted, because x - 0 is x to the bit, while -0 + 0 is 0: an adapter whose b is 0 changes nothing.
    less = jnp.dot(weight.a.astype(jnp.float32), b, precision=jax.lax.Precision.HIGHEST)
    return (base.astype(jnp.float32) - less).astype(base.dtype)


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def merged_matmul(x: Array, weights: tuple[Array | Int8 | LoRA, ...], dtype: DTypeLike) -> tuple[Array, ...]:
    """x (M, in) -> x times each weight, adapters merged, in `dtype`.

    Gradients are those of x, of the pairs and of plain weights. An Int8, and what lies under a pair, is frozen and gets none.
    """
    return _forward(x, weights, dtype)[0]


def _merge(weight: Array | Int8 | LoRA, dtype: DTypeLike) -> Array:
    """Returns the weight, base + scale a b added up in float32, in `dtype`."""
    if not isinstance(weight, LoRA):
        return to_dense(weight).astype(dtype)
    base = to_dense(weight.base)
    less = _dot(weight.a, (weight.b * -weight.scale).astype(dtype), dtype)  # subtracted as in `to_dense`
    return (base.astype(jnp.float32) - less.astype(jnp.float32)).astype(base.dtype).astype(dtype)


def _dot(x: Array, w: Array, dtype: DTypeLike) -> Array:
    return jnp.dot(x.astype(w.dtype), w, preferred_element_type=dtype)


def _after(weight: Array | Int8 | LoRA, other: Array) -> tuple[Array | Int8 | LoRA, Array]:
    """Returns both so that the weight is merged only once `other` is there. The pair, whole on every device, needs no barrier.

    One weight at a time: a barrier keeps all that goes through it, and where one weight has a pair the gradients of others may
    not be needed.
    """
    if isinstance(weight, LoRA):
        base, other = jax.lax.optimization_barrier((weight.base, other))
        return dataclasses.replace(weight, base=base), other
    return jax.lax.optimization_barrier((weight, other)) if isinstance(weight, Int8) else layout.regather(weight, other)


def _forward(x: Array, weights: tuple[Array | Int8 | LoRA, ...], dtype: DTypeLike):
    results, rows = [], x
    for weight in weights:
        if isinstance(innermost_base(weight), Int8):  # merged in turn, or all may be here in float32
            weight, rows = _after(weight, rows)
        results.append(_dot(rows, _merge(weight, x.dtype), dtype))
    return tuple(results), (rows, weights)


def _backward(dtype: DTypeLike, residuals: tuple[Array, tuple[Array | Int8 | LoRA, ...]], gs: tuple[Array, ...]):
    x, weights = residuals
    # Without the barrier XLA would keep what the forward pass merged.
    ordered, gs = zip(*(_after(weight, g.astype(x.dtype)) for weight, g in zip(weights, gs)))
    dx, x_transposed = input_gradient(gs, [_merge(weight, x.dtype) for weight in ordered]), transpose(x)
    pairs = [(weight, g) for weight, g in zip(weights, gs) if isinstance(weight, LoRA)]
    # All a side by side: x is read once for db, and once for da.
    ends = np.cumsum([weight.rank for weight, _ in pairs])[:-1].tolist()
    inner = jnp.split(transpose(_dot(x, jnp.concatenate([weight.a for weight, _ in pairs], 1).astype(x.dtype), x.dtype)), ends)
    thin = [
        jnp.einsum("mf,rf->mr", g, (weight.b * weight.scale).astype(x.dtype), preferred_element_type=x.dtype)
        for weight, g in pairs
    ]
    da = jnp.split(transpose(dot32(transpose(jnp.concatenate(thin, axis=1)), x)), ends, axis=1)
    db = [weight.scale * dot32(rows, g) for rows, (weight, g) in zip(inner, pairs)]
    of_pairs = iter(
        dataclasses.replace(weight, base=None, a=a.astype(weight.a.dtype), b=b.astype(weight.b.dtype))
        for (weight, _), a, b in zip(pairs, da, db)
    )
    gradients: list[Any] = []
    for weight, g in zip(weights, gs):
        if isinstance(weight, LoRA):
            gradients.append(next(of_pairs))
        else:  # an Int8 is frozen
            gradients.append(None if isinstance(weight, Int8) else dot32(x_transposed, g).astype(weight.dtype))
    return dx, tuple(gradients)


merged_matmul.defvjp(_forward, _backward)
