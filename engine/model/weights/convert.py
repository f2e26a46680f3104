"""Converts a model's weights: to another type, to blocks, or side by side for inference; names their types."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from engine.format import format_bytes
from engine.model.config import JOINED
from engine.model.paths import Params, leaf_paths, map_paths, unflatten
from engine.model.weights.block_layout import GROUP
from engine.model.weights.blocks import Blocks, Rounding, factors_to_train, round_to_blocks, served_kind
from engine.model.weights.plain import as_weight
from engine.model.weights.weight import Weight


def join_projections(block: Params) -> Params:
    """Returns a block for inference on one device, in which the weights of `JOINED` that are of one
    kind lie side by side.
    """
    for name, parts in JOINED.items():
        # none where they are joined already
        weights = [as_weight(block[part]) for part in parts if part in block]
        if len({type(weight) for weight in weights}) != 1:
            continue
        joined = weights[0].beside(weights[1:])
        if joined is not None:
            block = {path: leaf for path, leaf in block.items() if path not in parts} | {name: joined}
    return block


def cast_matrices(params: Params, dtype: DTypeLike) -> Params:
    """Returns params with every plain matrix in `dtype`, adapters too. Gains, biases, Int8, Blocks
    and Roundings stay.
    """
    return unflatten({path: as_weight(leaf).cast(dtype) for path, leaf in leaf_paths(params).items()})


def matrices_to_blocks(params: Params, kind: str = "Q4_0") -> Params:
    """Returns params with every matrix rounded to the `served_kind` of it, after its adapters are
    merged in float32.

    Blocks stay, and so does a matrix whose inputs are no multiple of 32.
    """

    def convert(path: str, leaf: Any) -> Any:
        rounding = _rounding(path, leaf, kind)
        if rounding is None or isinstance(leaf, Blocks):
            return leaf
        return round_to_blocks(as_weight(leaf).dense(jnp.float32), rounding.kind, rounding.axis)

    return map_paths(convert, params)


def round_while_training(trainable: Params, frozen: Params) -> tuple[Params, Params]:
    """Returns what trains, of Blocks the factors, and frozen weights: merged they are the numbers
    of `matrices_to_blocks`.
    """
    trained: dict[str, Any] = {}
    forms = {path: as_weight(leaf).dense() for path, leaf in leaf_paths(matrices_to_blocks(frozen)).items()}
    for path, leaf in leaf_paths(trainable).items():
        if isinstance(leaf, Blocks):
            trained[path] = factors_to_train(leaf)
            forms[path] = leaf
            continue
        trained[path] = leaf
        rounding = _rounding(path, leaf)
        if rounding is not None:
            forms[path] = rounding
    return unflatten(trained), unflatten(forms)


def _rounding(path: str, leaf: Any, kind: str = "Q4_0") -> Rounding | None:
    """Returns how a matrix is rounded to blocks; None for gains, and where a column's inputs are no
    whole number of blocks.
    """
    axis = int(path != "embed")
    if len(leaf.shape) != 2 or leaf.shape[1 - axis] % GROUP:
        return None
    return Rounding(served_kind(path, kind), axis)


def weight_types(params: Params) -> str:
    """Returns the types of a model's matrices: `Q4_1, Q8_0` as in its file, int8, both, or else a dtype."""
    leaves = leaf_paths(params).values()
    kinds = {leaf.kind for leaf in leaves if isinstance(leaf, Weight)}
    if kinds:
        return ", ".join(sorted(kinds))
    return str(max(leaves, key=lambda leaf: leaf.ndim).dtype)


def describe_weights(params: Params) -> str:
    """Returns the types of a model's matrices and the bytes of all its weights: `Q4_1, Q8_0, 91.2 MB`.
    params: arrays, or shapes in their place.
    """
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    return f"{weight_types(params)}, {format_bytes(size)}"
