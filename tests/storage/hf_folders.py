"""Small Hugging Face folders, written with the safetensors library and not with the code under test."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from engine.text.tokenizer import byte_tokenizer
from tests.storage.golden.random_weights import draw

# A folder of the tiny model, and its weights.
CONFIG = {
    "model_type": "llama",
    "vocab_size": 41,
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}
SHAPES = {"model.embed_tokens.weight": (41, 20), "model.norm.weight": (20,)} | {
    f"model.layers.{layer}.{name}.weight": shape
    for layer in range(2)
    for name, shape in {
        "input_layernorm": (20,),
        "post_attention_layernorm": (20,),
        "self_attn.q_proj": (24, 20),
        "self_attn.k_proj": (12, 20),
        "self_attn.v_proj": (12, 20),
        "self_attn.o_proj": (20, 24),
        "mlp.gate_proj": (28, 20),
        "mlp.up_proj": (28, 20),
        "mlp.down_proj": (20, 28),
    }.items()
}
WEIGHTS = draw(SHAPES)


def tiny_tokenizer(folder: Path, vocab: int) -> None:
    """A tokenizer.json of `vocab` tokens: as many bytes as there is room for, and the end of a text."""
    byte_tokenizer().save(folder)
    config = json.loads((folder / "tokenizer.json").read_text())
    config["model"]["vocab"] = {
        name: place for name, place in config["model"]["vocab"].items() if place < vocab - 1
    }
    for token in config["added_tokens"]:
        token["id"] = vocab - 1
    (folder / "tokenizer.json").write_text(json.dumps(config))


def write_folder(
    folder: Path, config: dict[str, Any], weights: dict[str, np.ndarray], shards: int = 1
) -> Path:
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
    index = {
        "metadata": {"total_size": sum(value.nbytes for value in weights.values())},
        "weight_map": placed,
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
