"""bench measures the model that was named, wherever it lies."""

import json
import shutil

import numpy as np
import pytest
from tiny import lively_params, tiny_config

from bench.models import BenchModel, load, tokens_for
from engine.counting.params import count_params
from engine.errors import UserError
from engine.storage import checkpoint
from engine.storage.digest import digest
from engine.storage.gguf.file import save_gguf
from engine.storage.huggingface import folder as huggingface
from engine.storage.model_loader import read_config
from engine.text.tokenizer import byte_tokenizer

CFG = tiny_config(vocab=257)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with two checkpoints of different weights."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    for step in (1, 2):
        with checkpoint.BackgroundSaver(folder, 3) as saver:
            saver.save(step, lively_params(CFG, step), {}, {})
    (folder / "config.json").write_text(json.dumps(CFG.to_json()))
    (folder / "run.json").write_text("{}")
    byte_tokenizer().save(folder / "tokenizer")
    return folder


def test_a_run_folder_is_its_newest_step_and_a_step_folder_that_step(run):
    for place, step in ((run, 2), (run / "checkpoints" / "1", 1)):
        result = load(str(place))
        assert (result.name, result.cfg) == ("mine", CFG)
        assert digest(result.params) == digest(lively_params(CFG, step))


def test_the_architecture_is_known_before_a_weight_is_read(run, tmp_path, monkeypatch):
    """So what cannot fit is refused before it is allocated, whatever form the model comes in."""
    hugging_face, gguf = tmp_path / "folder", tmp_path / "file.gguf"
    huggingface.save_folder(hugging_face, CFG, lively_params(CFG), {"eos_token_id": 256}, dtype="float32")
    save_gguf(gguf, CFG, lively_params(CFG), {}, name="tiny", dtype="float32")
    monkeypatch.setattr(checkpoint, "load_params", None)
    monkeypatch.setattr("engine.storage.model_loader.read_params", None)
    for place in (run, run / "checkpoints" / "1", hugging_face, gguf):
        assert count_params(read_config(str(place))) == count_params(CFG)


def test_a_run_that_holds_an_adapter_or_is_damaged_says_so(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    for record in ('{"kind": "adapter"}', '{"learns": "rank=8,alpha=16,targets=all"}'):  # the latter in earlier versions
        (copy / "run.json").write_text(record)
        with pytest.raises(UserError, match="holds an adapter for another model"):
            load(str(copy))
    for name in ("run.json", "config.json"):
        (copy / name).write_text("[")
        with pytest.raises(UserError, match="is damaged"):
            load(str(copy))
        (copy / name).write_text("{}")


def test_a_model_that_reads_is_measured_with_english():
    model = BenchModel("a", CFG, {}, byte_tokenizer())
    tokens = tokens_for(model, 2, 9)
    assert tokens.shape == (2, 9)
    assert bytes(tokens.reshape(-1).tolist()).decode().startswith('The "assert" state')
    assert tokens_for(model, 3, 200_000).shape == (3, 200_000), "a long text begins again"
    assert len(np.unique(tokens_for(BenchModel("a", CFG, {}), 2, 500))) > 200
