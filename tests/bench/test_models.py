"""bench measures the model that was named, with text that it reads."""

import json

import numpy as np
import pytest

from bench.models import BenchModel, load, tokens_for
from engine.errors import UserError
from engine.text.tokenizer import byte_tokenizer
from tests.tiny import tiny_config

CFG = tiny_config(vocab=257)


def test_a_run_that_holds_an_adapter_is_refused(tmp_path):
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    (tmp_path / "config.json").write_text(json.dumps(CFG.to_json()))
    (tmp_path / "run.json").write_text('{"kind": "adapter"}')
    with pytest.raises(UserError, match="holds an adapter for another model"):
        load(str(tmp_path))


def test_a_model_that_reads_is_measured_with_english():
    model = BenchModel("a", CFG, {}, byte_tokenizer())
    tokens = tokens_for(model, 2, 9)
    assert tokens.shape == (2, 9)
    assert bytes(tokens.reshape(-1).tolist()).decode().startswith('The "assert" state')
    assert tokens_for(model, 3, 200_000).shape == (3, 200_000), "a long text begins again"
    assert len(np.unique(tokens_for(BenchModel("a", CFG, {}), 2, 500))) > 200
