"""A run of an earlier version, in Orbax's format or with q, k and v in one array: refused, then converted to the bit."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
from safetensors.numpy import load_file, save_file
from tiny_runs import tiny

from engine import manifest
from engine.errors import UserError
from engine.files import UNFINISHED
from engine.model.config import JOINED, MATRICES
from engine.model.paths import leaf_paths, unflatten
from engine.storage import checkpoint, checkpoint_reader
from engine.storage.adapter import load_adapter, save_adapter
from engine.storage.digest import digest
from engine.storage.model_loader import load_model, with_adapters
from stages import convert, evaluate
from stages.finetune import __main__ as finetune
from stages.runs.folder import updating
from stages.train import __main__ as train

APART = re.compile(r"((?:.*/)?blocks/\d+/)(q|k|v|gate|up)(_bias)?(/[ab])?")


def joined(arrays: dict[str, Any]) -> dict[str, Any]:
    """Returns arrays by path as earlier versions held them: q, k, v and gate, up side by side."""
    parts: dict[str, dict[str, Any]] = {}
    for path, array in arrays.items():
        if match := APART.fullmatch(path):
            start, name, bias, half = match.groups("")
            path = start + next(whole for whole, names in JOINED.items() if name in names) + bias + half
        parts.setdefault(path, {})[name if match else ""] = array
    order = lambda named: [array for _, array in sorted(named.items(), key=lambda item: [*MATRICES, ""].index(item[0]))]
    return {path: np.concatenate(order(named), axis=-1) if "" not in named else named[""] for path, named in parts.items()}


def write_joined(step: Path) -> None:
    """Makes a step folder what an earlier version wrote."""
    for part in ("params", "optimizer"):
        save_file(joined(load_file(step / f"{part}.safetensors")), step / f"{part}.safetensors")
    manifest.write_manifest(step)


def write_as_orbax(step: Path) -> None:
    """Makes a step folder what a still earlier version wrote: a folder for each part, with one array of zarr a leaf."""
    write_joined(step)
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


@pytest.fixture(params=[write_as_orbax, write_joined])
def old(trained, tmp_path, request):
    """A run of an earlier version; its oldest checkpoint is one of today's."""
    run = shutil.copytree(trained, tmp_path / "run")
    shutil.copytree(run / "checkpoints" / "20", run / "checkpoints" / "1")
    for step in checkpoint.steps(trained):
        request.param(run / "checkpoints" / str(step))
    return run


def contents(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_it_is_refused_with_the_command_and_converted_to_the_bit(trained, old, text, failing, capsys):
    before = contents(old)
    resumed = tiny(text, old, "--steps", 30, "--tokenizer", "bpe:300", "--context", 64)
    (leftover := old / f".checkpoints.01234567{UNFINISHED}").mkdir()  # as a kill in the last moment of a conversion leaves it
    (old / "checkpoints").rename(leftover / "old")
    for command, words in ((train.main, resumed), (evaluate.main, ["--model", old])):
        assert f"python -m stages.convert --model {old}" in failing(command, words)
    assert convert.main(["--model", str(old)]) == 0
    assert "Converted" in capsys.readouterr().out
    for step in checkpoint.steps(trained):
        converted, wanted = (run / "checkpoints" / str(step) for run in (old, trained))
        assert (converted / "state.json").read_bytes() == (wanted / "state.json").read_bytes()
        for name in ("params.safetensors", "optimizer.safetensors"):
            ours, theirs = load_file(converted / name), load_file(wanted / name)
            assert ours.keys() == theirs.keys()
            assert all(np.array_equal(array, theirs[path]) for path, array in ours.items())
    assert digest(checkpoint_reader.load_params(old).params) == digest(checkpoint_reader.load_params(trained).params)
    after = contents(old)
    assert all(after[path] == data for path, data in before.items() if "checkpoints" not in path.parts)
    assert convert.main(["--model", str(old)]) == 0
    assert "Nothing to convert" in capsys.readouterr().out
    assert contents(old) == after


def test_an_adapter_of_an_earlier_version_knows_its_base(trained, tmp_path, failing):
    """It names it by a digest over q, k and v side by side."""
    rows = [
        {"messages": [{"role": "user", "content": f"the {n}"}, {"role": "assistant", "content": "sails"}]} for n in range(40)
    ]
    (data := tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run, few = tmp_path / "lora", ["--context", 32, "--batch", 2, "--steps", 2, "--general", "none"]
    words = ["--model", trained, "--data", data, "--out-dir", run, "--lora", "rank=2,targets=q,v,up", *few]
    assert finetune.main(list(map(str, words))) == 0
    base, wanted = load_model(str(trained)), digest(load_model(str(run)).params)
    before = digest(unflatten(joined(leaf_paths(base.params))))
    for step in checkpoint.steps(run):
        write_joined(run / "checkpoints" / str(step))
    record = json.loads((run / "run.json").read_text())
    with updating(run):
        (run / "run.json").write_text(json.dumps(record | {"base": record["base"] | {"digest": before}}))
    save_adapter(run / "adapter", base.cfg, load_adapter(run / "adapter", base.cfg), base=before, base_name="sea")
    assert "stages.convert" in failing(evaluate.main, ["--model", run])
    assert digest(with_adapters(base.cfg, base.params, [run / "adapter"])[0]) == wanted
    assert convert.main(["--model", str(run)]) == 0
    assert digest(load_model(str(run)).params) == wanted
    assert finetune.main([*map(str, words), "--steps", "3"]) == 0  # goes on
    assert checkpoint.steps(run)[-1] == 3
    other = base.params | {"norm": 2 * base.params["norm"]}
    with pytest.raises(UserError, match="was trained on another model"):
        with_adapters(base.cfg, other, [run / "adapter"])


@pytest.mark.parametrize("damage", ["a file", "metadata", "no run"])
@pytest.mark.parametrize("old", [write_as_orbax], indirect=True)
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
