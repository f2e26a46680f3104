"""Params as a nested dict of NumPy arrays: taken in from anywhere, and mapped over."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy import ndarray

from engine.errors import UserError

Params = dict[str, Any]
DTYPES = ("float32", "float64")


def arrays(params: Any, dtype: str | None = None) -> Params:
    """The same tree with NumPy arrays as leaves; those already in memory are not copied. `dtype` casts them.

    Raises UserError for a leaf that is not a plain array (an Int8 or a LoRA), or when the leaves are not all float32 or
    all float64.
    """

    def plain(path: str, leaf: Any) -> ndarray:
        if isinstance(leaf, tuple) or not hasattr(leaf, "dtype"):
            raise UserError(
                f"{path} is a {type(leaf).__name__}; the by-hand model reads plain arrays. Fold adapters and give weights "
                "that are not quantized."
            )
        return np.asarray(leaf, dtype)

    tree = _with_paths(plain, params, "")
    kinds = sorted({leaf.dtype.name for leaf in leaves(tree)})
    if len(kinds) != 1 or kinds[0] not in DTYPES:
        raise UserError(f"The by-hand model computes in float32 or in float64, and these weights are {' and '.join(kinds)}.")
    return tree


def mapped(f: Callable[..., Any], *trees: Params) -> Params:
    """The tree of f(leaf of the first, leaf of the second, ...), all having one shape."""
    first, *others = trees
    return {
        name: mapped(f, value, *(other[name] for other in others))
        if isinstance(value, dict)
        else f(value, *(other[name] for other in others))
        for name, value in first.items()
    }


def leaves(tree: Params) -> list[ndarray]:
    """All arrays of a tree."""
    return [leaf for value in tree.values() for leaf in (leaves(value) if isinstance(value, dict) else [value])]


def _with_paths(f: Callable[[str, Any], Any], tree: Any, prefix: str) -> Any:
    if not isinstance(tree, dict):
        return f(prefix.rstrip("/"), tree)
    return {name: _with_paths(f, value, f"{prefix}{name}/") for name, value in tree.items()}
