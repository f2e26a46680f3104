"""Adapters are files of their own: they come back as they were, and go on no other base."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import lively_params, tiny_config

from engine.errors import UserError
from engine.model.paths import leaf_paths, unflatten
from engine.model.weights.lora import LoRA, make_adapter
from engine.storage.adapter import load_adapter, save_adapter
from engine.storage.digest import digest

CFG = tiny_config()
BASE = "0123456789abcdef" * 4


def adapters():
    parts = CFG.parts["qkv"]
    found = {}
    for layer in range(2):
        made = make_adapter(jax.random.key(layer), 20, [parts["q"], parts["v"]], 3, 12.0)
        found[f"blocks/{layer}/qkv"] = dataclasses.replace(made, b=jnp.full(made.b.shape, 0.1 + layer))
    return unflatten(found)


def test_it_comes_back_to_the_bit(tmp_path):
    mine = adapters()
    folder = save_adapter(tmp_path / "mine", mine, base=BASE, about={"model": "tiny"})
    for base in (BASE, None):
        loaded = load_adapter(folder, base=base)
        assert jax.tree.structure(loaded.adapters) == jax.tree.structure(mine)
        assert digest(loaded.adapters) == digest(mine)
        assert (loaded.base, loaded.about) == (BASE, {"model": "tiny"})
    assert sorted(entry.name for entry in folder.iterdir()) == ["adapter.json", "adapter.safetensors"]


def test_saving_again_replaces_it(tmp_path):
    save_adapter(tmp_path / "mine", adapters(), base=BASE)
    other = jax.tree.map(lambda leaf: leaf + 1, adapters())
    save_adapter(tmp_path / "mine", other, base=BASE)
    assert digest(load_adapter(tmp_path / "mine").adapters) == digest(other)
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine"]


def test_a_base_it_was_not_learnt_about_is_refused(tmp_path):
    folder = save_adapter(tmp_path / "mine", adapters(), base=BASE, about={"model": "tiny"})
    params = lively_params(CFG)
    with pytest.raises(UserError, match=r"another model.*0123456789abcdef.*It was tiny"):
        load_adapter(folder, base=digest(params))


def test_only_adapters_are_saved(tmp_path):
    for wrong in ({}, lively_params(CFG)):
        with pytest.raises(ValueError, match="LoRA leaves only"):
            save_adapter(tmp_path / "mine", wrong, base=BASE)
    assert not list(tmp_path.iterdir())


def rewritten(**changes):
    def change(folder):
        said = json.loads((folder / "adapter.json").read_text())
        (folder / "adapter.json").write_text(json.dumps(said | changes))

    return change


def of_leaf(**changes):
    def change(folder):
        said = json.loads((folder / "adapter.json").read_text())
        said["leaves"]["blocks/0/qkv"] |= changes
        (folder / "adapter.json").write_text(json.dumps(said))

    return change


DAMAGE = {
    "no description": lambda folder: (folder / "adapter.json").unlink(),
    "no weights": lambda folder: (folder / "adapter.safetensors").unlink(),
    "cut description": lambda folder: (folder / "adapter.json").write_text('{"base": "01'),
    "another kind of description": lambda folder: (folder / "adapter.json").write_text("[]"),
    "bytes that are no text": lambda folder: (folder / "adapter.json").write_bytes(b"\xff\xfe\x00{"),
    "cut weights": lambda folder: (folder / "adapter.safetensors").write_bytes(
        (folder / "adapter.safetensors").read_bytes()[:-5]
    ),
    "version": rewritten(version=7),
    "no leaves": rewritten(leaves={}),
    "leaves as a list": rewritten(leaves=[1]),
    "about as text": rewritten(about="tiny", base="f" * 64),
    "base as a number": rewritten(base=5),
    "a leaf too many": rewritten(leaves={"blocks/7/qkv": {"scale": 1.0, "columns": [[0, 24]]}}),
    "columns of another width": of_leaf(columns=[[0, 24], [36, 47]]),
    "columns that overlap": of_leaf(columns=[[0, 24], [20, 32]]),
    "columns below 0": of_leaf(columns=[[-24, 0], [36, 48]]),
    "columns without an end": of_leaf(columns=[[0], [36, 48]]),
    "a weight that is no number": lambda folder: (folder / "adapter.safetensors").write_bytes(
        (folder / "adapter.safetensors").read_bytes()[:-4] + b"\x00\x00\xc0\x7f"
    ),
    "scale as text": of_leaf(scale="much"),
    "scale not finite": of_leaf(scale=float("nan")),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_is_named(tmp_path, how):
    folder = save_adapter(tmp_path / "mine", adapters(), base=BASE)
    DAMAGE[how](folder)
    with pytest.raises(UserError):
        load_adapter(folder, base=BASE)


def test_a_tree_on_its_base_is_saved_without_it(tmp_path):
    """Only the pair is written, wherever it lies."""
    on = {path: leaf.on(jnp.zeros((20, 48))) for path, leaf in leaf_paths(adapters()).items()}
    loaded = load_adapter(save_adapter(tmp_path / "mine", unflatten(on), base=BASE))
    assert all(isinstance(leaf, LoRA) and leaf.base is None for leaf in leaf_paths(loaded.adapters).values())
    np.testing.assert_array_equal(leaf_paths(loaded.adapters)["blocks/1/qkv"].b, leaf_paths(adapters())["blocks/1/qkv"].b)
