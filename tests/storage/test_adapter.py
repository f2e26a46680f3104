"""Adapters are files in PEFT's layout: they come back as they were, and go on no other base."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from engine import manifest
from engine.errors import UserError
from engine.model.paths import leaf_paths, unflatten
from engine.model.weights.lora import LoRA, make_adapter
from engine.storage import hub
from engine.storage.adapter import base_digest, config_of, without_adapters
from engine.storage.adapter_reader import load_adapter
from engine.storage.adapter_writer import save_adapter
from engine.storage.digest import digest
from engine.storage.model_loader import load_model, with_adapters
from tests.storage.refusals import refusal
from tests.tiny import lively_params, tiny_config

CFG = tiny_config()
BASE_PARAMS = lively_params(CFG)
BASE = digest(BASE_PARAMS)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model.model.layers.0.self_attn."


def adapters(alpha: float = 12.0, layers: tuple[int, ...] = (0, 1)) -> Any:
    leaves = {}
    for layer in layers:
        for name in ("q", "v"):
            leaf = make_adapter(jax.random.key(layer), CFG.matrices[name], 3, alpha)
            leaves[f"blocks/{layer}/{name}"] = dataclasses.replace(
                leaf, b=jnp.full(leaf.b.shape, 0.1 + layer)
            )
        leaves[f"blocks/{layer}/down"] = make_adapter(jax.random.key(9), CFG.matrices["down"], 3, alpha)
    return unflatten(leaves)


def own_base() -> str:
    return base_digest(BASE_PARAMS)


def saved(folder: Path, params: Any = None) -> Path:
    return save_adapter(folder / "mine", CFG, params or adapters(), base=BASE, base_name="tiny")


@pytest.mark.law("round trip")
def test_it_comes_back_to_the_bit(tmp_path):
    folder = saved(tmp_path)
    for base in (own_base, None):
        loaded = load_adapter(folder, CFG, base)
        assert jax.tree.structure(loaded) == jax.tree.structure(adapters())  # the scale is in it
        assert digest(loaded) == digest(adapters())
    assert sorted(entry.name for entry in folder.iterdir()) == [CONFIG, WEIGHTS, manifest.NAME]


@given(rank=st.integers(1, 4096), alpha=st.floats(2**-20, 2**20))
def test_every_scale_comes_back_to_the_bit(rank, alpha):
    a, b = jax.ShapeDtypeStruct((1, rank), np.float32), jax.ShapeDtypeStruct((rank, 1), np.float32)
    leaves = {f"blocks/{layer}/q": LoRA(None, a, b, alpha / rank) for layer in range(CFG.layers)}
    assert config_of(CFG, leaves).alpha / rank == alpha / rank


def test_others_find_what_the_layout_promises(tmp_path):
    folder = saved(tmp_path)
    config, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    expected = {
        "peft_type": "LORA",
        "r": 3,
        "lora_alpha": 12.0,
        "base_model_name_or_path": "tiny",
        "layers_to_transform": None,
    }
    assert config | expected == config
    assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    leaves = leaf_paths(adapters())
    np.testing.assert_array_equal(
        tensors[f"{PREFIX}q_proj.lora_A.weight"], np.asarray(leaves["blocks/0/q"].a).T
    )
    np.testing.assert_array_equal(
        tensors[f"{PREFIX}v_proj.lora_B.weight"], np.asarray(leaves["blocks/0/v"].b).T
    )
    assert len(tensors) == 2 * 2 * 3
    with safe_open(folder / WEIGHTS, framework="numpy") as file:
        assert file.metadata()["format"] == "pt"
        assert file.metadata()["thrice.base"] == BASE
    only = json.loads((saved(tmp_path, adapters(layers=(1,))) / CONFIG).read_text())
    assert only["layers_to_transform"] == [1]


def test_an_adapter_of_another_library_is_read(tmp_path):
    """It has no digest of its base and no checksum, may be in half precision, and goes on whatever
    it fits.
    """
    folder = saved(tmp_path)
    halved = {name: value.astype(ml_dtypes.bfloat16) for name, value in load_file(folder / WEIGHTS).items()}
    save_file(halved, folder / WEIGHTS)
    (folder / manifest.NAME).unlink()
    loaded = load_adapter(folder, CFG, own_base)
    for path, leaf in leaf_paths(adapters()).items():
        theirs = leaf_paths(loaded)[path]
        assert theirs.a.dtype == jnp.float32
        np.testing.assert_array_equal(theirs.a, leaf.a.astype(jnp.bfloat16).astype(jnp.float32))


def test_ranks_and_scales_that_differ_come_back_to_the_bit(tmp_path):
    """As one rank and alpha, and others by the names of modules."""
    leaves = leaf_paths(adapters()) | leaf_paths(adapters(alpha=6.0, layers=(1,)))
    leaves["blocks/0/out"] = make_adapter(jax.random.key(4), CFG.matrices["out"], 5, 7.0)
    folder = saved(tmp_path, unflatten(leaves))
    loaded = leaf_paths(load_adapter(folder, CFG, own_base))
    assert {path: (leaf.rank, leaf.scale) for path, leaf in loaded.items()} == {
        path: (leaf.rank, leaf.scale) for path, leaf in leaves.items()
    }
    assert digest(unflatten(loaded)) == digest(unflatten(leaves))
    rewritten(
        rank_pattern={"o_proj": 5}, alpha_pattern={"q_proj": 3.0, "^model.layers.1.self_attn.q_proj": 9.0}
    )(folder)
    (folder / manifest.NAME).unlink()
    loaded = leaf_paths(load_adapter(folder, CFG, own_base))
    assert (loaded["blocks/0/out"].rank, loaded["blocks/1/q"].scale, loaded["blocks/1/v"].scale) == (
        5,
        1.0,
        4.0,
    )


def test_a_rank_stabilised_scale_is_read(tmp_path):
    folder = saved(tmp_path)
    (folder / manifest.NAME).unlink()
    rewritten(use_rslora=True)(folder)
    assert leaf_paths(load_adapter(folder, CFG))["blocks/0/q"].scale == 12 / 3**0.5


def test_a_dora_and_weights_trained_whole_are_merged(tmp_path):
    folder = saved(tmp_path, adapters(layers=(0,)))
    (folder / manifest.NAME).unlink()
    rng, tensors = np.random.default_rng(0), load_file(folder / WEIGHTS)
    head = rng.normal(size=(CFG.vocab, CFG.width)).astype(np.float32)
    sizes = {name: tensor.shape[0] for name, tensor in tensors.items() if "lora_B" in name}
    for name, size in sizes.items():
        tensors[name.replace("lora_B.weight", "lora_magnitude_vector")] = rng.uniform(1, 2, size).astype(
            np.float32
        )
    save_file(tensors | {"base_model.model.lm_head.weight": head}, folder / WEIGHTS)
    rewritten(use_dora=True, modules_to_save=["lm_head"])(folder)
    (adapted, notes), before = with_adapters(CFG, BASE_PARAMS, [folder]), leaf_paths(BASE_PARAMS)
    assert "no manifest.json" in notes[0]
    np.testing.assert_array_equal(adapted["head"], head.T)
    a, b = (tensors[f"{PREFIX}q_proj.lora_{side}.weight"].T for side in "AB")
    direction = np.asarray(before["blocks/0/q"], np.float64) + 4.0 * a @ b  # alpha / rank
    expected = tensors[f"{PREFIX}q_proj.lora_magnitude_vector"] * direction / np.sqrt((direction**2).sum(0))
    np.testing.assert_allclose(adapted["blocks"]["0"]["q"], expected, rtol=1e-5)
    assert digest(BASE_PARAMS) == BASE


def test_an_embedding_that_is_the_head_too_is_not_taken_for_both(tmp_path):
    """PEFT trains a copy of it beside the head, which stays as it was, unless it is told to tie the
    two.
    """
    folder, tied = saved(tmp_path), dataclasses.replace(CFG, tied=True)
    (folder / manifest.NAME).unlink()
    whole = np.ones((CFG.vocab, CFG.width), np.float32)
    save_file(
        load_file(folder / WEIGHTS) | {"base_model.model.model.embed_tokens.weight": whole}, folder / WEIGHTS
    )
    assert "trained whole" in refusal(load_adapter, folder, tied)
    assert "embed" in load_adapter(folder, CFG)
    rewritten(ensure_weight_tying=True)(folder)
    assert "embed" in load_adapter(folder, tied)


def test_only_what_the_layout_can_say_is_saved(tmp_path):
    several = leaf_paths(adapters())
    base = jnp.zeros((20, 24))
    for wrong, message in (
        (lively_params(CFG), "no LoRA adapters"),
        (
            unflatten({"blocks/0/q": several["blocks/0/q"].on(several["blocks/0/q"].on(base))}),
            "several adapters",
        ),
    ):
        with pytest.raises(UserError, match=message):
            saved(tmp_path, wrong)
    assert not list(tmp_path.iterdir())


def test_a_tree_on_its_base_is_saved_without_it(tmp_path):
    """Only the pair is written, wherever it lies."""
    alone = leaf_paths(adapters())
    on = {path: leaf.on(jnp.ones(leaf.shape)) for path, leaf in alone.items()}
    loaded = leaf_paths(load_adapter(saved(tmp_path, unflatten(on)), CFG))
    assert all(isinstance(leaf, LoRA) and leaf.base is None for leaf in loaded.values())
    np.testing.assert_array_equal(loaded["blocks/1/q"].b, alone["blocks/1/q"].b)
    bare = leaf_paths(without_adapters(unflatten(on)))
    assert all((bare[path] == 1).all() for path in alone)


def rewritten(**changes):
    """Changes fields of the config; checksum and tensors stay."""
    return lambda folder: (folder / CONFIG).write_text(
        json.dumps(json.loads((folder / CONFIG).read_text()) | changes)
    )


def of_bytes(name, change):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def of_tensors(change):
    """Writes other tensors, as another library would: without metadata."""
    return lambda folder: save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)


Q_A, Q_B = (f"{PREFIX}q_proj.lora_{side}.weight" for side in "AB")
DAMAGE = {
    "no config": (lambda folder: (folder / CONFIG).unlink(), "There is no adapter at"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "There is no adapter at"),
    "a weight that is no number": (
        of_bytes(WEIGHTS, lambda data: data[:-4] + b"\x00\x00\xc0\x7f"),
        "not finite",
    ),
    "another base": (
        of_bytes(WEIGHTS, lambda data: data.replace(BASE.encode(), b"f" * 64)),
        f"another model.*ffff.*{BASE[:16]}.*trained on 'tiny'",
    ),
    "another rank": (rewritten(r=4), "and its rank 4"),
    "rank 0": (rewritten(r=0), "should be at least 1"),
    "no rank": (rewritten(r=None), "does not say r"),
    "scale not finite": (
        rewritten(lora_alpha=float("nan")),
        "lora_alpha should be one number of ordinary size",
    ),
    "another type": (rewritten(peft_type="IA3"), "peft_type is 'IA3', and only LORA"),
    "a bias": (rewritten(bias="all"), "bias is 'all'"),
    "a base without the adapter's first product": (
        rewritten(init_lora_weights="pissa"),
        "init_lora_weights is 'pissa'",
    ),
    "DoRA without magnitudes": (
        rewritten(use_dora=True),
        "no lora_magnitude_vector of 24 numbers for model.layers.0",
    ),
    "magnitudes without DoRA": (
        of_tensors(lambda all: all | {f"{PREFIX}q_proj.lora_magnitude_vector": np.ones(24, np.float32)}),
        "does not say use_dora",
    ),
    "another rank by name": (rewritten(rank_pattern={"q_proj": 2}), "and its rank 2"),
    "ranks by pattern": (rewritten(rank_pattern={"(a+)+$": 2}), "only names of modules are read"),
    "ranks in a list": (rewritten(rank_pattern=[2]), "rank_pattern should be an object"),
    "whole modules of another shape": (
        of_tensors(lambda all: all | {"base_model.model.lm_head.weight": np.ones((3, 5), np.float32)}),
        "lm_head.weight should be",
    ),
    "half a pair": (
        of_tensors(lambda all: {name: all[name] for name in all if name != Q_B}),
        "other half of a pair",
    ),
    "a layer too many": (
        of_tensors(lambda all: all | {Q_B.replace("0", "7", 1): all[Q_B]}),
        "no place in this architecture",
    ),
    "another width": (of_tensors(lambda all: all | {Q_B: all[Q_B][:-1].copy()}), "24, 20., and its rank 3"),
    "another input": (of_tensors(lambda all: all | {Q_A: all[Q_A][:, 1:].copy()}), "24, 20., and its rank 3"),
    "integers": (of_tensors(lambda all: all | {Q_B: all[Q_B].astype(np.int32)}), "is I32"),
    "nothing": (of_tensors(lambda all: {}), "no adapter of any matrix"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_what_is_wrong_is_named_without_a_manifest(how, tmp_path):
    """As other libraries save it."""
    folder = saved(tmp_path)
    (folder / manifest.NAME).unlink()
    change, message = DAMAGE[how]
    change(folder)
    assert re.search(message, refusal(lambda: load_adapter(folder, CFG, own_base)))


def test_a_base_that_an_adapter_names_is_read_where_it_lies(tmp_path, monkeypatch):
    """Nothing is fetched for it, and its name is no way to go round for ever or to write to a
    terminal.
    """
    folder = saved(tmp_path)
    (folder / manifest.NAME).unlink()
    cached_only = []

    def fetch(name, only, check_config, report):
        cached_only.append(only)
        raise UserError("not there")

    monkeypatch.setattr(hub, "fetch", fetch)
    for name, message in {
        str(folder): "named as a base of itself",
        "Org/Missing": "adapts Org/Missing, which cannot be read: not there",
        "~nobody-of-this-name/x": "There is no model at ~nobody",
        "a\x1b[2Jb": "does not name the model it adapts",
    }.items():
        rewritten(base_model_name_or_path=name)(folder)
        assert message in refusal(load_model, str(folder))
    assert cached_only == [True]


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, manifest.NAME])
def test_no_changed_byte_is_read(name, tmp_path):
    folder = saved(tmp_path)
    (folder / "README.md").write_text("what others may add")
    load_adapter(folder, CFG, own_base)
    of_bytes(name, lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])(folder)
    assert f"{name} is damaged" in refusal(lambda: load_adapter(folder, CFG, own_base))


def test_a_checkpoint_may_be_shared_without_its_optimizer(tmp_path):
    folder = saved(tmp_path)
    (folder / "optimizer.safetensors").write_bytes(b"moments")
    manifest.write_manifest(folder)
    load_adapter(folder, CFG, own_base)
    (folder / "optimizer.safetensors").unlink()
    load_adapter(folder, CFG, own_base)
    (folder / CONFIG).unlink()
    assert "is damaged" in refusal(lambda: load_adapter(folder, CFG, own_base))


def test_a_base_with_an_adapter_on_it_has_a_digest_that_counts_its_scale(tmp_path):
    adapted, _ = with_adapters(CFG, BASE_PARAMS, [saved(tmp_path)])
    others, _ = with_adapters(CFG, BASE_PARAMS, [saved(tmp_path, adapters(alpha=24.0))])
    assert base_digest(adapted) == digest(adapted) != base_digest(others)
    folder = save_adapter(tmp_path / "second", CFG, adapters(), base=base_digest(adapted), base_name="tiny")
    with_adapters(CFG, adapted, [folder])
    assert "was trained on another model" in refusal(lambda: with_adapters(CFG, others, [folder]))


def test_a_folder_that_nothing_guards_is_noted(tmp_path):
    folder = saved(tmp_path)
    assert with_adapters(CFG, BASE_PARAMS, [folder])[1] == ()
    (folder / manifest.NAME).unlink()
    of_bytes(WEIGHTS, lambda data: data[:-4] + bytes([data[-4] ^ 1]) + data[-3:])(folder)
    adapted, (note,) = with_adapters(CFG, BASE_PARAMS, [folder])
    assert f"{folder} has no manifest.json" in note
    assert digest(adapted) != digest(with_adapters(CFG, BASE_PARAMS, [saved(tmp_path)])[0])
