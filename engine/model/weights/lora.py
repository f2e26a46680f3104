"""LoRA: a frozen base weight plus the product of two thin trained matrices, a b (Hu et al. 2021, 2106.09685).

    adapters = init_lora(cfg, key, LoraConfig(rank=8, alpha=16, targets=("q", "v")))
    state = init_state(tx, adapters)                    # clipping, moments and checkpoints see the adapters alone
    state, _ = train_step(cfg, tx, state, params, ...)  # params: the base, plain or Int8, stays as it is
    plain = merge_lora(merge(state.trainable, params))

Several adapters on one base add up: `merge(second, merge(first, params))`. `matmul.py` multiplies
by them.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from engine.errors import UserError
from engine.mesh.rules import tensor_axes
from engine.model.config import LoraConfig, ModelConfig
from engine.model.paths import Params, map_paths, unflatten
from engine.model.weights.plain import Plain, as_weight
from engine.model.weights.weight import Weight


@functools.partial(jax.tree_util.register_dataclass, data_fields=["base", "a", "b"], meta_fields=["scale"])
@dataclasses.dataclass(frozen=True)
class LoRA(Weight):
    """The weight base + scale * a b, with a (in, R) and b (R, out).

    base (in, out): an Array, another weight, a LoRA too (adapters add up), or None for an adapter
    as it is trained and saved.
    """

    base: Any
    a: Array
    b: Array
    scale: float

    merges_late = True

    def on(self, base: Any) -> "LoRA":
        """Returns this adapter on a base. Raises ValueError when it has one, or shapes do not fit."""
        if self.base is not None or tuple(base.shape) != self.shape:
            raise ValueError(f"An adapter of {self.shape} does not fit a base of {base.shape}.")
        return dataclasses.replace(self, base=base)

    @property
    def shape(self) -> tuple[int, int]:
        return self.a.shape[0], self.b.shape[1]

    @property
    def rank(self) -> int:
        return self.b.shape[0]

    @property
    def kind(self) -> str:
        return as_weight(self.base).kind

    def dense(self, dtype: DTypeLike | None = None) -> Array:
        """Returns base + scale a b as exactly as it can be stored, for export and inference: the pair
        is multiplied in float32. In `dtype` or that of the base. A step's products use `merged`.
        """
        base = as_weight(self.base).dense(dtype)
        b = self.b.astype(jnp.float32) * -self.scale
        # The product is negative and is subtracted, because x - 0 is x to the bit, while -0 + 0 is 0:
        # an adapter whose b is 0 changes nothing.
        minus_ab = jnp.dot(self.a.astype(jnp.float32), b, precision=jax.lax.Precision.HIGHEST)
        return (base.astype(jnp.float32) - minus_ab).astype(dtype or base.dtype)

    def times(self, x: Array, dtype: DTypeLike) -> Array:
        """Returns x times the base, plus x a times scale b. The base gets no gradient. `matmul.project`
        multiplies many rows by the `merged` weight instead.
        """
        whole = as_weight(jax.lax.stop_gradient(self.base)).times(x, dtype)
        inner = Plain(self.a).times(x, x.dtype)
        return whole - Plain(self.b * -self.scale).times(inner, dtype)  # subtracted as in `dense`

    def cast(self, dtype: DTypeLike) -> "LoRA":
        base = self.base
        if base is not None:
            base = as_weight(base).cast(dtype)
        return dataclasses.replace(self, base=base, a=self.a.astype(dtype), b=self.b.astype(dtype))

    @property
    def can_be_merged(self) -> bool:
        return as_weight(self.base).can_be_merged

    def merged(self, dtype: DTypeLike) -> Array:
        """Returns base + scale a b as a training step needs it, which merges anew each time: unlike in
        `dense`, the pair is multiplied in `dtype`, the rows' own type, which is faster. The sum is
        made in float32 and returned in `dtype`.
        """
        base = as_weight(self.base).dense()
        b = (self.b * -self.scale).astype(dtype)
        # subtracted as in `dense`
        minus_ab = jnp.dot(self.a.astype(dtype), b, preferred_element_type=dtype)
        merged = base.astype(jnp.float32) - minus_ab.astype(jnp.float32)
        return merged.astype(base.dtype).astype(dtype)

    def on_mesh(self, path: str) -> "LoRA":
        """Returns the weight with its pair gathered along `fsdp`. If each product gathered the pair,
        XLA would exchange slices of it with the merged weights.
        """
        rows, columns = tensor_axes(path)
        a = jax.lax.with_sharding_constraint(self.a, P(rows, None))
        b = jax.lax.with_sharding_constraint(self.b, P(None, columns))
        return dataclasses.replace(self, a=a, b=b, base=as_weight(self.base).on_mesh(path))


def make_adapter(key: Array, shape: tuple[int, int], rank: int, alpha: float) -> LoRA:
    """Makes an adapter of a matrix that adds nothing yet: a normal with variance 1 / in, b zero;
    scale alpha / rank.
    """
    rows, columns = shape
    a = jax.random.normal(key, (rows, rank)) * rows**-0.5
    b = jnp.zeros((rank, columns))
    return LoRA(base=None, a=a, b=b, scale=alpha / rank)


def init_lora(cfg: ModelConfig, key: Array, lora: LoraConfig) -> Params:
    """Makes a model's adapters: at each adapted path a LoRA without a base, which adds nothing yet.

    Raises UserError for a rank that is not below an adapted matrix's own.
    """
    adapters: dict[str, LoRA] = {}
    for layer in range(cfg.layers):
        for name in lora.adapted_matrices:
            path = f"blocks/{layer}/{name}"
            shape = cfg.matrices[name]
            if lora.rank >= min(shape):
                raise UserError(
                    f"A LoRA rank for {path} must lie between 1 and {min(shape) - 1}, not {lora.rank}."
                )
            own_key = jax.random.fold_in(key, len(adapters))
            adapters[path] = make_adapter(own_key, shape, lora.rank, lora.alpha)
    return unflatten(adapters)


def innermost_base(weight: Any) -> Any:
    """Returns the weight below all adapters."""
    while isinstance(weight, LoRA):
        weight = weight.base
    return weight


def to_dense(weight: Any, dtype: DTypeLike | None = None) -> Array:
    """Returns a weight as one Array: an Array as it is, and of others what `Weight.dense` returns."""
    return as_weight(weight).dense(dtype)


def merge_lora(params: Params, dtype: DTypeLike | None = None) -> Params:
    """Returns params with every LoRA leaf as one matrix, in `dtype` or that of its base (float32
    over an Int8).

    Logits are those of base and adapter up to rounding; params without adapters come back as they
    are.
    """

    def merge(_: str, leaf: Any) -> Any:
        if not isinstance(leaf, LoRA):
            return leaf
        merged = leaf.dense()
        if dtype is None:
            return merged
        # Cast at once: over int8 the matrices are float32, together four times the base.
        return merged.astype(dtype)

    return map_paths(merge, params)


def gather_frozen(params: Params) -> Params:
    """Returns params with LoRA pairs gathered along `fsdp`, and Int8 bases marked so that each
    product gathers its own: both before XLA widens them. `tensor` still cuts them.

    Without a mesh it returns params as they are.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return params
    return map_paths(lambda path, leaf: as_weight(leaf).on_mesh(path), params)
