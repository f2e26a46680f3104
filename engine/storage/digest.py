"""Hashes a tree of weights to one SHA-256, to check that they never changed or are the same bits."""

import hashlib
import json
from typing import Any

import jax
import numpy as np

from engine.model.paths import array_paths
from engine.model.weights.lora import LoRA


def digest(params: Any, scales: bool = True) -> str:
    """Returns the SHA-256, in hex, over every leaf's path, dtype, shape and bytes, in path order.

    params: any pytree of arrays. The scale of a LoRA counts as one, in float32, unless `scales` is
    False: checkpoints hold none. Two trees have one digest exactly when they hold the same bits
    under the same names: -0.0 differs from 0.0, one NaN from another, float32 from bfloat16, (2, 3)
    from (3, 2). Raises TypeError for a leaf that is not an array of numbers.
    """
    hasher = hashlib.sha256()
    if scales:
        params = _with_scales(params)
    leaves = {tuple(path.split("/")): leaf for path, leaf in array_paths(params).items()}
    for path in sorted(leaves):
        leaf = leaves[path]
        if not hasattr(leaf, "dtype"):
            raise TypeError(f"digest: {'/'.join(path)} is a {type(leaf).__name__}, not an array.")
        host = np.asarray(leaf)
        if host.dtype.hasobject:
            raise TypeError(f"digest: {'/'.join(path)} holds Python objects, not numbers.")
        # JSON writes no two (path, dtype, shape) alike, and they say how many bytes follow.
        hasher.update(json.dumps([path, host.dtype.name, host.shape]).encode())
        hasher.update(host.ravel().view(np.uint8))
    return hasher.hexdigest()


def describe_digests(before: str, after: str) -> str:
    """Returns in words whether two digests of weights, in hex, are the same."""
    if before == after:
        return f"weights unchanged: SHA-256 {after[:16]} before and after"
    return f"weights CHANGED: SHA-256 {before[:16]} before and {after[:16]} after"


def _with_scales(params: Any) -> Any:
    return jax.tree.map(_with_scale, params, is_leaf=_is_lora)


def _with_scale(leaf: Any) -> Any:
    if not _is_lora(leaf):
        return leaf
    # In float32, in which a scale multiplies: alpha / rank misses 1 in 10 of rsLoRA's by a bit of
    # float64.
    return vars(leaf) | {"base": _with_scales(leaf.base), "scale": np.float32(leaf.scale)}


def _is_lora(node: Any) -> bool:
    return isinstance(node, LoRA)
