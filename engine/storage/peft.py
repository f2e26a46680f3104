"""LoRA adapters in PEFT's layout: adapter_config.json and adapter_model.safetensors, beside a base that is kept elsewhere."""

from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import UserError
from engine.files import write_json
from engine.model.config import ModelConfig
from engine.model.lora import LoRA
from engine.model.paths import leaf_paths
from engine.storage import safetensors

MODULES = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "out": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip


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
        for start, stop, a, b in leaf.pairs():
            module = MODULES[places[start, stop]]
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            values[f"{prefix}.lora_A.weight"] = np.asarray(a, np.float32).T
            values[f"{prefix}.lora_B.weight"] = np.asarray(b, np.float32).T
            modules.add(module.split(".")[1])
            layers.add(int(layer))
    tensors = {name: (value.shape, value.dtype) for name, value in values.items()}
    safetensors.write_file(folder / "adapter_model.safetensors", tensors, values.__getitem__)
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
    write_json(folder / "adapter_config.json", config)
