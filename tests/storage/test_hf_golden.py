"""Logits equal transformers' on a small random model of every family, read from a folder as such models come."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from golden.random_weights import draw
from hf_folders import write_folder
from tiny import positions_of

from engine.model.transformer import forward
from engine.storage.architectures import BLOCKS
from engine.storage.model_loader import load_model

GOLDEN = {path.stem: json.loads(path.read_text()) for path in sorted((Path(__file__).parent / "golden").glob("*.json"))}


def test_there_is_a_golden_file_for_every_family():
    assert {golden["config"]["model_type"] for golden in GOLDEN.values()} == set(BLOCKS)


def as_transformers_4(config: dict[str, Any]) -> dict[str, Any]:
    """The same config as releases before 5 wrote it."""
    old = {name: value for name, value in config.items() if name not in ("rope_parameters", "dtype")}
    rope = dict(config["rope_parameters"])
    theta = rope.pop("rope_theta")
    scaling = None if rope["rope_type"] == "default" else rope
    return old | {"rope_theta": theta, "rope_scaling": scaling, "torch_dtype": "float32"}


@pytest.mark.parametrize("family", GOLDEN)
def test_logits_equal_those_of_transformers(family, tmp_path):
    golden = GOLDEN[family]
    weights = draw(golden["shapes"])
    folder = write_folder(tmp_path / "new", golden["config"], weights)
    model = load_model(folder)
    tokens = np.asarray(golden["tokens"], np.int32)
    logits, _ = jax.jit(forward, static_argnums=0)(model.cfg, model.params, tokens, positions_of(*tokens.shape))
    expected = np.asarray(golden["logits"], np.float32)
    assert np.abs(expected).max() > 1  # lively enough to tell one model from another
    np.testing.assert_allclose(np.asarray(logits)[:, golden["positions"]], expected, atol=1e-4, rtol=0)
    older = load_model(write_folder(tmp_path / "old", as_transformers_4(golden["config"]), weights))
    assert older.cfg == model.cfg
