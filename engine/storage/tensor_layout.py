"""Maps a file's tensors to the leaves of the params tree, and back.

Files keep a matrix as (out, in), the tree as (in, out). All is checked before the first weight is
read. Weights are read leaf by leaf, so that beside the tree exist only the leaf that is put on the
device and, of one that is converted, about a million of the file's numbers at a time.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from engine.errors import UserError, did_you_mean
from engine.model.config import ModelConfig
from engine.model.paths import leaf_paths, unflatten
from engine.model.shapes import leaf_shapes
from engine.model.weights.block_layout import KINDS, ROUNDED, packed_shape, unpack_blocks
from engine.model.weights.blocks import Blocks
from engine.model.weights.plain import as_weight
from engine.text import OnProgress
from engine.text.tokenizer import ModelTokenizer
from engine.untrusted import quote

CHUNK = 2**20  # numbers read and converted at a time
# the files' names of dtypes
DTYPE_NAMES = {
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "q8_0": "Q8_0",
    "q4_0": "Q4_0",
    "q4_1": "Q4_1",
}


class Leaf(NamedTuple):
    """A leaf of the params tree, at `path`, and the `name` and shape, `stored`, of the tensor that
    holds it in a file.

    `head_rows`: of a head of q and k, read together, for GGUF interleaves them; 0 of other parts.
    """

    path: str
    name: str
    stored: tuple[int, ...]
    head_rows: int = 0

    @property
    def transposed(self) -> bool:
        """Whether the leaf is (in, out) while the tensor is (out, in)."""
        return len(self.stored) == 2 and self.path != "embed"


class _Stems(NamedTuple):
    """The names of a part of the model in files, without `.weight` or `.bias`."""

    hugging_face: str
    gguf: str


# `{}` stands for a layer's number.
_STEMS = {
    "embed": _Stems("model.embed_tokens", "token_embd"),
    "norm": _Stems("model.norm", "output_norm"),
    "head": _Stems("lm_head", "output"),
    "attn_norm": _Stems("model.layers.{}.input_layernorm", "blk.{}.attn_norm"),
    "mlp_norm": _Stems("model.layers.{}.post_attention_layernorm", "blk.{}.ffn_norm"),
    "q": _Stems("model.layers.{}.self_attn.q_proj", "blk.{}.attn_q"),
    "k": _Stems("model.layers.{}.self_attn.k_proj", "blk.{}.attn_k"),
    "v": _Stems("model.layers.{}.self_attn.v_proj", "blk.{}.attn_v"),
    "q_norm": _Stems("model.layers.{}.self_attn.q_norm", "blk.{}.attn_q_norm"),
    "k_norm": _Stems("model.layers.{}.self_attn.k_norm", "blk.{}.attn_k_norm"),
    "out": _Stems("model.layers.{}.self_attn.o_proj", "blk.{}.attn_output"),
    "gate": _Stems("model.layers.{}.mlp.gate_proj", "blk.{}.ffn_gate"),
    "up": _Stems("model.layers.{}.mlp.up_proj", "blk.{}.ffn_up"),
    "down": _Stems("model.layers.{}.mlp.down_proj", "blk.{}.ffn_down"),
}


def _tensor_names(stems: Mapping[str, str]) -> dict[str, str]:
    """Returns the names of a file's tensors by part, from the parts' stems."""
    weights = {part: f"{stem}.weight" for part, stem in stems.items()}
    biases = {f"{part}_bias": f"{stems[part]}.bias" for part in "qkv"}
    return weights | biases


HUGGING_FACE_NAMES = _tensor_names({part: stems.hugging_face for part, stems in _STEMS.items()})
GGUF_NAMES = _tensor_names({part: stems.gguf for part, stems in _STEMS.items()})


def layout_of(cfg: ModelConfig, names: Mapping[str, str]) -> Iterator[Leaf]:
    """Yields every leaf of the architecture, bottom first; `names`: HUGGING_FACE_NAMES or GGUF_NAMES."""
    # a file may claim any number of layers
    shapes = leaf_shapes(dataclasses.replace(cfg, layers=1))
    block = {
        path.removeprefix("blocks/0/"): shape for path, shape in shapes.items() if path.startswith("blocks/")
    }
    yield Leaf("embed", names["embed"], shapes["embed"])
    for layer in range(cfg.layers):
        for part, shape in block.items():
            head_rows = 0
            if part in ("q", "k", "q_bias", "k_bias"):
                head_rows = cfg.head_dim
            yield Leaf(f"blocks/{layer}/{part}", names[part].format(layer), shape[::-1], head_rows)
    yield Leaf("norm", names["norm"], shapes["norm"])
    if not cfg.tied:
        yield Leaf("head", names["head"], shapes["head"][::-1])


def check_tensors(leaves: Iterable[Leaf], shapes: Mapping[str, tuple[int, ...]], path: Path) -> list[Leaf]:
    """Returns the leaves after checking that the file has their tensors, and no other.

    `shapes` is without what may be ignored, such as inv_freq. Raises UserError at the first tensor
    that is missing or has another shape, however many layers are claimed.
    """
    complete: list[Leaf] = []
    for leaf in leaves:
        if leaf.name not in shapes:
            close = did_you_mean(leaf.name, sorted(shapes)[:999])
            raise UserError(f"{path} has no tensor {leaf.name!r}, which this architecture needs.{close}")
        shape = shapes[leaf.name]
        if shape != leaf.stored:
            raise UserError(
                f"{path}: the tensor {leaf.name!r} should be {list(leaf.stored)} and is {list(shape)}."
            )
        complete.append(leaf)
    extra = shapes.keys() - {leaf.name for leaf in complete}
    if extra:
        raise UserError(f"{path} has a tensor {quote(min(extra))}, which has no place in this architecture.")
    return complete


class StoredModel(NamedTuple):
    """An opened GGUF or Hugging Face model, weights unread."""

    name: str
    cfg: ModelConfig
    leaves: list[Leaf]
    # (tensor, start, stop) -> those rows, in any float dtype, q and k in our order of RoPE's pairs
    read_rows: Callable[[str, int, int], np.ndarray]
    read_tokenizer: Callable[[], ModelTokenizer]
    context: int  # what the file claims; `cfg` has less where attention is in windows
    hub_id: str  # empty when unknown
    notes: tuple[str, ...]  # on unknown fields
    kinds: Mapping[str, str] = {}  # of a GGUF file's matrices, by name
    # the name of a matrix that may stay in blocks -> the array of Blocks
    read_packed: Callable[[str], np.ndarray] | None = None


def file_kinds(model: StoredModel) -> dict[str, str]:
    """Returns the kinds of a GGUF file's matrices by path, such as Q6_K and F16; none of another model."""
    return {leaf.path: model.kinds[leaf.name] for leaf in model.leaves if leaf.name in model.kinds}


