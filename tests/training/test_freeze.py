"""select_trainable: which weights `--train` and `--freeze` name, and that the FLOP counts use the same ones."""

import pytest
from tiny import tiny_config

from engine.counting.params import (
    TrainablePaths,
    all_trainable,
    bottom_frozen,
    count_params,
    head_only,
    leaf_shapes,
    top_frozen,
)
from engine.errors import UserError
from engine.model.config import MATRICES
from engine.training.freeze import Match, select_trainable

CFG = tiny_config()
TIED = tiny_config(tied=True)


def test_by_default_all_is_trained():
    chosen = select_trainable(CFG)
    assert chosen.trainable_paths == all_trainable(CFG)
    assert (chosen.matches, chosen.trainable_count) == ((), count_params(CFG).total)
    assert select_trainable(CFG, train=["all"]).trainable_paths == all_trainable(CFG)


@pytest.mark.parametrize("cfg", [CFG, TIED], ids=["untied", "tied"])
def test_ends_of_the_model_are_those_that_are_counted(cfg):
    assert select_trainable(cfg, freeze=["bottom:1"]).trainable_paths == bottom_frozen(cfg, 1)
    assert select_trainable(cfg, freeze=["top:2"]).trainable_paths == top_frozen(cfg, 2)
    assert select_trainable(cfg, train=["head"]).trainable_paths == head_only(cfg)
    assert select_trainable(cfg, freeze=["head"]).trainable_paths.weights == leaf_shapes(cfg).keys() - head_only(cfg).weights


def test_trained_paths_less_frozen_paths():
    chosen = select_trainable(CFG, train=["blocks/1/.*", "norm"], freeze=[r".*_norm", "bottom:1"])
    assert chosen.trainable_paths == TrainablePaths(frozenset({f"blocks/1/{name}" for name in MATRICES} | {"norm"}))
    assert chosen.matches == (
        Match("blocks/1/.*", 11, 20 * 48 + 24 * 20 + 20 * 56 + 28 * 20 + 2 * 20 + 2 * 4),
        Match("norm", 1, 20),
        Match(".*_norm", 8, 4 * 20 + 4 * 4),
        Match("bottom:1", 12, 41 * 20 + 20 * 48 + 24 * 20 + 20 * 56 + 28 * 20 + 2 * 20 + 2 * 4),
    )
    assert chosen.trainable_count == 20 * 48 + 24 * 20 + 20 * 56 + 28 * 20 + 20


@pytest.mark.parametrize(
    ("train", "freeze", "words"),
    [
        (["blocks/0/gaet"], [], "'blocks/0/gaet' matches no parameter. Did you mean 'blocks/0/gate'?"),
        ([], ["embde"], "Did you mean 'embed'?"),
        (["blocks/(2|3)/.*"], [], "matches no parameter"),
        ([], ["bottom:3"], "the model has 2"),
        ([], ["bottom:0"], "names no block"),
        ([], ["top:two"], "matches no parameter"),
        (["blocks/(0/.*"], [], "is not a pattern"),
        (["head"], ["head"], "Nothing is left to train"),
        ([], [".*"], "Nothing is left to train"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused(train, freeze, words):
    with pytest.raises(UserError) as error:
        select_trainable(CFG, train, freeze)
    assert words in str(error.value)
