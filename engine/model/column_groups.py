"""Columns of a matrix with several parts (q, k, v; gate, up), in groups that each hold their share of every part.

`engine/mesh/layout.py` says why: on a tensor axis a group is what one device multiplies by.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from engine.model.config import ModelConfig

# A parameter inside any tree, such as an optimizer's state, and one array of it: of an Int8 or of a LoRA pair.
LEAF = re.compile(r"(?:.*?/)??(?P<path>(?:blocks/\d+/)?\w+?)(?P<base>/base)*(?:/(?P<part>values|scale|a|b))?")


def split_groups(x: Array, widths: Sequence[int], axis: int, groups: int) -> list[Array]:
    """Splits a grouped axis into parts of these widths."""
    axis %= x.ndim
    if groups == 1:
        return jnp.split(x, np.cumsum(widths)[:-1].tolist(), axis=axis)
    grouped = x.reshape(*x.shape[:axis], groups, -1, *x.shape[axis + 1 :])
    parts = jnp.split(grouped, (np.cumsum(widths)[:-1] // groups).tolist(), axis=axis + 1)
    return [part.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :]) for part in parts]


def join_groups(parts: Sequence[Array], axis: int, groups: int) -> Array:
    """Joins parts along an axis, in groups: the inverse of `split_groups`."""
    axis %= parts[0].ndim
    if groups == 1:
        return jnp.concatenate(parts, axis=axis)
    before, after = parts[0].shape[:axis], parts[0].shape[axis + 1 :]
    return jnp.concatenate([x.reshape(*before, groups, -1, *after) for x in parts], axis=axis + 1).reshape(*before, -1, *after)


def file_order(widths: Sequence[int], groups: int) -> np.ndarray:
    """Returns the place in files of each column in memory."""
    starts = np.cumsum([0, *widths[:-1]])
    return np.concatenate([np.arange(at, at + width).reshape(groups, -1) for at, width in zip(starts, widths)], 1).reshape(-1)


def regroup(cfg: ModelConfig, tree: Any, f: Callable[[Any, list[int]], Any], groups: int) -> Any:
    """Replaces each array x with columns of several parts by f(x, their widths), which has them in `groups`."""

    def within(leaf: Any, widths: list[int]) -> Any:
        if not hasattr(leaf, "columns"):  # of a LoRA pair
            return jax.tree.map(lambda x: f(x, widths), leaf)
        b = f(leaf.b, [stop - start for start, stop in leaf.columns])
        return dataclasses.replace(leaf, base=within(leaf.base, widths), b=b, groups=groups)

    def at(keys: Any, leaf: Any) -> Any:
        match = LEAF.fullmatch(jax.tree_util.keystr(keys, simple=True, separator="/"))
        name = match["path"].split("/")[-1].removesuffix("_bias") if match else ""
        widths = [stop - start for start, stop in cfg.parts.get(name, {}).values()]
        return within(leaf, widths) if len(widths) > 1 else leaf

    return jax.tree_util.tree_map_with_path(at, tree, is_leaf=lambda leaf: hasattr(leaf, "columns"))
