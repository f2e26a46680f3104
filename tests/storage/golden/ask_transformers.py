"""Writes the golden files beside it: what `transformers` computes for small random models of every family, and reads from a
config that leaves a field out.

    python -m venv peers && peers/bin/pip install torch transformers
    peers/bin/python tests/storage/golden/ask_transformers.py

torch is no part of this project, so the answers are kept: a config as transformers writes it, tokens, and logits. The
weights are drawn by name and are not kept; `random_weights.py` draws them again for the test.
"""

import copy
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
    "vocab_size": 37, "hidden_size": 30, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 3, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 50.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
FAMILIES = {
    "llama": ("Llama", {"head_dim": 4}),
    "llama-tied": ("Llama", {"head_dim": 6, "tie_word_embeddings": True, "rms_norm_eps": 1e-2}),
    "llama-scaled": ("Llama", {"head_dim": 8, "rope_parameters": LLAMA3}),
    "mistral": ("Mistral", {"head_dim": 4, "sliding_window": 40}),  # as many as there are tokens
    "qwen2": ("Qwen2", {"hidden_size": 24, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3": ("Qwen3", {"head_dim": 10, "tie_word_embeddings": True}),
}
KEPT = [0, 1, 9, 22, 39]  # positions whose logits are kept

# A config of every family in which each field has another value than by default.
WHOLE = {
    "vocab_size": 37, "hidden_size": 128, "intermediate_size": 28, "num_hidden_layers": 3, "num_attention_heads": 64,
    "num_key_value_heads": 16, "max_position_embeddings": 50000, "rms_norm_eps": 1e-3, "rope_theta": 50.0, "hidden_act": "silu",
    "tie_word_embeddings": True, "attention_dropout": 0.0, "rope_scaling": None,
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {
    "llama": {
        "head_dim": 6, "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1,
        "rope_scaling": {key: LLAMA3[key] for key in LLAMA3 if key != "rope_theta"},
    },
    "mistral": {"head_dim": 6, "sliding_window": 40000},
    "qwen2": {"use_sliding_window": True, "sliding_window": 40000, "max_window_layers": 1},
    "qwen3": {
        "head_dim": 6, "attention_bias": False, "use_sliding_window": True, "sliding_window": 40000, "max_window_layers": 1,
    },
}  # fmt: skip


def reading(family: str, config: dict[str, Any]) -> dict[str, Any] | None:
    """What the family's config class makes of a config.json, in the fields of WHOLE and MORE; None when it refuses."""
    try:
        result = transformers.AutoConfig.for_model(family, **copy.deepcopy(config)).to_dict()
    except Exception:
        return None
    rope = result["rope_parameters"]
    result |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": None if rope["rope_type"] == "default" else rope}
    return {name: result[name] for name in WHOLE | MORE[family]}


def ask_omitted() -> dict[str, Any]:
    """For each field, what else a config means that leaves it out, or has null there (null when it is refused)."""
    families: dict[str, Any] = {"transformers": transformers.__version__}
    for family, more in MORE.items():
        config = WHOLE | more
        whole = reading(family, config)
        assert whole is not None
        answers: dict[str, Any] = {"config": config, "omitted": {}, "null": {}}
        for name in config:
            absent = {field: value for field, value in config.items() if field != name}
            for way, changed in (("omitted", absent), ("null", config | {name: None})):
                result = reading(family, changed)
                answers[way][name] = result and {key: value for key, value in result.items() if value != whole[key]}
        scaling = config["rope_scaling"] or {}
        for name in scaling:
            result = reading(family, config | {"rope_scaling": {key: scaling[key] for key in scaling if key != name}})
            answers["omitted"][f"rope_scaling/{name}"] = result and {"rope_scaling": result["rope_scaling"]}
        families[family] = answers
    return families


def main() -> None:
    (HERE / "omitted.txt").write_text(json.dumps(ask_omitted()) + "\n")
    for name, (family, changes) in FAMILIES.items():
        config = getattr(transformers, f"{family}Config")(**{**SIZES, **changes})
        model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
        shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        if config.tie_word_embeddings:
            del shapes["lm_head.weight"]
        weights = draw(shapes)
        missing, unknown = model.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()}, strict=False)
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
