"""Params as a nested dict of NumPy arrays: conversion, map, leaves."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy import ndarray

from engine.errors import UserError

Params = dict[str, Any]


def to_numpy(params: Any) -> Params:
    """Returns the tree with NumPy arrays as leaves; arrays in host memory are not copied.

    Raises UserError for a leaf that is not a plain array (an Int8 or a LoRA), or when the leaves are not all float32 or
    all float64.
    """

    def convert(path: str, leaf: Any) -> Any:
        if isinstance(leaf, dict):
            return {name: convert(f"{path}/{name}" if path else name, value) for name, value in leaf.items()}
        if isinstance(leaf, tuple) or not hasattr(leaf, "dtype"):
            raise UserError(
                f"{path} is a {type(leaf).__name__}; the by-hand model reads plain arrays. Fold adapters and give weights "
                "that are not quantized."
            )
        return np.asarray(leaf)

    tree = convert("", params)
    kinds = sorted({leaf.dtype.name for leaf in leaves(tree)})
    if kinds not in (["float32"], ["float64"]):
        raise UserError(f"The by-hand model computes in float32 or in float64, and these weights are {' and '.join(kinds)}.")
    return tree


def tree_map(f: Callable[..., Any], *trees: Any) -> Any:
    """Returns the tree of f(leaf of the first, leaf of the second, ...)."""
    if not isinstance(trees[0], dict):
        return f(*trees)
    return {name: tree_map(f, *(tree[name] for tree in trees)) for name in trees[0]}


def leaves(tree: Any) -> list[ndarray]:
    return [leaf for value in tree.values() for leaf in leaves(value)] if isinstance(tree, dict) else [tree]
