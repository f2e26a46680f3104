"""Writes the golden files beside it: what `transformers` computes for small random models of every family, and its defaults.

    python -m venv peers && peers/bin/pip install torch transformers
    peers/bin/python tests/storage/golden/ask_transformers.py

torch is no part of this project, so the answers are kept: a config as transformers writes it,
tokens, and logits. The weights are drawn by name and are not kept; `random_weights.py` draws them
again for the test.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from random_weights import SEED, draw  # noqa: E402

SIZES = {
    "vocab_size": 37,
    "hidden_size": 30,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 50.0,
    "factor": 4.0,
    "beta_fast": 2,
    "beta_slow": 0.5,
    "original_max_position_embeddings": 16,
}
FAMILIES = {
    "llama": ("Llama", {"head_dim": 4}),
    "llama-tied": ("Llama", {"head_dim": 6, "tie_word_embeddings": True, "rms_norm_eps": 1e-2}),
    "llama-scaled": ("Llama", {"head_dim": 8, "rope_parameters": LLAMA3}),
    "mistral": ("Mistral", {"head_dim": 4, "sliding_window": 40}),  # as many as there are tokens
    "qwen2": ("Qwen2", {"hidden_size": 24, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2-yarn": ("Qwen2", {"hidden_size": 96, "rope_parameters": YARN}),
    "qwen3": ("Qwen3", {"head_dim": 10, "tie_word_embeddings": True}),
}
KEPT = [0, 1, 9, 22, 39]  # positions whose logits are kept

# A config of every family in which no field that matters has its default.
WHOLE = {
    "vocab_size": 37,
    "hidden_size": 128,
    "intermediate_size": 28,
    "num_hidden_layers": 3,
    "num_attention_heads": 64,
    "num_key_value_heads": 16,
    "max_position_embeddings": 50000,
    "rms_norm_eps": 1e-3,
    "rope_theta": 50.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "attention_dropout": 0.0,
}
WINDOWS = {"use_sliding_window": True, "sliding_window": 40000, "max_window_layers": 1}
MORE: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 6, "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1},
    "mistral": {"head_dim": 6, "sliding_window": 40000},
    "qwen2": WINDOWS,
    "qwen3": WINDOWS | {"head_dim": 6, "attention_bias": False},
}


def ask_omitted() -> dict[str, Any]:
    """Returns a config of each family, and for each field what changes when it is left out."""
    families: dict[str, Any] = {}
    for family, more in MORE.items():
        config = WHOLE | more
        families[family] = {"config": config, "omitted": {}}
        for name in config:
            rest = {field: value for field, value in config.items() if field != name}
            read = transformers.AutoConfig.for_model(family, **rest).to_dict()
            read["rope_theta"] = read["rope_parameters"]["rope_theta"]
            families[family]["omitted"][name] = {
                field: read[field] for field in config if read[field] != config[field]
            }
    return {"transformers": transformers.__version__, "families": families}


def main() -> None:
    (HERE / "omitted.txt").write_text(json.dumps(ask_omitted()) + "\n")
    for name, (family, changes) in FAMILIES.items():
        config = getattr(transformers, f"{family}Config")(**{**SIZES, **changes})
        model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
        shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        if config.tie_word_embeddings:
            del shapes["lm_head.weight"]
        weights = draw(shapes)
        missing, unknown = model.load_state_dict(
            {key: torch.from_numpy(value) for key, value in weights.items()}, strict=False
        )
        assert set(missing) <= {"lm_head.weight"}, missing
        assert not unknown, unknown
        model.tie_weights()
        tokens = np.random.default_rng(SEED).integers(0, SIZES["vocab_size"], (2, 40))
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens)).logits.numpy()
        with tempfile.TemporaryDirectory() as folder:
            config.architectures, config.dtype = [type(model).__name__], "float32"
            config.save_pretrained(folder)
            config_json = json.loads(Path(folder, "config.json").read_text())
        golden = {
            "transformers": transformers.__version__,
            "config": config_json,
            "shapes": shapes,
            "tokens": tokens.tolist(),
            "positions": KEPT,
            "logits": [[[float(f"{value:.7g}") for value in row[at]] for at in KEPT] for row in logits],
        }
        (HERE / f"{name}.json").write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
