"""Saves and loads LoRA adapters in PEFT's layout, with the digest of the weights they were trained on.

    FOLDER/adapter_config.json         rank, alpha, adapted modules and the name of the base, as PEFT reads them
           adapter_model.safetensors   lora_A (R, in) and lora_B (out, R) of every adapted matrix, float32; its metadata:
                                       thrice.base, digest of the base's params
           manifest.json               SHA-256 of both files, which other libraries do not look at

PEFT's own adapters have neither metadata nor manifest; they are read too, and only shapes tell whether they fit.
"""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engine import manifest
from engine.errors import UserError
from engine.files import atomic_folder, write_json
from engine.model.config import JOINED, LoraConfig, ModelConfig
from engine.model.paths import leaf_paths, map_paths, unflatten
from engine.model.weights.lora import LoRA
from engine.storage import safetensors
from engine.storage.digest import digest
from engine.storage.tensor_layout import HUGGING_FACE_NAMES
from engine.untrusted import Fields, quote, read_json_object

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE = "thrice.base"
# Fields of PEFT that change what an adapter computes or where it is applied -> the values that do not.
ONLY: dict[str, tuple[Any, ...]] = {"peft_type": ("LORA",), "bias": ("none",)} | dict.fromkeys((
    "use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out", "lora_bias",
    "layer_replication", "trainable_token_indices", "target_parameters", "alora_invocation_tokens", "use_qalora",
), (None, False, {}, []))  # fmt: skip


def save_adapter(folder: Path, cfg: ModelConfig, params: dict[str, Any], *, base: str, base_name: str) -> Path:
    """Writes the LoRA leaves of params (with or without their base) in place of `folder`; returns it.

    Atomic. `base`: digest of the base's params as loaded. Raises UserError when there is no LoRA leaf, one lies
    on another, or they differ in rank or scale.
    """
    leaves = adapter_leaves(params)
    sizes = {(leaf.rank, leaf.scale) for leaf in leaves.values()}
    if len(sizes) > 1:
        raise UserError("The adapters differ in rank or scale, and PEFT's layout has one of each; export it merged instead.")
    rank, scale = sizes.pop()
    arrays: dict[str, np.ndarray] = {}
    modules, layers = set(), set()
    for path, leaf in leaves.items():
        _, layer, name = path.split("/")
        layers.add(int(layer))
        modules.add(HUGGING_FACE_NAMES[name].split(".")[-2])
        arrays |= zip(_tensor_names(int(layer), name), (np.asarray(x, np.float32).T for x in (leaf.a, leaf.b)))
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name, "r": rank,
        "lora_alpha": _alpha(rank, scale), "lora_dropout": 0.0, "target_modules": sorted(modules), "bias": "none",
        "fan_in_fan_out": False, "inference_mode": True, "modules_to_save": None,
        "layers_to_transform": None if layers == set(range(cfg.layers)) else sorted(layers),
    }  # fmt: skip
    with atomic_folder(folder) as building:
        write_json(building / CONFIG, config)
        safetensors.write_file(building / WEIGHTS, arrays, arrays.values(), {BASE: base})
        manifest.write_manifest(building)
    return folder


def adapter_leaves(params: dict[str, Any]) -> dict[str, LoRA]:
    """Returns the LoRA leaves by path. Raises UserError when there are none, or one lies on another."""
    leaves = {path: leaf for path, leaf in leaf_paths(params).items() if isinstance(leaf, LoRA)}
    if not leaves:
        raise UserError("This model has no LoRA adapters to write; leave --adapter out to write all of it.")
    if any(isinstance(leaf.base, LoRA) for leaf in leaves.values()):
        raise UserError("This model has several adapters on one base, and PEFT's layout holds one; export it merged instead.")
    return leaves


