"""A run that an earlier version saved in Orbax's format: refused with the command that converts it, then loaded to the bit."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorstore
from safetensors.flax import load_file
from tiny_runs import tiny

from engine import manifest
from engine.files import UNFINISHED
from engine.storage import checkpoint
from engine.storage.digest import digest
from stages import convert, evaluate
from stages.train import __main__ as train


def write_as_orbax(step: Path) -> None:
    """Makes a step folder what an earlier version wrote: a folder for each part, with one array of zarr a leaf."""
    for part in ("params", "optimizer"):
        arrays = load_file(step / f"{part}.safetensors")
        (step / f"{part}.safetensors").unlink()
        (step / part).mkdir()
        keys = lambda name: [{"key": key, "key_type": 2} for key in name.split("/")]
        of = {name: {"key_metadata": keys(name), "value_metadata": {"value_type": "jax.Array"}} for name in arrays}
        of["empty"] = {"key_metadata": keys("empty"), "value_metadata": {"value_type": "None"}}
        (step / part / "_METADATA").write_text(json.dumps({"tree_metadata": of}))
        for name, leaf in arrays.items():
            place = {"driver": "ocdbt", "base": f"file://{step / part}/", "path": name.replace("/", ".") + "/"}
            spec = {"driver": "zarr3", "kvstore": place}
            store = tensorstore.open(spec, create=True, dtype=tensorstore.dtype(leaf.dtype), shape=leaf.shape)
            store.result().write(np.asarray(leaf)).result()
    (step / "_CHECKPOINT_METADATA").write_text("{}")
    manifest.write_manifest(step)


@pytest.fixture
def old(trained, tmp_path):
    """A run of an earlier version; its oldest checkpoint is one of today's."""
    run = shutil.copytree(trained, tmp_path / "run")
    shutil.copytree(run / "checkpoints" / "20", run / "checkpoints" / "1")
    for step in checkpoint.steps(trained):
        write_as_orbax(run / "checkpoints" / str(step))
    return run


def contents(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_it_is_refused_with_the_command_and_converted_to_the_bit(trained, old, text, failing, capsys):
    before = contents(old)
    resumed = tiny(text, old, "--steps", 30, "--tokenizer", "bpe:300", "--context", 64)
    (leftover := old / f".checkpoints.01234567{UNFINISHED}").mkdir()  # as a kill in the last moment of a conversion leaves it
    (old / "checkpoints").rename(leftover / "old")
    for command, words in ((train.main, resumed), (evaluate.main, ["--model", old])):
        assert f"uv run --extra older python -m stages.convert --model {old}" in failing(command, words)
    assert convert.main(["--model", str(old)]) == 0
    assert "Converted" in capsys.readouterr().out
    for step in checkpoint.steps(trained):
        for name in ("params.safetensors", "optimizer.safetensors", "state.json", "manifest.json"):
            wanted = (trained / "checkpoints" / str(step) / name).read_bytes()
            assert (old / "checkpoints" / str(step) / name).read_bytes() == wanted
    assert digest(checkpoint.load_params(old).params) == digest(checkpoint.load_params(trained).params)
    after = contents(old)
    assert all(after[path] == data for path, data in before.items() if "checkpoints" not in path.parts)
    assert convert.main(["--model", str(old)]) == 0
    assert "Nothing to convert" in capsys.readouterr().out
    assert contents(old) == after


@pytest.mark.parametrize("damage", ["a file", "metadata", "no run"])
def test_what_cannot_be_converted_stays_as_it_is(old, failing, damage):
    step = old / "checkpoints" / "20"
    if damage == "a file":
        (step / "state.json").write_text("{}")
    elif damage == "metadata":
        (step / "params" / "_METADATA").write_text("{}")
        manifest.write_manifest(step)
    before = contents(old)
    named = {"a file": f"damaged: {step / 'state.json'}", "metadata": "_METADATA is damaged", "no run": "There is no run at"}
    assert named[damage] in failing(convert.main, ["--model", step if damage == "no run" else old])
    assert contents(old) == before
