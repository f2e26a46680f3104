"""Quantization of weights to int8 for inference: which leaves, by rules on their paths, and the error of each."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from engine.model.paths import leaf_paths
from engine.model.transformer import Params
from engine.model.weights.int8 import Activations, Int8, dequantize, quantize_leaves

Rule = tuple[str, Activations | None]


class RoundTrip(NamedTuple):
    """The rounding error of a leaf: root mean square of the change over that of the weights, and the largest change in steps
    of its column, which is never above 0.5."""

    relative: float
    worst: float


def every_product(params: Params, activations: Activations = "int8") -> tuple[Rule, ...]:
    """Returns rules for every matrix of a product: those of the blocks and the head, which in a tied model is the embedding.

    A lookup table of its own stays: one row of it is read a token, whatever its size. The input of `down` has a few
    numbers far above the rest, so with "int8" it gets two digits: SmolLM2 then loses 0.6% in bits per byte, not 1.1%.
    """
    return (
        (r"blocks/\d+/down", "int16" if activations == "int8" else activations),
        (r"blocks/\d+/(qkv|out|gate_up)", activations),
        ("head" if "head" in params else "embed", activations),
    )


def quantize(params: Params, rules: Sequence[Rule] | None = None, report: Callable[[int, int], None] | None = None) -> Params:
    """Returns params with Int8 leaves where a rule says so (by default `every_product`); the first match wins.

    A rule is (pattern on the path, "int8" | "int16" | "full" | None); see `weights/int8.py`. Adapters are folded
    before. `report(done, total)` counts leaves. Raises UserError for a rule that matches nothing or no matrix.
    """
    return quantize_leaves(params, every_product(params) if rules is None else rules, report)


def round_trips(before: Params, after: Params) -> dict[str, RoundTrip]:
    """Measures the error of each Int8 leaf of `after` against the same leaf of `before`."""
    wide = leaf_paths(before)
    return {path: _round_trip(wide[path], leaf) for path, leaf in leaf_paths(after).items() if isinstance(leaf, Int8)}


def _round_trip(weight: Any, leaf: Int8) -> RoundTrip:
    relative, worst = _errors(weight, leaf)
    return RoundTrip(float(relative), float(worst))


@jax.jit
def _errors(weight: Any, leaf: Int8) -> tuple[Any, Any]:
    weight = weight.astype(jnp.float32)
    change = jnp.abs(dequantize(leaf) - weight)
    size = jnp.sqrt((weight**2).mean())
    steps = change / jnp.expand_dims(jnp.where(leaf.scale == 0, 1, leaf.scale), 1 - leaf.axis)
    return jnp.sqrt((change**2).mean()) / jnp.where(size == 0, 1, size), steps.max()
