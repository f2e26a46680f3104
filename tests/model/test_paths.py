"""Parameters by path: split and merge are inverse."""

from hypothesis import given
from hypothesis import strategies as st

from engine.model.paths import leaf_paths, map_paths, merge, split, unflatten

names = st.text("ab01_", min_size=1, max_size=3)
trees = st.dictionaries(
    names,
    st.recursive(st.integers(), lambda inner: st.dictionaries(names, inner, min_size=1), max_leaves=9),
    min_size=1,
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


def test_block_ten_comes_after_block_nine():
    tree = {"blocks": {str(i): {"w": i} for i in range(12)}}
    assert list(leaf_paths(tree).values()) == list(range(12))
