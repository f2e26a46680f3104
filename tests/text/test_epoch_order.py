"""The order of an epoch is a permutation that does not change between versions, or runs could not be resumed exactly."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.text.batch import EpochOrder, TextBatches, permutation

KNOWN = [
    (1, 3, 0, 5, [0, 0, 0]),
    (7, 4, 1, 2, [6, 5, 3, 4]),
    (142, 5, 3, 1234, [110, 99, 128, 83, 112]),
    (65540, 5, 4294967295, 9, [52209, 33179, 54198, 64141, 23873]),
]


@pytest.mark.parametrize(("count", "batch", "seed", "step", "expected"), KNOWN)
def test_the_order_does_not_change_between_versions(count, batch, seed, step, expected):
    assert [item for _, item in EpochOrder(count, batch, seed).at(step)] == expected


@given(count=st.integers(1, 300), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 99))
def test_every_index_is_there_once(count, seed, epoch):
    assert np.array_equal(np.sort(permutation(count, seed, epoch)), np.arange(count))


def test_epochs_are_told_apart():
    order = EpochOrder(10, 4, 0)
    assert [[epoch for epoch, _ in order.at(step)] for step in (0, 2, 5)] == [[0] * 4, [0, 0, 1, 1], [2] * 4]
    assert [order.epoch(step) for step in (0, 5)] == [0.0, 2.0]
    items = [[item for step in range(first, first + 5) for _, item in order.at(step)] for first in (0, 5)]
    assert all(sorted(row) == sorted([*range(10)] * 2) for row in items)
    assert items[0] != items[1]


@given(shares=st.sampled_from([1, 2, 3, 6]), step=st.integers(0, 50), seed=st.integers(0, 99))
def test_the_rows_of_all_processes_are_the_batch(shares, step, seed):
    """The data order does not depend on the number of processes: each one's own rows, side by side, are the whole batch."""
    batches = TextBatches(np.arange(200), seq=7, batch=6, seed=seed)
    own = [slice(share * 6 // shares, (share + 1) * 6 // shares) for share in range(shares)]
    rows = [batches.at(step, rows).tokens for rows in own]
    assert np.array_equal(np.concatenate(rows), batches.at(step).tokens)
