"""Writes LoRA adapters in PEFT's layout (`adapter.py`)."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from engine import manifest
from engine.files import atomic_folder, write_json
from engine.model.config import LoraConfig, ModelConfig
from engine.model.weights.lora import LoRA
from engine.storage import safetensors_writer
from engine.storage.adapter import CONFIG, MODEL, WEIGHTS, SavedAdapter, adapter_leaves
from engine.storage.tensor_layout import HUGGING_FACE_NAMES


def saved_run_adapter(lora: LoraConfig, *, base: str, base_name: str) -> SavedAdapter:
    """Returns what the checkpoints of a LoRA run say of their adapter."""
    modules = tuple(_module_suffix(f"blocks/0/{name}") for name in lora.adapted_matrices)
    return SavedAdapter(rank=lora.rank, alpha=lora.alpha, modules=modules, base=base, base_name=base_name)


def adapter_tensors(leaves: dict[str, LoRA]) -> dict[str, np.ndarray]:
    """Returns the tensors of adapter_model.safetensors by name: float32 views of each leaf's pair,
    transposed.
    """
    tensors = {}
    for path, leaf in leaves.items():
        prefix = f"{MODEL}{_module(path)}"
        tensors[f"{prefix}.lora_A.weight"] = np.asarray(leaf.a, np.float32).T
        tensors[f"{prefix}.lora_B.weight"] = np.asarray(leaf.b, np.float32).T
    return tensors


def _module(path: str) -> str:
    """Returns PEFT's name of an adapted matrix: model.layers.0.self_attn.q_proj of blocks/0/q."""
    _, layer, name = path.split("/")
    return HUGGING_FACE_NAMES[name].format(layer).removesuffix(".weight")


def _module_suffix(path: str) -> str:
    """Returns PEFT's name of an adapted matrix in every layer: q_proj of blocks/0/q."""
    return _module(path).rpartition(".")[2]


def save_adapter(
    folder: Path, cfg: ModelConfig, params: dict[str, Any], *, base: str, base_name: str
) -> Path:
    """Writes the LoRA leaves of params (with or without their base) in place of `folder`,
    atomically; returns it.

    `base`: digest of the base's params as loaded. Raises UserError when there is no LoRA leaf, or
    one lies on another.
    """
    leaves = adapter_leaves(params)
    saved = _describe_adapter(cfg, leaves, base=base, base_name=base_name)
    tensors = adapter_tensors(leaves)
    with atomic_folder(folder) as building:
        write_json(building / CONFIG, saved.config())
        safetensors_writer.write_file(building / WEIGHTS, tensors, tensors.values(), saved.metadata)
        manifest.write_manifest(building)
    return folder


def _describe_adapter(
    cfg: ModelConfig, leaves: dict[str, LoRA], *, base: str, base_name: str
) -> SavedAdapter:
    """Returns what the files of an adapter say of its leaves: the most frequent rank and scale, and
    the modules whose own differ.
    """
    frequencies = Counter((leaf.rank, leaf.scale) for leaf in leaves.values())
    (rank, scale), _ = frequencies.most_common(1)[0]
    modules = set()
    layers = set()
    ranks = {}
    alphas = {}
    for path, leaf in leaves.items():
        module = _module(path)
        layers.add(int(path.split("/")[1]))
        modules.add(_module_suffix(path))
        if (leaf.rank, leaf.scale) != (rank, scale):
            ranks[module] = leaf.rank
            alphas[module] = leaf.scale * leaf.rank
    adapted_layers = None
    if layers != set(range(cfg.layers)):
        adapted_layers = sorted(layers)
    return SavedAdapter(
        rank=rank,
        alpha=scale * rank,
        modules=tuple(modules),
        base=base,
        base_name=base_name,
        ranks=ranks,
        alphas=alphas,
        layers=adapted_layers,
    )
