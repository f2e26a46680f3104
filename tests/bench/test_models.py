"""What is measured is the model that was named, wherever it lies."""

import json

import jax
import numpy as np
import pytest
from tiny import lively_params, tiny_config

from bench.models import drawn, loaded
from engine.errors import UserError
from engine.storage import checkpoint
from engine.storage.digest import digest
from engine.text.tokenizer import byte_tokenizer

CFG = tiny_config(vocab=257)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with two checkpoints of different weights."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    for step in (1, 2):
        checkpoint.save(folder, step, lively_params(CFG, step), {}, {})
    (folder / "config.json").write_text(json.dumps(CFG.to_json()))
    byte_tokenizer().save(folder / "tokenizer")
    return folder


def test_a_run_folder_is_its_newest_step_and_a_step_folder_that_step(run):
    for place, step in ((run, 2), (run / "checkpoints" / "1", 1)):
        found = loaded(str(place))
        assert (found.name, found.cfg) == ("mine", CFG)
        assert digest(found.params) == digest(lively_params(CFG, step))


def test_what_is_no_model_is_named(run):
    for place in (run / "checkpoints" / "7", run / "tokenizer", "tinny"):
        with pytest.raises(UserError, match="There is no model at"):
            loaded(str(place))
    with pytest.raises(UserError, match="is a text, not a model"):
        loaded("python")


def test_drawn_weights_leave_no_block_without_a_say():
    leaves = jax.tree.leaves(drawn("tiny", CFG).params)
    assert all(np.abs(leaf).max() > 0 for leaf in leaves)
