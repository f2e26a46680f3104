"""Hashes a tree of weights to one SHA-256, to check that they never changed or are the same bits."""

import hashlib
import json
from typing import Any

import numpy as np

from engine.model.paths import array_paths


def digest(params: Any) -> str:
    """Returns the SHA-256, in hex, over every leaf's path, dtype, shape and bytes, in path order.

    params: any pytree of arrays. Two trees have one digest exactly when they hold the same bits under the same names: -0.0
    differs from 0.0, one NaN from another, float32 from bfloat16, (2, 3) from (3, 2). Raises TypeError for a leaf that is not
    an array of numbers.
    """
    hasher = hashlib.sha256()
    leaves = {tuple(path.split("/")): leaf for path, leaf in array_paths(params).items()}
    for path, leaf in sorted(leaves.items(), key=lambda entry: entry[0]):
        if not hasattr(leaf, "dtype"):
            raise TypeError(f"digest: {'/'.join(path)} is a {type(leaf).__name__}, not an array.")
        host = np.asarray(leaf)
        if host.dtype.hasobject:
            raise TypeError(f"digest: {'/'.join(path)} holds Python objects, not numbers.")
        # JSON writes no two (path, dtype, shape) alike, and they say how many bytes follow.
        hasher.update(json.dumps([path, host.dtype.name, host.shape]).encode())
        hasher.update(host.ravel().view(np.uint8))
    return hasher.hexdigest()