def block_leaves(model: StoredModel, kept_kinds: Collection[str]) -> dict[str, Blocks]:
    """Returns the leaves that a file holds in blocks of `kept_kinds`, by path: shapes in place of arrays."""
    leaves = {}
    for leaf in model.leaves:
        kind = model.kinds.get(leaf.name, "")
        if kind in kept_kinds:
            columns, inputs = leaf.stored
            shape = packed_shape(columns, inputs, kind)
            packed: Any = jax.ShapeDtypeStruct(shape, KINDS[kind].dtype)
            leaves[leaf.path] = Blocks(packed, leaf.stored[0], int(leaf.transposed))
    return leaves


def leaf_structs(model: StoredModel, dtype: str) -> dict[str, Any]:
    """Returns the shapes and dtypes of the leaves that `read_params` reads, by path."""
    structs = {}
    for leaf in model.leaves:
        shape, leaf_dtype = _shape_and_dtype(leaf, dtype)
        structs[leaf.path] = jax.ShapeDtypeStruct(shape, leaf_dtype)
    return structs


def _shape_and_dtype(leaf: Leaf, dtype: str) -> tuple[tuple[int, ...], str]:
    shape = leaf.stored[::-1] if leaf.transposed else leaf.stored
    return shape, dtype if len(shape) == 2 else "float32"


def read_params(
    model: StoredModel, dtype: str, report: OnProgress = None, blocks: Mapping[str, Blocks] = {}
) -> dict[str, Any]:
    """Reads the params: matrices in `dtype`, bfloat16 or float32, gains and biases in float32.

    `blocks`: of `block_leaves`, those that stay as they are. `report`: numbers read and in all.
    Raises UserError for a weight that is not a finite number.
    """
    total = sum(math.prod(leaf.stored) for leaf in model.leaves)
    done = 0
    params: dict[str, Any] = {}
    for leaf in model.leaves:
        if leaf.path in blocks:
            assert model.read_packed
            packed = jax.device_put(model.read_packed(leaf.name))
            params[leaf.path] = dataclasses.replace(blocks[leaf.path], packed=packed)
        else:
            params[leaf.path] = jax.device_put(read_leaf(model, leaf, dtype))
        done += math.prod(leaf.stored)
        if report:
            report(done, total)
    return unflatten(params)


def read_leaf(model: StoredModel, leaf: Leaf, dtype: str) -> np.ndarray:
    """Reads a leaf: a matrix in `dtype`, another in float32. Raises as `read_params`."""
    shape, dtype = _shape_and_dtype(leaf, dtype)
    value = np.empty(shape, jnp.dtype(dtype))
    # NumPy copies bfloat16 one number at a time, and integers quickly
    bits = np.dtype(f"u{value.itemsize}")
    view = value.view(bits)
    if leaf.transposed:
        view = view.T
    rows = leaf.stored[0]
    unit = leaf.head_rows or 1  # a head's rows belong together
    step = max(1, CHUNK // math.prod(leaf.stored[1:]) // unit) * unit
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        # what is not finite is named below
        with np.errstate(all="ignore"):
            values = model.read_rows(leaf.name, start, stop)
            # of a NaN, both are NaN
            extremes = np.array([values.min(), values.max()]).astype(value.dtype)
            values = values.astype(value.dtype, copy=False)
        if not np.isfinite(extremes).all():
            raise infinite_weights(leaf.name)
        view[start:stop] = values.view(bits)  # after the cast, which halves it
    return value


def infinite_weights(name: str) -> UserError:
    return UserError(f"The tensor {name!r} holds weights that are not finite numbers: it is damaged.")


def file_tensors(
    leaves: list[Leaf], params: dict[str, Any], report: OnProgress
) -> Iterator[tuple[Leaf, np.ndarray]]:
    """Yields each leaf with its numbers as a file holds them. `report`: numbers yielded and in all.

    params: Arrays, or Int8, LoRA and Blocks leaves, which are made dense one at a time; of Blocks of
    kinds in ROUNDED a file holds the bytes.
    """
    values = leaf_paths(params)
    total = sum(math.prod(leaf.stored) for leaf in leaves)
    done = 0
    for leaf in leaves:
        weight = as_weight(values[leaf.path])
        if weight.kind in ROUNDED:
            yield leaf, unpack_blocks(np.asarray(weight.packed), weight.columns)
        else:
            matrix = np.asarray(weight.dense())
            yield leaf, matrix.T if leaf.transposed else matrix
        done += math.prod(leaf.stored)
        if report:
            report(done, total)
