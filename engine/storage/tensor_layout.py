"""Maps a file's tensors to the leaves of the params tree, and back.

Files keep a matrix as (out, in), one for each of q, k, v, gate and up; the tree keeps (in, out), with [q | k | v] and
[gate | up] side by side in one leaf. All is checked before the first weight is read, and no more than a few million
numbers exist beside the tree.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from engine.errors import UserError, did_you_mean
from engine.model.config import ModelConfig
from engine.model.paths import leaf_paths, unflatten
from engine.model.weights.lora import to_dense
from engine.text import OnProgress
from engine.text.tokenizer import ModelTokenizer
from engine.untrusted import quote

CHUNK = 2**20  # numbers read and converted at a time
DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "q8_0": "Q8_0"}  # the files' names of dtypes


class Part(NamedTuple):
    """A tensor of a file and its shape there. `paired`: rows a head of q and k, read together, for GGUF interleaves them."""

    name: str
    shape: tuple[int, ...]
    paired: int = 0


class Leaf(NamedTuple):
    """A leaf of the params tree: its parts, side by side."""

    path: str
    parts: tuple[Part, ...]

    @property
    def transposed(self) -> bool:
        """Whether the leaf is (in, out) while its parts are (out, in)."""
        return len(self.parts[0].shape) == 2 and self.path != "embed"

    @property
    def shape(self) -> tuple[int, ...]:
        shape = (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])
        return shape[::-1] if self.transposed else shape


# A part of the model -> its name in a Hugging Face file, and in a GGUF file; `{}` stands for a layer's number.
_LAYER = {
    "attn_norm": ("input_layernorm", "attn_norm"), "mlp_norm": ("post_attention_layernorm", "ffn_norm"),
    "q": ("self_attn.q_proj", "attn_q"), "k": ("self_attn.k_proj", "attn_k"), "v": ("self_attn.v_proj", "attn_v"),
    "q_norm": ("self_attn.q_norm", "attn_q_norm"), "k_norm": ("self_attn.k_norm", "attn_k_norm"),
    "out": ("self_attn.o_proj", "attn_output"), "gate": ("mlp.gate_proj", "ffn_gate"), "up": ("mlp.up_proj", "ffn_up"),
    "down": ("mlp.down_proj", "ffn_down"),
}  # fmt: skip
_STEMS = {
    "embed": ("model.embed_tokens", "token_embd"), "norm": ("model.norm", "output_norm"), "head": ("lm_head", "output"),
} | {part: (f"model.layers.{{}}.{hf}", f"blk.{{}}.{gguf}") for part, (hf, gguf) in _LAYER.items()}  # fmt: skip
HUGGING_FACE_NAMES, GGUF_NAMES = (
    {part: f"{stems[place]}.weight" for part, stems in _STEMS.items()}
    | {f"{part}_bias": f"{_STEMS[part][place]}.bias" for part in "qkv"}
    for place in (0, 1)
)


def layout_of(cfg: ModelConfig, names: Mapping[str, str]) -> Iterator[Leaf]:
    """Yields every leaf of the architecture; `names`: HUGGING_FACE_NAMES or GGUF_NAMES."""
    D, F, V, H = cfg.width, cfg.ff, cfg.vocab, cfg.head_dim
    q, kv = cfg.heads * H, cfg.kv_heads * H
    qkv = lambda end, *inner: [Part("q" + end, (q, *inner), H), Part("k" + end, (kv, *inner), H), Part("v" + end, (kv, *inner))]
    block = {
        "attn_norm": [Part("attn_norm", (D,))],
        "qkv": qkv("", D),
        **({"qkv_bias": qkv("_bias")} if cfg.qkv_bias else {}),
        **({name: [Part(name, (H,))] for name in ("q_norm", "k_norm")} if cfg.qk_norm else {}),
        "out": [Part("out", (D, q))],
        "mlp_norm": [Part("mlp_norm", (D,))],
        "gate_up": [Part("gate", (F, D)), Part("up", (F, D))],
        "down": [Part("down", (D, F))],
    }

    yield Leaf("embed", (Part(names["embed"], (V, D)),))
    for layer in range(cfg.layers):
        for path, parts in block.items():
            named = (part._replace(name=names[part.name].format(layer)) for part in parts)
            yield Leaf(f"blocks/{layer}/{path}", tuple(named))
    yield Leaf("norm", (Part(names["norm"], (D,)),))
    if not cfg.tied:
        yield Leaf("head", (Part(names["head"], (V, D)),))


def check_tensors(leaves: Iterable[Leaf], shapes: Mapping[str, tuple[int, ...]], path: Path) -> list[Leaf]:
    """Returns the leaves after checking that the file has their parts, and no other tensor.

    Raises UserError for a tensor of another shape or name, and at the first one missing, however many layers are claimed.
    Callers leave out of `shapes` what may be ignored, such as inv_freq.
    """
    complete: list[Leaf] = []
    for leaf in leaves:
        for name, shape, _ in leaf.parts:
            if name not in shapes:
                close = did_you_mean(name, sorted(shapes)[:999])
                raise UserError(f"{path} has no tensor {name!r}, which this architecture needs.{close}")
            if shapes[name] != shape:
                raise UserError(f"{path}: the tensor {name!r} should be {list(shape)} and is {list(shapes[name])}.")
        complete.append(leaf)
    if extra := shapes.keys() - {part.name for leaf in complete for part in leaf.parts}:
        raise UserError(f"{path} has a tensor {quote(min(extra))}, which has no place in this architecture.")
    return complete


class StoredModel(NamedTuple):
    """An opened GGUF or Hugging Face model, weights unread.

    rows: (tensor, start, stop) -> those rows, in any float dtype, q and k in our order of RoPE's pairs. tokenizer: reads what
    lies beside the weights. `context`: what the file claims; `cfg` has less where attention is in windows. `hub_id`: its id on
    the Hugging Face hub, empty when unknown. `notes`: on fields that are not known here.
    """

    name: str
    cfg: ModelConfig
    leaves: list[Leaf]
    rows: Callable[[str, int, int], np.ndarray]
    tokenizer: Callable[[], ModelTokenizer]
    context: int
    hub_id: str
    notes: tuple[str, ...]


def read_params(model: StoredModel, dtype: str, report: OnProgress = None) -> dict[str, Any]:
    """Reads the params: matrices in `dtype`, bfloat16 or float32, gains and biases in float32; rows come in our order.

    `report`: numbers read and in all. Raises UserError for a weight that is not a number, or infinite.
    """
    total, done = sum(math.prod(leaf.shape) for leaf in model.leaves), 0
    params: dict[str, Any] = {}
    for leaf in model.leaves:
        value = read_leaf(model, leaf, dtype)
        params[leaf.path] = jax.device_put(value)
        done += value.size
        if report:
            report(done, total)
    return unflatten(params)


def read_leaf(model: StoredModel, leaf: Leaf, dtype: str) -> np.ndarray:
    """Reads one leaf, as `read_params` does."""
    value = np.empty(leaf.shape, jnp.dtype(dtype) if len(leaf.shape) == 2 else np.float32)
    bits = np.dtype(f"u{value.itemsize}")  # NumPy copies bfloat16 one number at a time, and integers quickly
    view, at = value.view(bits), 0
    view = view.T if leaf.transposed else view
    for part in leaf.parts:
        unit = part.paired or 1  # a head's rows belong together
        step = max(1, CHUNK // math.prod(part.shape[1:]) // unit) * unit
        for start in range(0, part.shape[0], step):
            stop = min(start + step, part.shape[0])
            with np.errstate(all="ignore"):  # what is not finite is named below
                values = model.rows(part.name, start, stop)
                extremes = np.array([values.min(), values.max()]).astype(value.dtype)  # of a NaN, both are NaN
                values = values.astype(value.dtype, copy=False)
            if not np.isfinite(extremes).all():
                raise UserError(f"The tensor {part.name!r} holds weights that are not finite numbers: it is damaged.")
            view[at + start : at + stop] = values.view(bits)  # after the cast, which halves it
        at += part.shape[0]
    return value


def split_params(leaves: list[Leaf], params: dict[str, Any], report: OnProgress) -> Iterator[tuple[Part, np.ndarray]]:
    """Yields a file's tensors: the parts of all leaves, in order. `report`: numbers yielded and in all.

    params: Arrays, or Int8 and LoRA leaves, which are made dense one at a time.
    """
    values = leaf_paths(params)
    total, done = sum(math.prod(leaf.shape) for leaf in leaves), 0
    for leaf in leaves:
        whole = np.asarray(to_dense(values[leaf.path]))
        whole, at = whole.T if leaf.transposed else whole, 0
        for part in leaf.parts:
            yield part, whole[at : at + part.shape[0]]
            at += part.shape[0]
        done += whole.size
        if report:
            report(done, total)
