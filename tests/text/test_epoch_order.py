"""The order of an epoch is a permutation that does not change between versions: grain's, by which earlier runs were trained."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.text.epoch_order import EpochOrder, permute
from engine.text.windows import TextBatches

# grain.MapDataset.range(count).seed(seed).shuffle()[step * batch : (step + 1) * batch] of grain 0.2.18, modulo count.
GRAIN = [
    (1, 3, 0, 5, [0, 0, 0]),
    (7, 4, 1, 2, [6, 4, 3, 5]),
    (142, 5, 3, 1234, [84, 40, 118, 55, 66]),
    (65536, 5, 0, 13, [41812, 26639, 5545, 41263, 52746]),
    (65540, 5, 4294967295, 9, [23349, 29774, 43482, 9838, 7534]),
    (1000000, 5, 77, 0, [285337, 364804, 415897, 496420, 30936]),
    (30000000, 5, 12, 1000000, [8318315, 24439921, 14366205, 23392087, 22992317]),
]


@pytest.mark.parametrize(("count", "batch", "seed", "step", "expected"), GRAIN)
def test_the_order_is_that_of_earlier_runs(count, batch, seed, step, expected):
    assert EpochOrder(count, batch, seed).at(step).tolist() == expected


@given(count=st.one_of(st.integers(1, 300), st.integers(2**16 - 2, 2**16 + 300)), seed=st.integers(0, 2**32 - 1))
def test_every_index_is_there_once(count, seed):
    assert np.array_equal(np.sort(permute(np.arange(count), count, seed)), np.arange(count))


def test_epochs_are_told_apart():
    order = EpochOrder(10, 4, 0)
    assert [order.epochs_at(step).tolist() for step in (0, 2, 5)] == [[0] * 4, [0, 0, 1, 1], [2] * 4]
    assert [order.epoch(step) for step in (0, 5)] == [0.0, 2.0]
    epochs = [np.concatenate([order.at(step) for step in range(first, first + 5)]) for first in (0, 5)]
    assert all(sorted(steps) == sorted([*range(10)] * 2) for steps in epochs)
    assert not np.array_equal(*epochs)


@given(shares=st.sampled_from([1, 2, 3, 6]), step=st.integers(0, 50), seed=st.integers(0, 99))
def test_the_rows_of_all_processes_are_the_batch(shares, step, seed):
    """The data order does not depend on the number of processes: each one's own rows, side by side, are the whole batch."""
    tokens = np.arange(200)
    whole, rows = TextBatches(tokens, seq=7, batch=6, seed=seed), []
    for share in range(shares):
        own = TextBatches(tokens, seq=7, batch=6, seed=seed)
        own.order.rows = slice(share * 6 // shares, (share + 1) * 6 // shares)
        rows.append(own.at(step).tokens)
    assert np.array_equal(np.concatenate(rows), whole.at(step).tokens)
