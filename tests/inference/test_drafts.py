"""Drafter: a draft token is what followed the longest match, and drafts are as long as measuring says that they pay."""

import random

from hypothesis import given
from hypothesis import strategies as st

from engine.inference.drafts import CHANCES, MIN_CHANCE, Drafter

texts = st.lists(st.integers(0, 2), max_size=40)


def plain_draft(text: list[int], count: int) -> list[int]:
    """By looking at every place, for the longest end first and from the back, while the product of
    CHANCES is high enough.
    """
    drafts, likely = [], 1.0
    while len(drafts) < count:
        places = (
            (length, place)
            for length in range(min(len(CHANCES), len(text)), 0, -1)
            for place in range(len(text) - 1, length - 1, -1)
            if place < len(text) - len(drafts) and text[place - length : place] == text[-length:]
        )
        length, place = next(places, (0, 0))
        if not length or (likely := likely * CHANCES[length - 1]) < MIN_CHANCE:
            break
        drafts.append(text[place])
        text = [*text, text[place]]
    return drafts


@given(texts, st.integers(1, 5))
def test_a_draft_is_what_followed_the_last_time_the_text_read_so(text, count):
    assert Drafter(text).draft(count) == plain_draft(text, count)


@given(texts, texts, st.integers(1, 5))
def test_only_what_is_measured_depends_on_when_tokens_came(text, more, count):
    drafter = Drafter(text)
    drafter.extend(more)
    drafter.measured = Drafter(()).measured
    assert drafter.draft(count) == Drafter([*text, *more]).draft(count)


@given(st.floats(0.0, 1.0), st.integers(0, 99))
def test_in_the_long_run_the_share_that_came_true_decides(share, seed):
    """A text of pairs whose second token is the first's last time in so large a `share`."""
    drafter, chance, fresh = Drafter(()), random.Random(seed), iter(range(10, 10**6))
    last, drafted = {}, []
    for _ in range(400):
        first = chance.randrange(4)
        drafter.extend([first])
        drafted.append(len(drafter.draft(1)) > 0)
        last[first] = last[first] if first in last and chance.random() < share else next(fresh)
        drafter.extend([last[first]])
    if share > 0.7:  # the last ten or so are remembered
        assert sum(drafted[-100:]) > 90
    if share > 0.9:  # of every second token: well above MIN_SHARE of all
        assert drafter.is_worthwhile
    if share < 0.01:
        assert sum(drafted[-100:]) < 10
        assert not drafter.is_worthwhile