def load_adapter(folder: Path, cfg: ModelConfig, base: dict[str, Any] | None = None) -> dict[str, Any]:
    """Loads a tree of LoRA leaves, without their base, for a model with the params `base`.

    Raises UserError, too, when it was trained on other weights, as far as its metadata tell, or does not fit the model.
    """
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise UserError(f"There is no adapter at {folder}: it has no {CONFIG} and {WEIGHTS}.")
    if (folder / manifest.NAME).exists() and (damaged := manifest.verify(folder, extra=False)):
        raise UserError(
            f"The adapter {folder} is damaged: {'; '.join(damaged)}. Restore it, or train it again; after a change of your "
            f"own, remove {manifest.NAME}."
        )
    fields = Fields(read_json_object(folder / CONFIG), folder / CONFIG)
    fields.check(ONLY)
    rank, alpha = fields.number("r", int), fields.number("lora_alpha", float)
    if rank < 1:
        raise UserError(f"{folder / CONFIG}: the rank r is 0, and should be at least 1.")
    path, scale = folder / WEIGHTS, alpha / rank
    tensors, metadata = safetensors.read_header(path)
    if base is not None and (trained_on := metadata.get(BASE)) is not None:
        check_base(folder, base, trained_on, fields.values.get("base_model_name_or_path"))
    arrays = {}
    for name, tensor in tensors.items():
        side = int(name.endswith(".lora_B.weight"))
        if len(tensor.shape) != 2 or tensor.shape[side] != rank or tensor.dtype not in safetensors.FLOATS:
            raise UserError(f"{path}: the tensor {quote(name)} is {tensor.dtype} {list(tensor.shape)}, and its rank {rank}.")
        arrays[name] = safetensors.read_slice(tensor, 0, tensor.shape[0]).astype(np.float32, copy=False)
        if not np.isfinite(arrays[name]).all():
            raise UserError(f"{path} is damaged: the tensor {quote(name)} holds a number that is not finite.")
    leaves: dict[str, Any] = {}
    for layer in range(cfg.layers):
        for matrix, shape in cfg.matrices.items():
            names = [name for name in _tensor_names(layer, matrix) if name in arrays]
            if len(names) == 1:
                raise UserError(f"{path} has {names[0]!r} alone, without the other half of a pair.")
            if names:
                a, b = (jnp.asarray(arrays.pop(name).T) for name in names)
                adapter = LoRA(None, a, b, scale)
                if adapter.shape != shape:
                    raise UserError(f"{path}: {' and '.join(names)} adapt a matrix of {adapter.shape}, and not of {shape}.")
                leaves[f"blocks/{layer}/{matrix}"] = adapter
    if arrays:
        raise UserError(f"{path} has a tensor {quote(min(arrays))}, which has no place in this architecture.")
    if not leaves:
        raise UserError(f"{folder} is damaged: it holds no adapter of any matrix.")
    return unflatten(leaves)


class _Joined:
    """Arrays side by side in one, which exists only while it is read."""

    def __init__(self, arrays: list[Any]) -> None:
        self.arrays, self.dtype = arrays, arrays[0].dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.concatenate([np.asarray(array) for array in self.arrays], axis=-1)


def earlier_digest(params: dict[str, Any]) -> str:
    """Returns the digest of a base's params as an earlier version held them: q, k, v and gate, up side by side."""
    blocks = {}
    for layer, block in params["blocks"].items():
        for name, parts in JOINED.items():
            for end in ("", "_bias"):
                if (names := [part + end for part in parts])[0] in block:
                    whole = _side_by_side([block[part] for part in names])
                    block = {path: leaf for path, leaf in block.items() if path not in names} | {name + end: whole}
        blocks[layer] = block
    return digest(params | {"blocks": blocks})


def _depth(weight: Any) -> int:
    return 1 + _depth(weight.base) if isinstance(weight, LoRA) else 0


def _side_by_side(weights: list[Any]) -> Any:
    """Returns weights as one; of adapters, which some may lack, all pairs together."""
    outermost = max(map(_depth, weights))
    if not outermost:
        return _Joined(weights)
    pairs = [weight for weight in weights if _depth(weight) == outermost]
    base = _side_by_side([weight.base if _depth(weight) == outermost else weight for weight in weights])
    halves: list[Any] = [_Joined([getattr(pair, half) for pair in pairs]) for half in "ab"]
    return LoRA(base, halves[0], halves[1], pairs[0].scale)


def check_base(folder: Path, params: dict[str, Any], trained_on: str, base_name: Any) -> None:
    """Raises UserError unless `trained_on`, the digest of the params an adapter was trained on, is that of these params."""
    if trained_on != (own := digest(params)) and trained_on != earlier_digest(params):
        raise UserError(
            f"The adapter {folder} was trained on another model: its base has the digest {quote(trained_on[:16])}, this one "
            f"{own[:16]!r}. It was trained on {ascii(base_name)[:300]}."
        )


def build_adapter(lora: LoraConfig, arrays: Any) -> dict[str, Any]:
    """Returns a tree of LoRA leaves, without their base, from a checkpoint's arrays {"a": ..., "b": ...} of each."""
    adapter = lambda pair: LoRA(None, pair["a"], pair["b"], lora.alpha / lora.rank)
    return jax.tree.map(adapter, arrays, is_leaf=lambda node: "a" in node)


def _tensor_names(layer: int, part: str) -> list[str]:
    return [
        f"base_model.model.{HUGGING_FACE_NAMES[part].format(layer).removesuffix('weight')}lora_{side}.weight" for side in "AB"
    ]


def without_adapters(params: dict[str, Any]) -> dict[str, Any]:
    return map_paths(lambda _, leaf: leaf.base if isinstance(leaf, LoRA) else leaf, params)


def _alpha(rank: int, scale: float) -> float:
    """Returns the lora_alpha that, divided by rank, is scale to the bit: scale * rank may be a neighbour of it."""
    alpha = scale * rank
    close = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    return next((candidate for candidate in close if candidate / rank == scale), alpha)
