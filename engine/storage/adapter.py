"""Describes LoRA adapters in PEFT's layout: their files, their leaves, and the digest of their base.

    FOLDER/adapter_config.json         rank, alpha, adapted modules and the name of the base, as PEFT reads them
           adapter_model.safetensors   lora_A (R, in) and lora_B (out, R) of every adapted matrix, float32; its metadata:
                                       thrice.base, digest of the base's params
           manifest.json               SHA-256 of every file, which other libraries do not look at

`adapter_writer.py` writes such a folder, and `adapter_reader.py` reads it. A checkpoint of a LoRA
run is one, with the optimizer's state beside it (`checkpoint.py`). PEFT's own adapters have neither
metadata nor manifest; they are read too, and only shapes tell whether they fit. So are rsLoRA,
ranks and alphas by module, DoRA, and modules that were trained whole.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from engine.errors import UserError
from engine.model.config import LoraConfig, ModelConfig
from engine.model.paths import leaf_paths, map_paths, unflatten
from engine.model.weights.blocks import Blocks
from engine.model.weights.lora import LoRA, to_dense
from engine.storage.digest import digest

CONFIG = "adapter_config.json"
PART = "adapter_model"
WEIGHTS = f"{PART}.safetensors"
BASE = "thrice.base"
MODEL = "base_model.model."  # before the base's own name of a module


class DoRA(NamedTuple):
    """An adapter, and the length of each column of the adapted matrix, (out,) (Liu et al. 2024,
    2402.09353).
    """

    adapter: LoRA
    magnitude: jax.Array

    def on(self, base: Any) -> jax.Array:
        """Returns magnitude (base + scale a b) / its columns' norms, equation 5, in the base's dtype."""
        weight = to_dense(base)
        merged = to_dense(self.adapter.on(weight.astype(jnp.float32)))
        return (merged * (self.magnitude / jnp.linalg.norm(merged, axis=0))).astype(weight.dtype)


class Replacement(NamedTuple):
    """A weight that was trained whole beside the adapters (PEFT's modules_to_save)."""

    weight: jax.Array

    def on(self, base: Any) -> jax.Array:
        return self.weight.astype(to_dense(base).dtype)


class SavedAdapter(NamedTuple):
    """What the files of an adapter say beside its tensors.

    `base`: digest of the base's params as loaded. `ranks` and `alphas`: of modules whose own differ
    from `rank` and `alpha`. `layers`: those that are adapted, None for all.
    """

    rank: int
    alpha: float
    modules: tuple[str, ...]
    base: str
    base_name: str
    ranks: Mapping[str, int] = {}
    alphas: Mapping[str, float] = {}
    layers: list[int] | None = None

    @property
    def metadata(self) -> dict[str, str]:
        return {BASE: self.base}

    def config(self) -> dict[str, Any]:
        """Returns the contents of adapter_config.json."""
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base_name,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "target_modules": sorted(self.modules),
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "modules_to_save": None,
            "rank_pattern": self.ranks,
            "alpha_pattern": self.alphas,
            "layers_to_transform": self.layers,
        }


def config_of(cfg: ModelConfig, leaves: dict[str, Any]) -> LoraConfig | None:
    """Returns the config that describes an adapter's leaves; None unless all have one rank and one
    scale, in every layer.
    """
    if not all(isinstance(leaf, LoRA) for leaf in leaves.values()):
        return None
    kinds = {(leaf.rank, leaf.scale) for leaf in leaves.values()}
    names = [name for name in cfg.matrices if any(path.endswith(f"/{name}") for path in leaves)]
    if len(kinds) != 1 or len(leaves) != cfg.layers * len(names):
        return None
    rank, scale = kinds.pop()
    if len(names) == len(cfg.matrices):
        names = ["all"]
    return LoraConfig(rank, rank * scale, tuple(names))


def adapter_leaves(params: dict[str, Any]) -> dict[str, LoRA]:
    """Returns the LoRA leaves by path. Raises UserError when there are none, or one lies on another."""
    leaves = {path: leaf for path, leaf in leaf_paths(params).items() if isinstance(leaf, LoRA)}
    if not leaves:
        raise UserError("This model has no LoRA adapters to write; write all of it instead.")
    if any(isinstance(leaf.base, LoRA) for leaf in leaves.values()):
        raise UserError(
            "This model has several adapters on one base, "
            "and PEFT's layout holds one; export it merged instead."
        )
    return leaves


def put_on(params: dict[str, Any], adapter: dict[str, Any]) -> dict[str, Any]:
    """Returns params with an adapter of `load_adapter` on them; a DoRA is merged, and what trained
    whole stands for its weight.

    Raises ValueError when a LoRA does not fit.
    """
    leaves = leaf_paths(params)
    for path, part in leaf_paths(adapter).items():
        leaves[path] = part.on(leaves[path])
    return unflatten(leaves)


def without_adapters(params: dict[str, Any]) -> dict[str, Any]:
    def base_of(_: str, leaf: Any) -> Any:
        if isinstance(leaf, LoRA):
            return leaf.base
        return leaf

    return map_paths(base_of, params)


class _Widened:
    """A matrix in Blocks that `digest` can hash as an array of a dtype.

    `digest` asks each leaf for its `dtype`, and takes np.asarray of one leaf at a time: NumPy calls
    `__array__` for it, so that the widened matrix exists only while it is hashed.
    """

    def __init__(self, blocks: Blocks, dtype: Any) -> None:
        self.blocks = blocks
        self.dtype = np.dtype(dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(to_dense(self.blocks), self.dtype)


def base_digest(params: dict[str, Any], dtype: str = "float32") -> str:
    """Returns the digest by which an adapter names its base.

    `dtype`: that of matrices in Blocks, where an adapter was trained on them.
    """

    def widen(_: str, leaf: Any) -> Any:
        if isinstance(leaf, Blocks):
            return _Widened(leaf, dtype)
        return leaf

    return digest(map_paths(widen, params))
