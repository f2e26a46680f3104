"""An order is a function of (seed, epoch) that never changes; a token is a target once an epoch, and scored once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import UserError
from engine.text.batch import EpochOrder, TextBatches, count_windows, evaluation_windows

KNOWN = [
    (1, 3, 0, 5, [0, 0, 0]),
    (7, 4, 1, 2, [6, 5, 3, 4]),
    (142, 5, 3, 1234, [110, 99, 128, 83, 112]),
    (65540, 5, 4294967295, 9, [52209, 33179, 54198, 64141, 23873]),
]


@pytest.mark.law("determinism")
@pytest.mark.parametrize(("count", "batch", "seed", "step", "expected"), KNOWN)
def test_the_order_does_not_change_between_versions(count, batch, seed, step, expected):
    assert [item for _, item in EpochOrder(count, batch, seed).at(step)] == expected


def test_epochs_are_told_apart():
    order = EpochOrder(10, 4, 0)
    assert [[epoch for epoch, _ in order.at(step)] for step in (0, 2, 5)] == [[0] * 4, [0, 0, 1, 1], [2] * 4]
    assert [order.epoch(step) for step in (0, 5)] == [0.0, 2.0]
    items = [[item for step in range(first, first + 5) for _, item in order.at(step)] for first in (0, 5)]
    assert all(sorted(row) == sorted([*range(10)] * 2) for row in items)
    assert items[0] != items[1]


@pytest.mark.law("determinism")
@given(shares=st.sampled_from([1, 2, 3, 6]), step=st.integers(0, 50), seed=st.integers(0, 99))
def test_the_rows_of_all_processes_are_the_batch(shares, step, seed):
    """The data order does not depend on the number of processes: each one's own rows, side by side,
    are the whole batch.
    """
    batches = TextBatches(np.arange(200), seq=7, batch=6, seed=seed)
    own = [slice(share * 6 // shares, (share + 1) * 6 // shares) for share in range(shares)]
    rows = [batches.at(step, rows).tokens for rows in own]
    assert np.array_equal(np.concatenate(rows), batches.at(step).tokens)


# A token that tells its own place, so that a batch tells where it was cut.
PLACES = np.arange(1000, dtype=np.uint16)


def windows_of(batches: TextBatches, epoch: int) -> list[np.ndarray]:
    """The targets of each window of one epoch, out of whichever steps they lie in."""
    windows = (len(batches.tokens) - 1) // batches.seq
    first, last = epoch * windows, (epoch + 1) * windows
    steps = range(first // batches.batch, -(-last // batches.batch))
    rows = [row for step in steps for row in batches.at(step).targets]
    return rows[first - steps.start * batches.batch :][:windows]


@settings(max_examples=40)
@given(
    length=st.integers(2, 90),
    seq=st.integers(1, 12),
    batch=st.integers(1, 7),
    seed=st.integers(0, 2**32 - 1),
    epoch=st.integers(0, 5),
)
def test_every_token_is_a_target_once_an_epoch(length, seq, batch, seed, epoch):
    if length <= seq:
        return
    batches = TextBatches(PLACES[:length], seq, batch, seed)
    targets = np.concatenate(windows_of(batches, epoch))
    assert len(set(targets.tolist())) == len(targets)
    assert 0 <= length - 1 - len(targets) < seq
    assert 0 not in targets  # nothing comes before the first token


@settings(max_examples=40)
@given(step=st.integers(0, 10_000), seed=st.integers(0, 1000))
def test_the_target_is_the_next_token(step, seed):
    batch = TextBatches(PLACES, 7, 5, seed).at(step)
    np.testing.assert_array_equal(batch.targets, np.asarray(batch.tokens) + 1)
    # Windows are stretches of the text; one an epoch may run over its end and go on at its start.
    np.testing.assert_array_equal(batch.tokens[:, 1:], np.asarray(batch.targets)[:, :-1] % 999)


def test_epochs_differ_in_order_and_in_where_windows_start():
    batches = TextBatches(PLACES, 7, 5, seed=0)
    assert batches.order.epoch(71) == 2.5
    orders = [np.array(windows_of(batches, epoch))[:, 0] for epoch in range(6)]
    assert len({tuple(order) for order in orders}) == 6
    assert len({int(order.min()) % 7 for order in orders}) > 2
    # No epoch is one of a neighbouring seed's.
    neighbour = [
        tuple(np.array(windows_of(TextBatches(PLACES, 7, 5, seed=1), epoch))[:, 0]) for epoch in range(6)
    ]
    assert not {tuple(order) for order in orders} & set(neighbour)


def test_what_makes_no_batches():
    with pytest.raises(UserError, match="7 tokens and one window of 7 needs 8"):
        TextBatches(PLACES[:7], 7, 1, 0)
    assert TextBatches(PLACES[:8], 7, 2, 0).at(5).tokens.tolist()


@settings(max_examples=200)
@given(length=st.integers(2, 60), seq=st.integers(1, 13), stride=st.integers(1, 13), batch=st.integers(1, 5))
def test_evaluation_scores_every_token_but_the_first_once(length, seq, stride, batch):
    if stride > seq:
        return
    scored, windows = [], 0
    for part in evaluation_windows(PLACES[:length], seq, stride, batch):
        assert {field.shape for field in part[:4]} == {(batch, seq)}
        windows += int(np.any(part.mask, axis=1).sum())
        for tokens, targets, mask in zip(part.tokens, part.targets, part.mask):
            scored += targets[mask].tolist()
            np.testing.assert_array_equal(targets[mask], tokens[mask] + 1)
            if not mask.any():
                continue
            # A window is one stretch of text up to the last token it scores, so what is scored has
            # all its context.
            last = np.flatnonzero(mask)[-1]
            np.testing.assert_array_equal(np.diff(tokens[: last + 1] if length <= seq else tokens), 1)
            context = np.flatnonzero(mask) + 1  # tokens that a target is predicted from
            assert all(context > np.minimum(seq - stride, targets[mask] - 1))
    assert scored == list(range(1, length))
    assert windows == count_windows(length, seq, stride)


def test_what_cannot_be_evaluated():
    with pytest.raises(UserError, match="1 tokens"):
        next(evaluation_windows(PLACES[:1], 7, 7, 1))
