"""Small Hugging Face folders, written with the safetensors library and not with the code under test."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from engine.text.tokenizer import byte_tokenizer


def tiny_tokenizer(folder: Path, vocab: int) -> None:
    """A tokenizer.json of `vocab` tokens: as many bytes as there is room for, and the end of a text."""
    byte_tokenizer().save(folder)
    written = json.loads((folder / "tokenizer.json").read_text())
    kept = {name: place for name, place in written["model"]["vocab"].items() if place < vocab - 1}
    written["model"]["vocab"] = kept
    for token in written["added_tokens"]:
        token["id"] = vocab - 1
    (folder / "tokenizer.json").write_text(json.dumps(written))


def write_folder(folder: Path, config: dict[str, Any], weights: dict[str, np.ndarray], shards: int = 1) -> Path:
    """The folder with config.json, model.safetensors (or shards and their index), and a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tiny_tokenizer(folder, config["vocab_size"])
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    placed = {}
    for place in range(shards):
        file = f"model-{place + 1:05}-of-{shards:05}.safetensors"
        part = {name: weights[name] for name in sorted(weights)[place::shards]}
        save_file(part, folder / file)
        placed |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(value.nbytes for value in weights.values())}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
