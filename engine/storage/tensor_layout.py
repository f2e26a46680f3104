"""The layout of a model's tensors: which matrices of a file make up each leaf of the params tree, and how they lie in it.

Files keep a matrix as (out, in), one for each of q, k, v, gate and up; the tree keeps (in, out), with [q | k | v] and
[gate | up] side by side in one leaf. Everything is checked before the first weight is read, and no more than a few
million numbers exist beside the tree itself.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from engine.errors import UserError, nearest
from engine.model.config import ModelConfig
from engine.model.paths import unflatten
from engine.storage.untrusted import quote

AT_ONCE = 2**20  # numbers read and converted at a time


class Part(NamedTuple):
    """A tensor of the file, its shape there, and for q and k the heads whose rows some files keep in pairs."""

    name: str
    shape: tuple[int, ...]
    heads: int = 0


class Leaf(NamedTuple):
    """A leaf of the tree: its parts, side by side. `transposed`: the leaf is (in, out) where its parts are (out, in)."""

    path: str
    parts: tuple[Part, ...]
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        rows = sum(part.shape[0] for part in self.parts)
        shape = (rows, *self.parts[0].shape[1:])
        return shape[::-1] if self.transposed else shape


def layout_of(cfg: ModelConfig, names: Mapping[str, str]) -> Iterator[Leaf]:
    """Yields every leaf of the architecture. `names` says what the file calls each matrix, `{}` standing for the layer."""
    D, F, V = cfg.width, cfg.ff, cfg.vocab
    q, kv = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
    yield Leaf("embed", (Part(names["embed"], (V, D)),), transposed=False)
    for i in range(cfg.layers):
        part = lambda name, *shape, heads=0, i=i: Part(names[name].format(i), shape, heads)
        fused = lambda suffix, *inner, part=part: (
            part("q" + suffix, q, *inner, heads=cfg.heads),
            part("k" + suffix, kv, *inner, heads=cfg.kv_heads),
            part("v" + suffix, kv, *inner),
        )
        yield Leaf(f"blocks/{i}/attn_norm", (part("attn_norm", D),), transposed=False)
        yield Leaf(f"blocks/{i}/qkv", fused("", D), transposed=True)
        if cfg.qkv_bias:
            yield Leaf(f"blocks/{i}/qkv_bias", fused("_bias"), transposed=False)
        if cfg.qk_norm:
            yield Leaf(f"blocks/{i}/q_norm", (part("q_norm", cfg.head_dim),), transposed=False)
            yield Leaf(f"blocks/{i}/k_norm", (part("k_norm", cfg.head_dim),), transposed=False)
        yield Leaf(f"blocks/{i}/out", (part("out", D, q),), transposed=True)
        yield Leaf(f"blocks/{i}/mlp_norm", (part("mlp_norm", D),), transposed=False)
        yield Leaf(f"blocks/{i}/gate_up", (part("gate", F, D), part("up", F, D)), transposed=True)
        yield Leaf(f"blocks/{i}/down", (part("down", D, F),), transposed=True)
    yield Leaf("norm", (Part(names["norm"], (D,)),), transposed=False)
    if not cfg.tied:
        yield Leaf("head", (Part(names["head"], (V, D)),), transposed=True)


def check_tensors(leaves: Iterable[Leaf], shapes: Mapping[str, tuple[int, ...]], path: Path) -> list[Leaf]:
    """Returns the leaves, once it is sure that the file has all their parts and nothing else.

    Raises UserError for a tensor that is missing, of another shape, or of no use; at the first one missing, however many
    layers a config may claim.
    """
    complete, known = [], set()
    for leaf in leaves:
        for part in leaf.parts:
            if part.name not in shapes:
                close = nearest(part.name, sorted(shapes)[:999])
                raise UserError(f"{path} has no tensor {part.name!r}, which this architecture needs.{close}")
            if shapes[part.name] != part.shape:
                came = list(shapes[part.name])
                raise UserError(f"{path}: the tensor {part.name!r} should be {list(part.shape)} and is {came}.")
            known.add(part.name)
        complete.append(leaf)
    for name in shapes:
        if name not in known:
            raise UserError(f"{path} has a tensor {quote(name)}, which has no place in this architecture.")
    return complete


Rows = Callable[[str, int, int], np.ndarray]  # (tensor, start, stop) -> those rows of it, in any float dtype


def read_params(leaves: list[Leaf], rows: Rows, dtype: str, report: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Reads the tree: matrices in `dtype`, gains and biases in float32. `report`: numbers read and in all.

    Raises UserError for a weight that is not a number, or infinite: a model that holds one can say nothing.
    """
    total, done = sum(math.prod(leaf.shape) for leaf in leaves), 0
    params: dict[str, Any] = {}
    for leaf in leaves:
        matrix = len(leaf.shape) == 2
        value = np.empty(leaf.shape, jnp.dtype(dtype) if matrix else np.float32)
        view, at = value.T if leaf.transposed else value, 0
        for part in leaf.parts:
            unit = part.shape[0] // part.heads if part.heads else 1  # a head's rows belong together
            step = max(1, AT_ONCE // math.prod(part.shape[1:]) // unit) * unit
            for start in range(0, part.shape[0], step):
                stop = min(start + step, part.shape[0])
                with np.errstate(all="ignore"):  # what is not finite is named below
                    values = rows(part.name, start, stop).astype(value.dtype, copy=False)
                if not np.isfinite(values).all():
                    raise UserError(f"The tensor {part.name!r} holds weights that are not finite numbers: it is damaged.")
                view[at + start : at + stop] = values  # after the cast: what is transposed is then half as wide
            at += part.shape[0]
        params[leaf.path] = jax.device_put(value)
        done += value.size
        if report:
            report(done, total)
    return unflatten(params)


def split_leaf(leaf: Leaf, value: Any) -> dict[str, np.ndarray]:
    """Returns {name: array} of the file's tensors that `read_params` put together to a leaf's value."""
    whole = np.asarray(value)
    whole = whole.T if leaf.transposed else whole
    ends = np.cumsum([part.shape[0] for part in leaf.parts])[:-1]
    return dict(zip((part.name for part in leaf.parts), np.split(whole, ends)))
