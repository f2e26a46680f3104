"""The rules that say which axes of a mesh cut an array, by its path: the first match wins.

`data` repeats the weights, `fsdp` cuts them and gathers each one where it is used (Rajbhandari et
al. 2020, 1910.02054), `tensor` cuts the products (Shoeybi et al. 2019, 1909.08053).
"""

import math
import re
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from engine.mesh.shape import AXES

# A parameter inside any tree, such as an optimizer's state, and one array of it: of an Int8 or of a
# LoRA pair.
LEAF = re.compile(
    r"(?:.*?/)??(?P<path>(?:blocks/\d+/)?\w+?)(?P<base>/base)*(?:/(?P<part>values|packed|scale|a|b))?"
)

# a parameter's path -> the axes of the mesh that cut it; the first match wins
RULES = (
    (r"embed", P(None, ("tensor", "fsdp"))),
    (r"head", P(("tensor", "fsdp"), None)),
    (r"blocks/\d+/(q|k|v|gate|up)", P("fsdp", "tensor")),
    (r"blocks/\d+/(out|down)", P("tensor", "fsdp")),
    (r"(blocks/\d+/)?\w*(norm|bias)", P()),
)


def leaf_spec(path: str, shape: tuple[int, ...], sizes: Any) -> P:
    """Returns the axes that cut a leaf of a tree, by the rule of the parameter that its path ends
    in.

    `sizes`: axis -> devices. An axis that does not divide the leaf does not cut it. Raises
    ValueError without a rule.
    """
    if len(shape) < 2:
        return P()
    match = LEAF.fullmatch(path)
    spec = None
    if match:
        spec = _rule_of(match["path"])
    if match is None or spec is None:
        raise ValueError(f"No rule says where {path!r} {shape} lies on a mesh.")
    # a LoRA pair: its long axis over all axes that cut the matrix
    if match["part"] == "a":
        spec = P(("tensor", "fsdp"), None)
    elif match["part"] == "b":
        spec = P(None, ("tensor", "fsdp"))
    return fitting_spec(spec, shape, sizes)


def _rule_of(path: str) -> P | None:
    """Returns the axes of the first of RULES that matches a parameter's path; None without one."""
    for pattern, spec in RULES:
        if re.fullmatch(pattern, path):
            return spec
    return None


def tensor_axes(path: str) -> tuple[str | None, ...]:
    """Returns the axes that still cut a parameter, of all its axes, once it is gathered along
    `fsdp`: `tensor`, or none.
    """
    spec = leaf_spec(path, (1, 1), dict.fromkeys(AXES, 1))
    return tensor_alone(spec)


def tensor_alone(spec: P) -> tuple[str | None, ...]:
    """Returns the axes of a spec with `tensor` where it cuts, and no other."""
    axes: list[str | None] = []
    for axis in spec:
        axes.append("tensor" if axis == "tensor" else None)
    return tuple(axes)


def fitting_spec(spec: P, shape: tuple[int, ...], sizes: Any) -> P:
    """Returns a spec without the axes that do not divide the array's: these stay whole."""
    axes: list[Any] = []
    for names, size in zip(spec, shape):
        if isinstance(names, str):
            count = sizes[names]
        else:
            count = math.prod(sizes[name] for name in names or ())
        axes.append(names if size % count == 0 else None)
    return P(*axes)


def leaf_specs(tree: Any, sizes: Any) -> Any:
    """Returns a tree of the axes that cut each leaf."""

    def spec(keys: Any, leaf: Any) -> P:
        return leaf_spec(jax.tree_util.keystr(keys, simple=True, separator="/"), leaf.shape, sizes)

    return jax.tree.map_with_path(spec, tree)


def cache_specs(tree: Any, sizes: Any) -> Any:
    """Returns the axes that cut a KV cache of arrays (B, K, ...): key heads over `tensor`."""

    def spec(x: Any) -> P:
        if x.ndim > 2 and x.shape[1] % sizes["tensor"] == 0:
            return P(None, "tensor")
        return P()

    return jax.tree.map(spec, tree)
