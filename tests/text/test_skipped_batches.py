"""Ranges of batches to skip: which batch a step reads, and what a resumed run can still change."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import UserError
from engine.text.skipped_batches import batch_of_step, format_ranges, join_ranges, parse_ranges, replace_unread

RANGES = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 6)).map(lambda p: (p[0], p[0] + p[1]))).map(join_ranges)


def batches(ranges) -> list[int]:
    return [batch for first, last in ranges for batch in range(first, last + 1)]


@given(RANGES)
def test_steps_read_all_batches_but_the_skipped_ones_in_order(skipped):
    read = [batch_of_step(step, skipped) for step in range(20)]
    assert read == [batch for batch in range(200) if batch not in batches(skipped)][:20]
    assert not skipped or parse_ranges(format_ranges(skipped)) == skipped


@given(RANGES, RANGES, st.integers(0, 20))
def test_a_resumed_run_changes_only_what_it_has_not_read(recorded, wanted, step):
    now, refused = replace_unread(recorded, wanted, step)
    read = [batch_of_step(before, recorded) for before in range(step)]
    assert read == [batch_of_step(before, now) for before in range(step)]
    unread = read[-1] + 1 if read else 0
    assert [batch for batch in batches(now) if batch >= unread] == [batch for batch in batches(wanted) if batch >= unread]
    assert {*batches(refused)} == {*read} & {*batches(wanted)}


def test_ranges_longer_than_memory():
    skipped = ((0, 10**12 - 1),)
    assert replace_unread(skipped, skipped, 10) == (skipped, ())
    assert replace_unread(skipped, ((5, 10**12 + 19),), 10) == (
        ((0, 10**12 - 1), (10**12 + 10, 10**12 + 19)),
        ((10**12, 10**12 + 9),),
    )


def test_what_is_typed():
    assert parse_ranges("120..129, 3..3,4..9") == ((3, 9), (120, 129))
    for text in ("", "7", "9..3", "1..2;", "-1..2", "1...2", "1..x"):
        with pytest.raises(UserError, match="wanted the first and the last batch to skip"):
            parse_ranges(text)
