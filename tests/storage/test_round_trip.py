"""A model comes back from either kind of file as it was written, up to the rounding of the type it was written in."""

import json

import numpy as np
import pytest

from engine.model.paths import leaf_paths
from engine.storage.gguf_writer import save_gguf
from engine.storage.huggingface import load_tokenizer, save_folder
from engine.storage.model_loader import load_model
from engine.storage.tensor_layout import DTYPE_NAMES
from tests.storage.gguf_files import words_of
from tests.storage.hf_folders import tiny_tokenizer
from tests.tiny import lively_params, tiny_config

STEPS = {
    "q8_0": 127,
    "q4_0": 8,
    "q4_1": 15,
}  # of a block's largest number, within one of which each number comes back
FORMS = [("gguf", dtype) for dtype in DTYPE_NAMES] + [
    ("folder", dtype) for dtype in DTYPE_NAMES if dtype not in STEPS
]
FAMILIES = {
    "llama": {"qk_norm": False},
    "qwen2": {"qk_norm": False, "qkv_bias": True, "tied": True},
    "qwen2, untied": {"qk_norm": False, "qkv_bias": True},
    "qwen3": {},
    "qwen3, tied": {"tied": True},
}


@pytest.mark.law("round trip")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("form", "dtype"), FORMS)
def test_what_is_written_comes_back(form, dtype, family, tmp_path):
    cfg = tiny_config(width=32, ff=64, **FAMILIES[family])
    params = lively_params(cfg)
    reports = []
    report = lambda *counts: reports.append(counts)
    if form == "gguf":
        save_gguf(tmp_path / "x.gguf", cfg, params, words_of(41), name="x", dtype=dtype, report=report)
        assert [file.name for file in tmp_path.iterdir()] == ["x.gguf"]
        model = load_model(tmp_path / "x.gguf", dtype="float32")
    else:
        tiny_tokenizer(tmp_path, 41)
        save_folder(tmp_path, cfg, params, load_tokenizer(tmp_path), dtype=dtype, report=report)
        assert json.loads((tmp_path / "generation_config.json").read_text()) == {
            "eos_token_id": 40,
            "pad_token_id": 40,
        }
        model = load_model(tmp_path, dtype="float32")
    assert reports[-1][0] == reports[-1][1] == sum(leaf.size for leaf in leaf_paths(params).values())
    assert model.cfg.architecture_differences(cfg) == []
    leaves = leaf_paths(model.params)
    assert leaves.keys() == leaf_paths(params).keys()
    for path, leaf in leaf_paths(params).items():
        if dtype in STEPS and leaf.ndim == 2:
            blocks = lambda matrix, path=path: (matrix if path == "embed" else matrix.T).reshape(
                -1, 32
            )  # of a word or column
            largest = np.abs(blocks(leaf)).max(-1, keepdims=True)
            assert (np.abs(blocks(leaves[path]) - blocks(leaf)) <= 1.01 * largest / STEPS[dtype]).all()
        else:
            plain = form == "gguf" and leaf.ndim == 1
            np.testing.assert_array_equal(
                leaves[path], leaf if plain else leaf.astype(dtype).astype("float32")
            )
