"""Parameters by path: split and merge are inverse, and a rule that matches nothing is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import UserError
from engine.model.paths import first_match, leaf_paths, map_paths, merge, split, unflatten

names = st.text("ab01_", min_size=1, max_size=3)
trees = st.dictionaries(
    names, st.recursive(st.integers(), lambda inner: st.dictionaries(names, inner, min_size=1), max_leaves=9), min_size=1
)


@given(trees)
def test_paths_and_back_is_the_same_tree(tree):
    assert unflatten(leaf_paths(tree)) == tree
    assert map_paths(lambda _, leaf: leaf, tree) == tree


@given(trees, st.data())
def test_split_and_merge_are_inverse(tree, data):
    paths = list(leaf_paths(tree))
    names = data.draw(st.lists(st.sampled_from(paths), unique=True))
    chosen, rest = split(tree, names)
    assert sorted(leaf_paths(chosen)) == sorted(names)
    assert sorted([*leaf_paths(chosen), *leaf_paths(rest)]) == sorted(paths)
    assert merge(chosen, rest) == tree


def test_the_first_match_wins_and_matches_whole_paths():
    tree = {"blocks": {"0": {"out": 0, "out_norm": 0}}, "out": 0}
    rules = [(r"blocks/0/out", "first"), (r"blocks/.*", "second")]
    assert first_match(rules, tree) == {"blocks/0/out": "first", "blocks/0/out_norm": "second"}
    assert first_match(rules[::-1], tree)["blocks/0/out"] == "second"


def test_a_rule_that_matches_nothing_is_refused_and_the_nearest_path_named(params):
    with pytest.raises(UserError, match=r"'blocks/0/gaet'.*'blocks/0/gate'"):
        first_match([(r"blocks/0/gaet", 1)], params)
    with pytest.raises(UserError, match=r"'block/.*"):
        first_match([(".*", 1), (r"block/.*", 2)], params)
    with pytest.raises(UserError, match="'embe'"):  # a part of a path is not the path
        first_match([("embe", 1)], params)


def test_block_ten_comes_after_block_nine():
    tree = {"blocks": {str(i): {"w": i} for i in range(12)}}
    assert list(leaf_paths(tree).values()) == list(range(12))
