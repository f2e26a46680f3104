"""select_trainable: which weights `--train` and `--freeze` name, and that the FLOP counts use the same ones."""

import pytest

from engine.counting.params import count_params
from engine.errors import UserError
from engine.model.config import MATRICES
from engine.model.shapes import leaf_shapes
from engine.model.trainable import TrainablePaths, all_trainable
from engine.training.freeze import select_trainable
from stages.runs.model_stage import choose_trainable
from tests.tiny import tiny_config

CFG = tiny_config()
TIED = tiny_config(tied=True)


def test_by_default_all_is_trained():
    assert select_trainable(CFG) == (all_trainable(CFG), {})
    assert select_trainable(CFG, train=["all"])[0] == all_trainable(CFG)


@pytest.mark.parametrize("cfg", [CFG, TIED], ids=["untied", "tied"])
def test_ends_of_the_model_are_what_their_names_say(cfg):
    paths, head = leaf_shapes(cfg).keys(), {"embed" if cfg.tied else "head"}
    lowest, highest = ({path for path in paths if path.startswith(f"blocks/{layer}/")} for layer in (0, 1))
    assert select_trainable(cfg, freeze=["bottom:1"])[0].weights == paths - lowest - {"embed"}
    assert select_trainable(cfg, freeze=["top:1"])[0].weights == paths - highest - {"norm", "head"}
    assert select_trainable(cfg, train=["head"])[0].weights == head
    assert select_trainable(cfg, freeze=["head"])[0].weights == paths - head


def test_trained_paths_less_frozen_paths():
    rules = {"train": ["blocks/1/.*", "norm"], "freeze": [r".*_norm", "bottom:1"]}
    chosen, matches = select_trainable(CFG, **rules)
    assert chosen == TrainablePaths(frozenset({f"blocks/1/{name}" for name in MATRICES} | {"norm"}))
    assert {rule: len(paths) for rule, paths in matches.items()} == {
        "blocks/1/.*": 11,
        "norm": 1,
        ".*_norm": 8,
        "bottom:1": 12,
    }
    block = 20 * 48 + 24 * 20 + 20 * 56 + 28 * 20
    assert [words for _, words in choose_trainable(CFG, None, **rules)[1]] == [
        f"11 leaves, {block + 2 * 20 + 2 * 4:,} parameters",
        "1 leaf, 20 parameters",
        f"8 leaves, {4 * 20 + 4 * 4} parameters",
        f"12 leaves, {41 * 20 + block + 2 * 20 + 2 * 4:,} parameters",
        f"{block + 20:,} of {count_params(CFG).total:,} parameters "
        f"({(block + 20) / count_params(CFG).total:.1%})",
    ]


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
