"""Packed rows are worth what their examples are worth alone; the order is a function of (seed, step)."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import UserError
from engine.text.chat_tokenizer import Example
from engine.text.examples import PackedBatches, Pair, evaluation_batches, evaluation_pairs, pack_rows, pair_batch


def example(*tokens: int, counts: bool = True) -> Example:
    return Example(np.array(tokens, np.int32), np.array([False] + [counts] * (len(tokens) - 1)), f"f:{tokens[0]}")


EXAMPLES = [example(*range(start, start + 2 + start % 5)) for start in range(1, 34)]


def examples_of(sizes: list[int], seed: int = 0) -> list[Example]:
    """Examples of sizes + 1 tokens, of which about half count."""
    rng = np.random.default_rng(seed)
    return [
        Example(rng.integers(1, 41, size + 1, np.int32), rng.random(size + 1) < 0.5, f"f:{place}")
        for place, size in enumerate(sizes)
    ]


def tokens_in(batch: Any, pack: bool = True) -> list[tuple[int, ...]]:
    """The tokens of each example in a batch, by its segments."""
    examples = []
    for row in range(len(batch.tokens)):
        segments = batch.segments[row] if pack else np.ones(batch.tokens.shape[1], int)
        for segment in sorted({*segments.tolist()} - {0}):
            here = segments == segment
            if pack:
                np.testing.assert_array_equal(batch.positions[row][here], np.arange(here.sum()))
            examples.append((*batch.tokens[row][here].tolist(), int(batch.targets[row][here][-1])))
    return examples


def test_a_row_by_hand():
    packed = PackedBatches([example(1, 2, 3), example(4, 5, 6, 7), example(8, 9, counts=False)], seq=7, batch=1, seed=0)
    batch = packed.at(0)
    assert batch.tokens.tolist() == [[4, 5, 6, 1, 2, 8, 0]]
    assert batch.targets.tolist() == [[5, 6, 7, 2, 3, 9, 0]]
    assert batch.mask.tolist() == [[True] * 5 + [False] * 2]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0, 0]]
    assert batch.segments.tolist() == [[1, 1, 1, 2, 2, 3, 0]]
    assert [field.dtype for field in batch] == [np.int32, np.int32, np.bool, np.int32, np.int32]


def test_weights_are_in_the_mask_of_training_alone():
    examples = [example(1, 2, 3), example(4, 5, 6, 7)._replace(weight=0.25)]
    (mask,) = PackedBatches(examples, seq=7, batch=1, seed=0).at(0).mask
    assert mask.dtype == np.float32
    assert mask.tolist() == [0.25] * 3 + [1] * 2 + [0] * 2
    (batch,) = evaluation_batches(examples, 7, 1)
    assert batch.mask.tolist() == [[True] * 5 + [False] * 2]


def test_each_goes_where_it_leaves_least_room():
    assert pack_rows(examples_of([3, 5, 7, 2]), 10, pack=True) == [[2, 0], [1, 3]]
    assert pack_rows(examples_of([3, 5, 7, 2]), 10, pack=False) == [[0], [1], [2], [3]]


@settings(max_examples=80)
@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=40), pack=st.booleans())
def test_every_example_lies_whole_in_one_row(sizes, pack):
    rows = pack_rows(examples_of(sizes), 12, pack)
    assert sorted(index for row in rows for index in row) == list(range(len(sizes)))
    assert all(sum(sizes[index] for index in row) <= 12 for row in rows)
    if pack and len(rows) > 1:
        # Best fit leaves no two rows that would go into one, and so never twice the rows there could be.
        filled = sorted(sum(sizes[index] for index in row) for row in rows)
        assert filled[0] + filled[1] > 12


def test_an_epoch_sees_every_example_once():
    packed, rows = PackedBatches(EXAMPLES, seq=8, batch=1, seed=5), len(pack_rows(EXAMPLES, 8, pack=True))
    firsts = [first for step in range(rows) for first, *_ in tokens_in(packed.at(step))]
    assert sorted(firsts) == [example.tokens[0] for example in EXAMPLES]
    assert firsts != [first for step in range(rows, 2 * rows) for first, *_ in tokens_in(packed.at(step))]


@pytest.mark.parametrize("pack", [True, False])
def test_once_is_once(pack):
    examples = EXAMPLES[:23]
    batches = list(evaluation_batches(examples, 8, 4, pack))
    assert {batch.tokens.shape for batch in batches} == {(4, 8)}
    assert sum(int(batch.mask.sum()) for batch in batches) == sum(len(e.tokens) - 1 for e in examples)
    if pack:
        actual = sorted(tokens for batch in batches for tokens in tokens_in(batch))
        assert actual == sorted(tuple(e.tokens.tolist()) for e in examples)


def test_packed_is_unpacked(cfg, params):
    """The same summed loss, and another number where segments are not told apart; a shift of a segment's positions is none."""
    import jax

    from engine.model.loss import summed_loss

    loss = jax.jit(lambda batch: summed_loss(cfg, params, batch))
    examples = examples_of([3, 9, 5, 2, 7, 1, 4, 6, 8, 3, 2])
    totals = [sum(float(loss(batch)) for batch in evaluation_batches(examples, 16, 4, pack)) for pack in (True, False)]
    assert totals[0] == pytest.approx(totals[1], rel=1e-5)
    batch = next(iter(evaluation_batches(examples, 16, 4)))
    first = float(loss(batch))
    assert float(loss(batch._replace(segments=(batch.segments > 0).astype(np.int32)))) != pytest.approx(first, rel=1e-4)
    shifted = batch._replace(positions=np.tile(np.arange(16, dtype=np.int32), (4, 1)))
    assert float(loss(shifted)) == pytest.approx(first, rel=1e-4)


def test_pairs_stand_row_by_row():
    pairs = [Pair(example(n, n + 1, n + 2), example(n, n + 3)) for n in range(1, 8)]
    batch = pair_batch(pairs, np.array([5, 0, 3]), seq=4)
    assert batch.pair.tolist() == [5, 0, 3]
    assert batch.chosen.tokens.tolist() == [[pair + 1, pair + 2, 0, 0] for pair in (5, 0, 3)]
    assert batch.rejected.tokens.tolist() == [[pair + 1, 0, 0, 0] for pair in (5, 0, 3)]
    assert batch.rejected.targets.tolist() == [[pair + 4, 0, 0, 0] for pair in (5, 0, 3)]
    assert batch.chosen.segments is None
    listed = list(evaluation_pairs(pairs, 4, 3))
    assert [batch.pair.tolist() for batch in listed] == [[0, 1, 2], [3, 4, 5], [6, -1, -1]]
    assert listed[-1].chosen.mask.sum() == 2


def test_what_makes_no_batches():
    for examples, seed, words in (
        ([], 0, "no examples"), ([example(*range(1, 11))], 0, "f:1 has 10 tokens; a row of 8 takes 2 to 9"),
        ([example(5)], 0, "f:5 has 1 tokens"), ([example(1, 2)], -1, "seed must be"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            PackedBatches(examples, 8, 1, seed)
    with pytest.raises(UserError, match="f:1 has 10 tokens"):
        next(evaluation_pairs([Pair(example(1, 2), example(*range(1, 11)))], 8, 1))
