"""LoRA adapters in PEFT's layout: adapter_config.json and adapter_model.safetensors, beside a base that is kept elsewhere."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from engine.errors import UserError
from engine.files import write_json
from engine.model.config import ModelConfig
from engine.model.paths import leaf_paths, unflatten
from engine.model.weights.lora import LoRA
from engine.storage.huggingface import safetensors
from engine.storage.reading import read_object, shown

MODULES = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "out": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model.model.layers."
SMALL = 2**20  # bytes of a config


def save_peft(folder: Path, cfg: ModelConfig, params: dict[str, Any], base: str) -> None:
    """Writes the LoRA leaves of params, on their base or alone, float32. `base` is the name of the model they belong on.

    Raises UserError when there is none, when one lies on another, or when they differ in rank or scale, for which the
    layout has no words.
    """
    adapters = {path: leaf for path, leaf in leaf_paths(params).items() if isinstance(leaf, LoRA)}
    if not adapters:
        raise UserError("This model has no LoRA adapters to write; leave --adapter out to write all of it.")
    if any(isinstance(leaf.base, LoRA) for leaf in adapters.values()):
        raise UserError("This model has several adapters on one base, and PEFT's layout holds one; export it folded instead.")
    sizes = {(leaf.rank, leaf.scale) for leaf in adapters.values()}
    if len(sizes) > 1:
        raise UserError("The adapters differ in rank or scale, and PEFT's layout has one of each; export it folded instead.")
    rank, scale = sizes.pop()
    values: dict[str, np.ndarray] = {}
    modules, layers = set(), set()
    for path, leaf in adapters.items():
        _, layer, name = path.split("/")
        places = {columns: part for part, columns in cfg.parts[name].items()}
        for start, stop, a, b in leaf.parts():
            module = MODULES[places[start, stop]]
            prefix = f"{PREFIX}{layer}.{module}"
            values[f"{prefix}.lora_A.weight"] = np.asarray(a, np.float32).T
            values[f"{prefix}.lora_B.weight"] = np.asarray(b, np.float32).T
            modules.add(module.split(".")[1])
            layers.add(int(layer))
    tensors = {name: (value.shape, value.dtype) for name, value in values.items()}
    safetensors.write_file(folder / WEIGHTS, tensors, values.__getitem__)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": 0.0,
        "target_modules": sorted(modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
        "layers_to_transform": None if layers == set(range(cfg.layers)) else sorted(layers),
    }
    write_json(folder / CONFIG, config)


def load_peft(folder: Path, cfg: ModelConfig) -> dict[str, Any]:
    """The adapters in a folder as a tree of LoRA leaves without a base, for a model of this architecture.

    Raises UserError for a kind of adapter that is not built here, and for tensors that do not fit the model.
    """
    said = read_object(folder / CONFIG, SMALL)
    rank, alpha = said.get("r"), said.get("lora_alpha")
    if said.get("peft_type") != "LORA" or said.get("use_dora") or said.get("use_rslora") or said.get("bias") != "none":
        raise UserError(f"{folder / CONFIG} describes another kind of adapter than plain LoRA, which is all that is read here.")
    if type(rank) is not int or rank < 1 or isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise UserError(f"{folder / CONFIG}: r and lora_alpha should be numbers, and are {shown(rank)} and {shown(alpha)}.")
    stored = safetensors.read_header(folder / WEIGHTS)
    found: dict[str, Any] = {}
    used: set[str] = set()
    for layer in range(cfg.layers):
        for name, parts in cfg.parts.items():
            pairs = {}
            for part, columns in sorted(parts.items(), key=lambda item: item[1]):
                names = [f"{PREFIX}{layer}.{MODULES[part]}.lora_{side}.weight" for side in "AB"]
                if used_here := stored.keys() & set(names):
                    used |= used_here
                    pairs[columns] = [_turned(stored, name, rank, side, folder) for side, name in enumerate(names)]
            if pairs:
                a, b = (jnp.concatenate([pair[side] for pair in pairs.values()], axis=1) for side in (0, 1))
                found[f"blocks/{layer}/{name}"] = LoRA(None, a, b, alpha / rank, tuple(pairs))
    for name in stored.keys() - used:
        raise UserError(f"{folder / WEIGHTS} has a tensor {shown(name)}, which has no place in this architecture.")
    return unflatten(found)


def _turned(stored: dict[str, safetensors.Stored], name: str, rank: int, side: int, folder: Path) -> Any:
    """lora_A as (in, R), lora_B as (R, out)."""
    if name not in stored:
        raise UserError(f"{folder / WEIGHTS} has no tensor {name!r}, the other half of a pair.")
    tensor = stored[name]
    if len(tensor.shape) != 2 or tensor.shape[side] != rank or tensor.dtype not in safetensors.DTYPES:
        raise UserError(f"{folder / WEIGHTS}: the tensor {name!r} is {tensor.dtype} {list(tensor.shape)}, and its rank {rank}.")
    return jnp.asarray(safetensors.read_rows(tensor, 0, tensor.shape[0]).T, jnp.float32)
