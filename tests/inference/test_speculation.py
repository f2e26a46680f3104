"""Drafter: drafts are what followed the last time the text read so, and are given up while they do not come true."""

import random

from hypothesis import given
from hypothesis import strategies as st

from engine.inference.speculation import LENGTHS, Drafter

texts = st.lists(st.integers(0, 2), max_size=40)


def plain_draft(text: list[int], count: int) -> list[int]:
    """The same by looking at every place, for the longest end first and from the back."""
    for length in LENGTHS:
        for place in range(len(text) - 1, length - 1, -1):
            if text[place - length : place] == text[-length:]:
                return text[place : place + count]
    return []


@given(texts, texts, st.integers(1, 5))
def test_a_draft_is_what_followed_the_last_time_the_text_read_so(text, more, count):
    drafter = Drafter(text)
    assert drafter.draft(count) == plain_draft(text, count)
    for token in more:
        drafter.extend([token])
        text.append(token)
        assert drafter.draft(count) == plain_draft(text, count)
    assert Drafter(text).draft(count) == drafter.draft(count)


def test_a_text_that_repeats_itself_has_a_draft_and_a_new_one_has_none():
    assert Drafter((1, 2, 3, 4, 5, 1, 2, 3)).draft(3) == [4, 5, 1]
    assert Drafter((1, 2, 3, 4, 5)).draft(3) == []
    assert Drafter(()).draft(3) == []
    assert Drafter((7, 7, 7)).draft(3) == [7]


def check_drafts(drafter: Drafter, right: int, of: int) -> None:
    """Extends the text by tokens of which the first `right` were drafted."""
    drafter.extend([0] * of, [0] * right + [1] * (of - right))


def test_wrong_drafts_are_given_up_and_right_ones_taken_up_again():
    drafter = Drafter(())
    assert drafter.pays
    for wrong in (True, True, True, True, True, False):
        check_drafts(drafter, 0, 3)
        assert drafter.pays == wrong
    for _ in range(100):
        check_drafts(drafter, 0, 3)
    for right in (False, False, True):
        assert drafter.pays == right
        check_drafts(drafter, 8, 8)
    drafter.extend([1, 2], [])
    assert drafter.pays, "nothing was drafted, so nothing was wrong"


@given(st.floats(0.0, 1.0), st.integers(0, 99))
def test_in_the_long_run_the_share_that_came_true_decides(share, seed):
    drafter, chance = Drafter(()), random.Random(seed)
    paid = []
    for _ in range(300):
        check_drafts(drafter, sum(chance.random() < share for _ in range(8)), 8)
        paid.append(drafter.pays)
    if share > 0.5:
        assert all(paid[20:])
    if share < 0.02:
        assert not any(paid[20:])
